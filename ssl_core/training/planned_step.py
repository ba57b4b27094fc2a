"""The base of all training steps: sets a model up for its plan and applies gradients."""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from common.errors import UsageError
from ssl_core.planning import allocator
from ssl_core.planning.kernel_choice import choose_here
from ssl_core.planning.step_plan import HALF, Plan
from ssl_core.training.adamw import AdamRecipe, AdamW, Control
from ssl_core.training.half_weights import HalfWeights
from ssl_core.wav2vec2 import device_kernels
from ssl_core.wav2vec2.context import EncoderLayer
from ssl_core.wav2vec2.model import Backbone

_CHECKED_WEIGHTS = ("feed_forward.intermediate_dense.weight", "attention.out_proj.weight")
"""Weights of a transformer layer after whose gradients kept freed memory is checked."""
LOSS_SCALE_INTERVAL = 2000
"""Updates after which the loss scale (fp16) is doubled, as in torch's GradScaler."""


class PlannedStep:
    """Trains a model by a plan, with a learning rate for each group of parameters."""

    optimizers: dict[str, AdamW]
    """Optimizers by group name; created by `reset`."""

    def __init__(
        self,
        model: nn.Module,
        backbone: Backbone | None,
        plan: Plan,
        products: nn.Module | None = None,
    ) -> None:
        """Move the model to the plan's device and set it up.

        Args:
            model: what is trained.
            backbone: the backbone in the model; None if the step does not run it.
            plan: how a step is taken.
            products: the part of the model whose linear layers compute in the plan's precision;
                None if the step does not run it.
        """
        self.model, self.backbone, self.plan = model, backbone, plan
        self.device = torch.device(plan.device)
        if self.device.type == "cuda" and (plan.kernels != "auto" or plan.compile):
            device_kernels.force(choose_here(plan).kernels)
        self.fused = device_kernels.fused(torch.empty(0, device=self.device))
        """Whether Triton's kernels take the step."""
        self.resident = self.fused or self.device.type == "cuda"
        """Whether all of an update stays on the device, with nothing read by the host."""
        self.halves: HalfWeights | None = None
        if any(parameter.device != self.device for parameter in model.parameters()):
            model.to(self.device)
        if products is not None:
            self._keep_halves(products)
        model.train()
        self._set_up()
        self.reset()

    def reset(self) -> None:
        """Start with new optimizer state, as a client does between rounds."""
        self.optimizers = self.make_optimizers()
        scale = 2.0**16 if self.plan.precision == "fp16" else 1.0
        self.loss_scale: float | Tensor = scale
        """By which the loss is multiplied for its gradient; `[]` on the device if resident."""
        if self.resident:
            self.loss_scale = torch.tensor(scale, device=self.device)

    def make_optimizers(self) -> dict[str, AdamW]:
        """Create optimizers by group name."""
        raise NotImplementedError

    def optimizer_of(
        self, parameters: Iterable[tuple[str, nn.Parameter]], recipe: AdamRecipe
    ) -> AdamW:
        """The optimizer of a group of parameters, for this device."""
        kind = self.plan.optimizer_state
        if not self.fused:
            return AdamW(parameters, recipe, kind)
        from ssl_core.training.fused_adamw import FusedAdamW

        return FusedAdamW(parameters, recipe, kind, self.halves.copies if self.halves else {})

    def _keep_halves(self, root: nn.Module) -> None:
        """Keep copies of the linear layers of `root` in 16 bits, where that helps."""
        if self.fused and self.plan.precision in HALF:
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            half = torch.float16 if self.plan.precision == "fp16" else torch.bfloat16
            self.halves = HalfWeights(root, names, half)

    @property
    def copies(self) -> list[Tensor]:
        """Copies of weights in 16 bits, `[...]` each, that products use in their place."""
        return [] if self.halves is None else self.halves.leaves

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """Context of forward and backward passes: the weights are in the precision of products."""
        return contextlib.nullcontext() if self.halves is None else self.halves.in_place()

    def validate(self, plan: Plan) -> None:
        """Check a plan against the model; raises `UsageError`."""
        raise NotImplementedError

    def change_plan(self, plan: Plan) -> None:
        """Change the plan for later updates; the optimizer state stays.

        Raises:
            UsageError: the plan differs in batch, length, device, or a precision.
        """
        self.validate(plan)
        for name in ("length", "batch", "accumulation", "precision", "optimizer_state", "device"):
            if getattr(plan, name) != getattr(self.plan, name):
                raise UsageError(f"{name.replace('_', '-')} cannot change during a run")
        self.plan = plan
        self._set_up()

    def _set_up(self) -> None:
        """Set up the model and the process for the plan."""
        if self.device.type == "cuda":
            rounds = self.plan.precision == "tf32"
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = rounds
        if not self.resident:
            allocator.keep_freed_memory(self.plan.keep_freed_memory)
        if self.backbone is None:
            return
        encoder = self.backbone.encoder
        encoder.recompute = self.plan.recompute_layers
        for layer in encoder.layers:
            assert isinstance(layer, EncoderLayer)
            layer.attention.keep_weights = self.plan.keep_attention
            if self.plan.compile:
                layer.compile()

    def _settling(self) -> contextlib.AbstractContextManager[None]:
        """Bound the freed memory that is kept, at every layer and within it."""
        if self.backbone is None or self.resident:
            return contextlib.nullcontext()
        backbone = self.backbone
        convolutions, layers = backbone.feature_extractor.conv_layers, backbone.encoder.layers
        convolved = [layer.get_parameter("conv.weight") for layer in convolutions]
        weights = convolved + [
            layer.get_parameter(name) for layer in layers for name in _CHECKED_WEIGHTS
        ]
        modules = [backbone.feature_projection, *convolutions[2:]]
        if not self.plan.compile:  # a hook would be compiled with its layer
            modules += layers
            modules += [layer.get_submodule("feed_forward") for layer in layers]
        trained = [weight for weight in weights if weight.requires_grad]
        # The third convolution's input gradient is the largest tensor of the backward pass.
        pairs = zip(convolved[3:4], convolutions[2:3], strict=False)
        ahead = [(weight, module) for weight, module in pairs if weight.requires_grad]
        return allocator.settling(modules, trained, ahead=ahead)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Optimizer state for a checkpoint, by `kind/parameter name`.

        Shapes are those of `AdamW.state`; `loss_scale` is `[]`.
        """
        states: dict[str, Tensor] = {}
        for optimizer in self.optimizers.values():
            states |= dict(optimizer.state())
        return states | {"loss_scale": torch.as_tensor(self.loss_scale)}

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Restore the tensors of `optimizer_state`, of the same names and shapes `[...]`."""
        for optimizer in self.optimizers.values():
            optimizer.load(state)
        scale = state.get("loss_scale")
        if scale is not None:
            if isinstance(self.loss_scale, Tensor):
                self.loss_scale.copy_(scale)
            else:
                self.loss_scale = float(scale)

    @staticmethod
    def loss_scale_growth(update: int) -> float:
        """By which the loss scale grows after an update that was applied."""
        return 2.0 if (update + 1) % LOSS_SCALE_INTERVAL == 0 else 1.0

    def _adapt_loss_scale(self, growth: float | Tensor, applied: bool | Tensor) -> None:
        """Halve the loss scale after an overflow; else let it grow."""
        scale = self.loss_scale
        if isinstance(scale, Tensor):
            scale.copy_(
                torch.where(
                    torch.as_tensor(applied) > 0, scale * growth, (scale / 2).clamp_min(1.0)
                )
            )
        else:
            assert isinstance(growth, float)
            self.loss_scale = scale * growth if applied else max(1.0, scale / 2)

    def _drop_gradients(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None
        for optimizer in self.optimizers.values():
            optimizer.drop_gradients()

    def _collect(self, first: bool, last: bool) -> None:
        """Take the gradients of a micro-batch, before those of the next one.

        Gradients in 16 bits are summed in fp32. Those of a whole update are left as they are.

        Args:
            first: whether this is the update's first micro-batch.
            last: whether the update has no further micro-batch.
        """
        found = {} if self.halves is None else self.halves.take_gradients()
        for optimizer in self.optimizers.values():
            optimizer.collect(found, first, last)

    def _apply(
        self, rates: Mapping[str, float | Tensor], factor: float | Tensor, clip_norm: float
    ) -> tuple[float | Tensor, bool | Tensor]:
        """Scale, clip and apply all gradients.

        Args:
            rates: learning rates by group.
            factor: multiplies every gradient.
            clip_norm: largest norm; 0 does not clip.

        Returns:
            The gradients' norm and whether they were applied, on the device if resident.
        """
        if self.resident:
            return self._apply_on_device(rates, factor, clip_norm)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        assert isinstance(factor, float)
        norm = float(torch.nn.utils.get_total_norm(grads)) * factor
        if not math.isfinite(norm):
            return norm, False
        if clip_norm and norm > clip_norm:
            factor *= clip_norm / norm
        if factor != 1:
            torch._foreach_mul_(grads, factor)
        for group, optimizer in self.optimizers.items():
            optimizer.apply(float(rates[group]))
        return norm, True

    def _apply_on_device(
        self, rates: Mapping[str, float | Tensor], factor: float | Tensor, clip_norm: float
    ) -> tuple[Tensor, Tensor]:
        """As `_apply`; a gradient that is not finite is found, and skipped, on the device."""
        with torch.no_grad():
            gradients = [g for each in self.optimizers.values() for g in each.gradients()]
            norm = total_norm(gradients) * factor
            finite = torch.isfinite(norm).to(torch.int32)
            scale = torch.as_tensor(factor, dtype=torch.float32, device=self.device)
            if clip_norm:
                scale = scale * (clip_norm / norm).clamp_max(1.0)
            for group, optimizer in self.optimizers.items():
                rate = torch.as_tensor(rates[group], dtype=torch.float32, device=self.device)
                optimizer.apply_on_device(Control(rate, scale, finite))
        return norm, finite


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Norm of all gradients, `[...]` each in any dtype, computed in fp32 on the device: `[]`."""
    norms: list[Tensor] = []
    for dtype in {gradient.dtype: None for gradient in gradients}:
        alike = [gradient for gradient in gradients if gradient.dtype == dtype]
        norms += torch._foreach_norm(alike, 2.0, torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))
