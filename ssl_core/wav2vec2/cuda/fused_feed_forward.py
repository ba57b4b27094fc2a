"""The feed-forward network: two products, and between them bias and GELU in one kernel.

Saved for the backward pass are the network's input and what goes into bias and GELU. The backward
pass has one kernel that computes the GELU again, its gradient, and sums of that for the bias.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssl_core.wav2vec2.cuda.launching import blocks, launch

_ROWS, _COLUMNS, _STEPS = 8, 256, 8
"""Rows and columns of a tile, and tiles of a program, whose bias gradients it sums."""


@triton.jit
def _normal(x):
    """The normal distribution function."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=["rows"])
def biased_gelu_kernel(X, BIAS, OUT, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """GELU of `X` plus the bias, `[row, width]`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < width)
    at = row.to(tl.int64) * width + column
    x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(BIAS + column, mask=column < width, other=0.0)
    tl.store(OUT + at, (x * _normal(x)).to(OUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def biased_gelu_gradient_kernel(
    X, BIAS, GRAD, OUT, PARTIAL, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Replace the gradient of the GELU by that of `X`, and write the GELU to `OUT`.

    `PARTIAL`, `[program, width]`, receives sums of the gradient over the rows of each program.
    """
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    bias = tl.load(BIAS + column, mask=column < width, other=0.0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(0, STEPS):
        row = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < width)
        at = row.to(tl.int64) * width + column
        x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32) + bias
        normal = _normal(x)
        tl.store(OUT + at, (x * normal).to(OUT.dtype.element_ty), mask=inside)
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        g = tl.load(GRAD + at, mask=inside, other=0.0).to(tl.float32) * (normal + x * density)
        tl.store(GRAD + at, g.to(GRAD.dtype.element_ty), mask=inside)
        total += g
    own = PARTIAL + tl.program_id(0) * width + column
    tl.store(own, tl.sum(total, 0)[None, :], mask=column < width)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inner: Tensor, bias: Tensor, outer: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        before = torch.mm(rows, inner.t())
        after = torch.empty_like(before)
        count, width = before.shape
        launch(
            biased_gelu_kernel, (blocks(count, _ROWS), blocks(width, _COLUMNS)), before, bias,
            after, count, width, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(x, inner, bias, outer, before)
        return torch.mm(after, outer.t()).view(*x.shape[:-1], len(outer))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, inner, bias, outer, before = ctx.saved_tensors
        grad = grad.contiguous().flatten(0, -2)
        of_before, after = torch.mm(grad, outer), torch.empty_like(before)
        count, width = before.shape
        programs = blocks(count, _ROWS * _STEPS)
        partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        launch(
            biased_gelu_gradient_kernel, (programs, blocks(width, _COLUMNS)), before, bias,
            of_before, after, partial, count, width, ROWS=_ROWS, COLUMNS=_COLUMNS, STEPS=_STEPS,
            num_warps=4,
        )  # fmt: skip
        return (
            torch.mm(of_before, inner).view_as(x),
            torch.mm(of_before.t(), x.flatten(0, -2)),
            partial.sum(0),
            torch.mm(grad.t(), after),
        )


def fused_feed_forward(x: Tensor, inner: Tensor, bias: Tensor, outer: Tensor) -> Tensor:
    """Linear layer, GELU, and a linear layer without its bias.

    Args:
        x: `[batch, frame, hidden]`.
        inner: weight of the first layer, `[width, hidden]`, in the dtype of `x`.
        bias: of the first layer, `[width]` fp32.
        outer: weight of the second layer, `[hidden, width]`, in the dtype of `x`.

    Returns:
        `[batch, frame, hidden]`.
    """
    out: Tensor = _FeedForward.apply(x, inner, bias, outer)
    return out
