"""What every training step shares: a model set up for its plan, and gradients applied by it."""

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

_LOOKED_AT_AFTER = ("feed_forward.intermediate_dense.weight", "attention.out_proj.weight")
"""Weights of a layer after whose gradients freed memory is looked at."""
LOSS_SCALE_INTERVAL = 2000
"""Updates after which a scaled loss (fp16) tries twice the scale, as torch's GradScaler does."""


class PlannedStep:
    """A model that is trained by a plan, in groups of parameters that have a rate each."""

    optimizers: dict[str, AdamW]
    """By name of the group; made by `reset`."""

    def __init__(self, model: nn.Module, backbone: Backbone | None, plan: Plan) -> None:
        """Bring the model to the plan's device and set it up; `backbone` is a part of it."""
        self.model, self.backbone, self.plan = model, backbone, plan
        self.device = torch.device(plan.device)
        if any(parameter.device != self.device for parameter in model.parameters()):
            model.to(self.device)
        model.train()
        self._arrange()
        self.reset()

    def reset(self) -> None:
        """Forget the optimisers' moments, as a client does between rounds."""
        self.optimizers = self.make_optimizers()
        self.loss_scale = 2.0**16 if self.plan.precision == "fp16" else 1.0

    def make_optimizers(self) -> dict[str, AdamW]:
        """New optimisers, by name of the group."""
        raise NotImplementedError

    def validate(self, plan: Plan) -> None:
        """Check that a plan fits the model; raises `UsageError`."""
        raise NotImplementedError

    def change_plan(self, plan: Plan) -> None:
        """Take the updates to come by another plan, with the optimiser's moments as they are.

        Raises:
            UsageError: the plan keeps moments in other bits, is for another device or length.
        """
        self.validate(plan)
        for name in ("length", "batch", "accumulation", "precision", "optimizer_state", "device"):
            if getattr(plan, name) != getattr(self.plan, name):
                raise UsageError(f"{name.replace('_', '-')} cannot change in the middle of a run")
        self.plan = plan
        self._arrange()

    def _arrange(self) -> None:
        """Set the model and the process up for the plan."""
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
        """Looks after freed memory at every layer and within it."""
        if self.backbone is None:
            return contextlib.nullcontext()
        backbone = self.backbone
        convolutions, layers = backbone.feature_extractor.conv_layers, backbone.encoder.layers
        convolved = [layer.get_parameter("conv.weight") for layer in convolutions]
        weights = convolved + [
            layer.get_parameter(name) for layer in layers for name in _LOOKED_AT_AFTER
        ]
        modules = [backbone.feature_projection, *convolutions[2:]]
        if not self.plan.compile:  # a hook would be compiled with its layer
            modules += layers
            modules += [layer.get_submodule("feed_forward") for layer in layers]
        trained = [weight for weight in weights if weight.requires_grad]
        # The third's backward pass makes the gradient of its input, the largest that is made.
        pairs = zip(convolved[3:4], convolutions[2:3], strict=False)
        ahead = [(weight, module) for weight, module in pairs if weight.requires_grad]
        return allocator.settling(modules, trained, ahead=ahead)

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimisers' state by `kind/parameter name`, for a checkpoint."""
        states: dict[str, Tensor] = {}
        for optimizer in self.optimizers.values():
            states |= dict(optimizer.state())
        return states | {"loss_scale": torch.tensor(self.loss_scale)}

    def load_optimizer_state(self, moments: dict[str, Tensor]) -> None:
        """Bring back what `moments` gave."""
        for optimizer in self.optimizers.values():
            optimizer.load(moments)
        self.loss_scale = float(moments.get("loss_scale", self.loss_scale))

    def _adapt_loss_scale(self, update: int, applied: bool) -> None:
        """Halve it when a gradient overflowed; try twice as much every 2000 updates."""
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
        """Multiply all gradients by a factor, clip and apply; the norm, and whether it was done."""
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
    """Applies every gradient as soon as the backward pass has made it."""

    def __init__(
        self, optimizers: Mapping[str, AdamW], rates: Mapping[str, float], factor: float
    ) -> None:
        """`factor` multiplies every gradient first."""
        self.optimizers, self.rates, self.factor = optimizers, rates, factor
        self.finite, self.square = True, 0.0

    @property
    def norm(self) -> float:
        """Of the gradients applied, or of all up to the first that was not finite."""
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

    def __enter__(self) -> None:
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(group, name))
            for group, optimizer in self.optimizers.items()
            for name, parameter in optimizer.parameters.items()
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
