"""The base of all training steps: sets a model up for its plan and applies gradients."""

import contextlib
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from common.errors import UsageError
from ssl_core.planning import allocator
from ssl_core.planning.step_plan import Plan
from ssl_core.training.adamw import AdamW
from ssl_core.wav2vec2.context import EncoderLayer
from ssl_core.wav2vec2.model import Backbone

_CHECKED_WEIGHTS = ("feed_forward.intermediate_dense.weight", "attention.out_proj.weight")
"""Weights of a transformer layer after whose gradients kept freed memory is checked."""
SMALL = 2**16
"""Elements of a parameter from which its gradient is applied on its own in the backward pass."""
LOSS_SCALE_INTERVAL = 2000
"""Updates after which the loss scale (fp16) is doubled, as in torch's GradScaler."""


class PlannedStep:
    """Trains a model by a plan, with a learning rate for each group of parameters."""

    optimizers: dict[str, AdamW]
    """Optimizers by group name; created by `reset`."""

    def __init__(self, model: nn.Module, backbone: Backbone | None, plan: Plan) -> None:
        """Move the model to the plan's device and set it up.

        Args:
            model: what is trained.
            backbone: the backbone in the model; None if the step does not run it.
            plan: how a step is taken.
        """
        self.model, self.backbone, self.plan = model, backbone, plan
        self.device = torch.device(plan.device)
        if any(parameter.device != self.device for parameter in model.parameters()):
            model.to(self.device)
        model.train()
        self._set_up()
        self.reset()

    def reset(self) -> None:
        """Start with new optimizer state, as a client does between rounds."""
        self.optimizers = self.make_optimizers()
        self.loss_scale = 2.0**16 if self.plan.precision == "fp16" else 1.0

    def make_optimizers(self) -> dict[str, AdamW]:
        """Create optimizers by group name."""
        raise NotImplementedError

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
        if self.backbone is None:
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
        return states | {"loss_scale": torch.tensor(self.loss_scale)}

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Restore the tensors of `optimizer_state`, of the same names and shapes `[...]`."""
        for optimizer in self.optimizers.values():
            optimizer.load(state)
        self.loss_scale = float(state.get("loss_scale", self.loss_scale))

    def _adapt_loss_scale(self, update: int, applied: bool) -> None:
        """Halve the loss scale after an overflow; double it every `LOSS_SCALE_INTERVAL` updates."""
        if not applied:
            self.loss_scale = max(1.0, self.loss_scale / 2)
        elif (update + 1) % LOSS_SCALE_INTERVAL == 0:
            self.loss_scale *= 2

    def _drop_gradients(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def _apply(
        self, rates: Mapping[str, float], factor: float, clip_norm: float
    ) -> tuple[float, bool]:
        """Scale, clip and apply all gradients; returns their norm and whether they were applied."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads)) * factor
        if not math.isfinite(norm):
            return norm, False
        if clip_norm and norm > clip_norm:
            factor *= clip_norm / norm
        if factor != 1:
            torch._foreach_mul_(grads, factor)
        for group, optimizer in self.optimizers.items():
            optimizer.apply(rates[group])
        return norm, True


class AppliedInBackward:
    """Applies gradients as soon as the backward pass has computed them; a context manager.

    Those of parameters of fewer than `SMALL` elements are applied together at its end.
    """

    def __init__(
        self, optimizers: Mapping[str, AdamW], rates: Mapping[str, float], factor: float
    ) -> None:
        """Prepare the hooks.

        Args:
            optimizers: by group name.
            rates: learning rates by group name.
            factor: multiplies every gradient before it is applied.
        """
        self.optimizers, self.rates, self.factor = optimizers, rates, factor
        self.finite, self.square = True, 0.0

    @property
    def norm(self) -> float:
        """Norm of the applied gradients; NaN after a gradient that is not finite."""
        return math.sqrt(self.square) if self.finite else math.nan

    def _hook(self, group: str, name: str) -> Callable[[Tensor], None]:
        def apply(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if self.factor != 1:
                parameter.grad.mul_(self.factor)
            norm = float(parameter.grad.norm())
            self.finite = self.finite and math.isfinite(norm)
            if self.finite:
                self.square += norm * norm
                self.optimizers[group].apply(self.rates[group], [name])
            parameter.grad = None

        return apply

    def _apply_small(self) -> None:
        """Apply the gradients of small parameters together: a call takes longer than its work."""
        for group, optimizer in self.optimizers.items():
            small = {
                name: value
                for name, value in optimizer.parameters.items()
                if value.numel() < SMALL and value.grad is not None
            }
            grads = [value.grad for value in small.values() if value.grad is not None]
            if self.factor != 1 and grads:
                torch._foreach_mul_(grads, self.factor)
            norm = float(torch.nn.utils.get_total_norm(grads))
            self.finite = self.finite and math.isfinite(norm)
            if self.finite:
                self.square += norm * norm
                optimizer.apply(self.rates[group], small)
            for value in small.values():
                value.grad = None

    def __enter__(self) -> None:
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(group, name))
            for group, optimizer in self.optimizers.items()
            for name, parameter in optimizer.parameters.items()
            if parameter.numel() >= SMALL
        ]

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        if error is None:
            self._apply_small()
