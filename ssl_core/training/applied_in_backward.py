"""Applies gradients while the backward pass runs, so that they are never all in memory."""

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from ssl_core.training.adamw import AdamW


class AppliedInBackward:
    """Applies every gradient as soon as the backward pass has computed it; a context manager."""

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

    def __enter__(self) -> None:
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(group, name))
            for group, optimizer in self.optimizers.items()
            for name, parameter in optimizer.parameters.items()
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
