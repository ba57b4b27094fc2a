"""Applies gradients while the backward pass runs, so that they are never all in memory."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ssl_core.training.adamw import AdamW

SMALL = 2**16
"""Elements of a parameter from which its gradient is applied on its own in the backward pass."""


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
