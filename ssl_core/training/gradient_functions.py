"""Functions that scale a gradient or start a backward pass from a given one."""

from typing import Any

import torch
from torch import Tensor


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """Return `x`, `[...]`; the gradient that flows back through it is multiplied by `scale`."""
    scaled: Tensor = _ScaleGradient.apply(x, scale)
    return scaled


def continue_backward(x: Tensor, gradient: Tensor) -> None:
    """Run the backward pass from `x` with a given gradient, both `[...]`.

    `x.backward(gradient)` does the same, but imports sympy (25 MiB) to compare the shapes.
    """
    _GivenGradient.apply(x, gradient).backward()


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


class _GivenGradient(torch.autograd.Function):
    """A zero whose backward pass continues with the given gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient, None
