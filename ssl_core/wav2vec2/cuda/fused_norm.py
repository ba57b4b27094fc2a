"""Sum, dropout and layer norm in one kernel, and their gradient in one kernel and a sum.

The sum before the norm is saved, in fp32; its mean and variance are computed again. Gradients of
gain and bias are summed over the rows that a program takes, then over programs, in a fixed order.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ssl_core.wav2vec2.cuda.fused_dropout import Drop, row_mask
from ssl_core.wav2vec2.cuda.launching import blocks, launch

PROGRAMS = 264
"""Programs of the gradient: two for each multiprocessor of an H100. A constant, since the order of
its sums is part of the result."""
_WARPS = 4


class Norm(NamedTuple):
    """What is done besides the sum."""

    norm: nn.LayerNorm
    narrow: torch.dtype
    """Dtype of products, in which the result is written too."""
    before: Drop | None = None
    """Dropout of the second summand."""
    after: Drop | None = None
    """Dropout of the result; at most one of the two."""


@triton.jit(do_not_specialize=["frames", "site", "whole", "chance"])
def norm_kernel(
    X, Y, Y_BIAS, SUM, WIDE, NARROW, GAIN, BIAS, SEEDS, PLACES, frames, width, eps, site, whole,
    chance, scale, ADD: tl.constexpr, BIASED: tl.constexpr, BEFORE: tl.constexpr,
    AFTER: tl.constexpr, PACKED: tl.constexpr, BOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of `width` elements a program."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row.to(tl.int64) * width + column
    x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        y = tl.load(Y + at, mask=inside, other=0.0).to(tl.float32)
        if BIASED:
            y += tl.load(Y_BIAS + column, mask=inside, other=0.0)
        if BEFORE:
            keep = row_mask(row, column, frames, width, SEEDS, PLACES, site, whole, chance, PACKED)
            y = tl.where(keep, y * scale, 0.0)
        x += y
        tl.store(SUM + at, x, mask=inside)
    mean = tl.sum(x, 0) / width
    away = tl.where(inside, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(away * away, 0) / width + eps)
    gain = tl.load(GAIN + column, mask=inside, other=0.0)
    bias = tl.load(BIAS + column, mask=inside, other=0.0)
    out = away * rstd * gain + bias
    if AFTER:
        keep = row_mask(row, column, frames, width, SEEDS, PLACES, site, whole, chance, PACKED)
        out = tl.where(keep, out * scale, 0.0)
    tl.store(WIDE + at, out, mask=inside)
    if BOTH:
        tl.store(NARROW + at, out.to(NARROW.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["frames", "steps", "rows", "site", "whole", "chance"])
def norm_gradient_kernel(
    SUM, G_WIDE, G_NARROW, GAIN, G_X, G_Y, PARTIAL, SEEDS, PLACES, steps, rows, frames, width, eps,
    site, whole, chance, scale, HAS_WIDE: tl.constexpr, HAS_NARROW: tl.constexpr, ADD: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every so many rows a program; `PARTIAL` is `[program, 3, width]`."""
    column = tl.arange(0, BLOCK)
    gain = tl.load(GAIN + column, mask=column < width, other=0.0)
    of_gain = tl.zeros([BLOCK], tl.float32)
    of_bias = tl.zeros([BLOCK], tl.float32)
    of_y_bias = tl.zeros([BLOCK], tl.float32)
    for number in range(0, steps):
        row = number * tl.num_programs(0) + tl.program_id(0)
        inside = (column < width) & (row < rows)
        at = row.to(tl.int64) * width + column
        x = tl.load(SUM + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.zeros([BLOCK], tl.float32)
        if HAS_WIDE:
            g += tl.load(G_WIDE + at, mask=inside, other=0.0)
        if HAS_NARROW:
            g += tl.load(G_NARROW + at, mask=inside, other=0.0).to(tl.float32)
        if AFTER:
            keep = row_mask(row, column, frames, width, SEEDS, PLACES, site, whole, chance, PACKED)
            g = tl.where(keep, g * scale, 0.0)
        mean = tl.sum(x, 0) / width
        away = tl.where(inside, x - mean, 0.0)
        rstd = 1 / tl.sqrt(tl.sum(away * away, 0) / width + eps)
        normal = away * rstd
        of_gain += g * normal
        of_bias += g
        g *= gain
        slope = tl.sum(g * normal, 0) / width
        g = (g - tl.sum(g, 0) / width - normal * slope) * rstd
        tl.store(G_X + at, g.to(G_X.dtype.element_ty), mask=inside)
        if ADD:
            if BEFORE:
                keep = row_mask(
                    row, column, frames, width, SEEDS, PLACES, site, whole, chance, PACKED
                )
                g = tl.where(keep, g * scale, 0.0)
            of_y_bias += g
            tl.store(G_Y + at, g.to(G_Y.dtype.element_ty), mask=inside)
    own = PARTIAL + tl.program_id(0) * 3 * width + column
    tl.store(own, of_gain, mask=column < width)
    tl.store(own + width, of_bias, mask=column < width)
    tl.store(own + 2 * width, of_y_bias, mask=column < width)


def _dropout(how: Norm, spare: Tensor) -> tuple[Tensor, Tensor, tuple[int, int, int, float], bool]:
    """Seeds, places, numbers and whether packed; any tensor stands for what is not there."""
    where = how.before or how.after
    if where is None:
        return spare, spare, (0, 0, 0, 1.0), False
    places = where.seeds if where.places is None else where.places
    return where.seeds, places, where.numbers(), where.places is not None


class _NormedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        y_bias: Tensor | None,
        gain: Tensor,
        bias: Tensor,
        how: Norm,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.how, ctx.given = how, (x.dtype, None if y is None else y.dtype)
        ctx.biased = y_bias is not None
        x = x.contiguous()
        total = x if y is None else torch.empty_like(x, dtype=torch.float32)
        wide = torch.empty_like(x, dtype=torch.float32)
        both = how.narrow != torch.float32
        narrow = torch.empty_like(x, dtype=how.narrow) if both else wide
        width = x.shape[-1]
        seeds, places, numbers, packed = _dropout(how, x)
        launch(
            norm_kernel, (x.numel() // width,), x, x if y is None else y.contiguous(),
            gain if y_bias is None else y_bias, total, wide, narrow, gain, bias, seeds, places,
            x.shape[1], width, how.norm.eps, *numbers, ADD=y is not None, BIASED=y_bias is not None,
            BEFORE=how.before is not None, AFTER=how.after is not None, PACKED=packed, BOTH=both,
            BLOCK=triton.next_power_of_2(width), num_warps=_WARPS,
        )  # fmt: skip
        ctx.save_for_backward(total, gain)
        return wide, narrow if both else wide.view_as(wide)

    @staticmethod
    def backward(
        ctx: Any, of_wide: Tensor | None, of_narrow: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, None]:
        total, gain = ctx.saved_tensors
        how, (x_dtype, y_dtype) = ctx.how, ctx.given
        width = total.shape[-1]
        rows = total.numel() // width
        g_x = torch.empty_like(total, dtype=x_dtype)
        g_y = None if y_dtype is None else torch.empty_like(total, dtype=y_dtype)
        programs = min(rows, PROGRAMS)
        partial = total.new_empty((programs, 3, width), dtype=torch.float32)
        seeds, places, numbers, packed = _dropout(how, total)
        launch(
            norm_gradient_kernel, (programs,), total,
            total if of_wide is None else of_wide.contiguous(),
            total if of_narrow is None else of_narrow.contiguous(), gain, g_x,
            g_x if g_y is None else g_y, partial, seeds, places, blocks(rows, programs), rows,
            total.shape[1], width, how.norm.eps, *numbers, HAS_WIDE=of_wide is not None,
            HAS_NARROW=of_narrow is not None, ADD=g_y is not None, BEFORE=how.before is not None,
            AFTER=how.after is not None, PACKED=packed, BLOCK=triton.next_power_of_2(width),
            num_warps=_WARPS,
        )  # fmt: skip
        of_gain, of_bias, of_y_bias = partial.sum(0).unbind()
        return g_x, g_y, of_y_bias if ctx.biased else None, of_gain, of_bias, None


def normed_sum(
    x: Tensor, y: Tensor | None, how: Norm, y_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Layer norm of `x`, or of `x + y`, with dropout before or after.

    Args:
        x: `[batch, frame, width]`.
        y: `[batch, frame, width]`, or None.
        how: the norm, the dropout and the dtype of products.
        y_bias: added to `y` first, `[width]` fp32, or None.

    Returns:
        The result in fp32 and in the dtype of products, `[batch, frame, width]` each.
    """
    wide, narrow = _NormedSum.apply(x, y, y_bias, how.norm.weight, how.norm.bias, how)
    return wide, narrow
