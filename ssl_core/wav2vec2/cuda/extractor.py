"""The feature extractor's convolutions on a GPU, each one or two products for a whole batch.

Shapes, spare rows and what is saved are those of `cpu.strided_convolution`: a window of `taps` rows
is a head, its first `stride` rows, and a tail, the first rows of the next window. All heads of a
batch are one view of the input and all tails another, even across crops: windows that reach from
one crop into the next are spare, their results are read by nothing and their gradients are 0.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssl_core.wav2vec2.cuda.launching import blocks, launch

_ROWS = 64
"""Rows of windows in a tile of the first convolution."""
_ROWS_SUMMED = 1024
"""Rows that a program sums for the gradient of the first convolution's kernels."""


@triton.jit
def _normal_below(x):
    """Probability that a normal number is below `x`."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=["rows"])
def first_convolution(
    WINDOWS, KERNELS, OUT, rows, channels, columns,
    PADDED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The first convolution and its GELU, `ROWS` rows by `CHANNELS` channels of a crop."""
    crop = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    column = tl.arange(0, PADDED)
    exist = (row < rows)[:, None]
    inside = (channel < channels)[None, :]
    at = (crop * rows + row[:, None]) * columns + column[None, :]
    window = tl.load(WINDOWS + at, mask=exist & (column < columns)[None, :], other=0.0)
    at = (crop * columns + column[:, None]) * channels + channel[None, :]
    kernel = tl.load(KERNELS + at, mask=(column < columns)[:, None] & inside, other=0.0)
    x = tl.dot(window, kernel.to(window.dtype), input_precision=PRECISION)
    at = (crop * rows + row[:, None]) * channels + channel[None, :]
    tl.store(OUT + at, (x * _normal_below(x)).to(OUT.dtype.element_ty), mask=exist & inside)


@triton.jit(do_not_specialize=["rows"])
def first_kernel_gradient(
    WINDOWS, KERNELS, GRAD, OUT, rows, channels, columns,
    PADDED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, SUMMED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a crop's kernels, of `SUMMED` rows, from that of `first_convolution`'s result."""
    crop = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    column = tl.arange(0, PADDED)
    inside = (channel < channels)[None, :]
    mask = (column < columns)[:, None] & inside
    at = (crop * columns + column[:, None]) * channels + channel[None, :]
    kernel = tl.load(KERNELS + at, mask=mask, other=0.0)
    out = tl.zeros([PADDED, CHANNELS], tl.float32)
    for start in range(0, SUMMED, ROWS):
        row = tl.program_id(0) * SUMMED + start + tl.arange(0, ROWS)
        exist = (row < rows)[:, None]
        line = crop * rows + row[:, None]
        windows = WINDOWS + line * columns + column[None, :]
        window = tl.load(windows, mask=exist & (column < columns)[None, :], other=0.0)
        grads = GRAD + line * channels + channel[None, :]
        grad = tl.load(grads, mask=exist & inside, other=0.0).to(tl.float32)
        x = tl.dot(window, kernel.to(window.dtype), input_precision=PRECISION)
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        grad *= _normal_below(x) + x * density
        out = tl.dot(tl.trans(window), grad.to(window.dtype), out, input_precision=PRECISION)
    at = ((crop * tl.num_programs(0) + tl.program_id(0)) * columns + column[:, None]) * channels
    tl.store(OUT + at + channel[None, :], out, mask=mask)


def _sizes(windows: Tensor, channels: int, widest: int) -> dict[str, Any]:
    """What both kernels are compiled for."""
    return {
        "PADDED": max(16, 1 << (windows.shape[2] - 1).bit_length()),
        "ROWS": _ROWS,
        "CHANNELS": max(16, min(widest, 1 << (channels - 1).bit_length())),
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "num_warps": 4,
    }


def _activated_first(windows: Tensor, kernels: Tensor) -> Tensor:
    """GELU of the first convolution, `[batch, row, channel]`."""
    crops, rows, columns = windows.shape
    channels = kernels.shape[2]
    out = windows.new_empty(crops, rows, channels)
    sizes = _sizes(windows, channels, widest=128)
    grid = (blocks(rows, _ROWS), blocks(channels, sizes["CHANNELS"]), crops)
    launch(first_convolution, grid, windows, kernels, out, rows, channels, columns, **sizes)
    return out


def _first_gradient(windows: Tensor, kernels: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the kernels, in their shape and dtype."""
    crops, rows, columns = windows.shape
    channels = kernels.shape[2]
    sizes = _sizes(windows, channels, widest=64)
    grid = (blocks(rows, _ROWS_SUMMED), blocks(channels, sizes["CHANNELS"]), crops)
    parts = kernels.new_empty(crops, grid[0], columns, channels, dtype=torch.float32)
    launch(
        first_kernel_gradient,
        grid,
        *(windows, kernels, grad, parts, rows, channels, columns),
        SUMMED=_ROWS_SUMMED,
        **sizes,
    )
    return parts.sum(1).to(kernels.dtype)


class _Products:
    """The matrix products of one strided convolution on whole batches."""

    def __init__(self, weight: Tensor, stride: int, dtype: torch.dtype) -> None:
        """`weight`: `[out_channel, channel, tap]`; stride <= taps <= 2 * stride."""
        self.weight, self.stride = weight, stride
        taps = weight.transpose(1, 2)  # (O, K, C)
        if taps.dtype != dtype:
            taps = torch.empty(taps.shape, dtype=dtype, device=taps.device).copy_(taps)
        self.split = stride * weight.shape[1]
        self.taps = taps.contiguous().flatten(1)

    def _tails(self, rows: Tensor) -> Tensor:
        """`[window, overlap * channel]`, a view; the batch's last window has none."""
        flat = rows.view(-1, self.split)
        width = self.taps.shape[1] - self.split
        offset = rows.storage_offset() + self.split
        return flat.as_strided((len(flat) - 1, width), (self.split, 1), offset)

    @property
    def _overlaps(self) -> bool:
        return self.taps.shape[1] > self.split

    def forward(self, rows: Tensor) -> Tensor:
        """`[batch, row, channel]`, contiguous, to `[batch, row / stride, out_channel]`."""
        out = rows.new_empty(len(rows), rows.shape[1] // self.stride, len(self.taps))
        flat = out.view(-1, len(self.taps))
        torch.mm(rows.view(-1, self.split), self.taps[:, : self.split].t(), out=flat)
        if self._overlaps:
            flat[:-1].addmm_(self._tails(rows), self.taps[:, self.split :].t())
        return out

    def input_gradient(self, grad: Tensor) -> Tensor:
        """Gradient of the rows, `[batch, row, channel]`."""
        rows = grad.shape[1] * self.stride
        out = grad.new_empty(len(grad), rows, self.weight.shape[1])
        grad = grad.view(-1, len(self.taps))
        torch.mm(grad, self.taps[:, : self.split], out=out.view(-1, self.split))
        if self._overlaps:
            self._tails(out).addmm_(grad[:-1], self.taps[:, self.split :])
        return out

    def weight_gradient(self, grad: Tensor, rows: Tensor) -> Tensor:
        """Gradient of the weight in its shape and dtype."""
        out = torch.empty_like(self.taps)
        grad = grad.view(-1, len(self.taps))
        torch.mm(grad.t(), rows.view(-1, self.split), out=out[:, : self.split])
        if self._overlaps:
            torch.mm(grad[:-1].t(), self._tails(rows), out=out[:, self.split :])
        taps = out.view(len(out), -1, self.weight.shape[1]).transpose(1, 2)
        if taps.dtype == self.weight.dtype and taps.stride() == self.weight.stride():
            return taps
        return torch.empty_like(self.weight).copy_(taps)


class _ActivatedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        x = x.contiguous()
        ctx.stride = stride
        ctx.save_for_backward(x, weight)
        return _Products(weight, stride, x.dtype).forward(torch.ops.aten.gelu(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, products = grad.contiguous(), _Products(weight, ctx.stride, x.dtype)
        weight_gradient = products.weight_gradient(grad, torch.ops.aten.gelu(x))
        result = products.input_gradient(grad)
        torch.ops.aten.gelu_backward(result, x, grad_input=result)
        return result, weight_gradient, None


class _FirstConvolutions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, windows: Tensor, kernels: Tensor, weight: Tensor, stride: int) -> Tensor:
        windows, kernels = windows.contiguous(), kernels.contiguous()
        ctx.stride = stride
        ctx.save_for_backward(windows, kernels, weight)
        products = _Products(weight, stride, windows.dtype)
        return products.forward(_activated_first(windows, kernels))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        windows, kernels, weight = ctx.saved_tensors
        grad, products = grad.contiguous(), _Products(weight, ctx.stride, windows.dtype)
        weight_gradient = products.weight_gradient(grad, _activated_first(windows, kernels))
        slope = products.input_gradient(grad)
        return None, _first_gradient(windows, kernels, slope), weight_gradient, None


def activated_convolution(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolve the GELU of `x` over time, without padding; autograd saves `x` and the weight only.

    Args:
        x: `[batch, row, channel]`; the number of rows is a multiple of `stride`.
        weight: `[out_channel, channel, tap]`, as in `nn.Conv1d`, in any dtype, which its gradient
            has too; stride <= taps <= 2 * stride.
        stride: rows from one window to the next.

    Returns:
        `[batch, row / stride, out_channel]` in the dtype of `x`. Rows whose window contains spare
        rows or reaches into the next crop are spare.
    """
    return _ActivatedConvolution.apply(x, weight, stride)


def first_convolutions(windows: Tensor, kernels: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Apply the first two convolutions and the GELU between them, without saving its input.

    Args:
        windows: `[batch, row, column]`, windows of the waveform for the first convolution.
        kernels: `[batch, column, channel]`, weights of the first convolution for each crop, in any
            dtype.
        weight: `[out_channel, channel, tap]` of the second convolution, in any dtype.
        stride: rows from one window of the second convolution to the next.

    Returns:
        `[batch, row / stride, out_channel]` in the dtype of `windows`.
    """
    return _FirstConvolutions.apply(windows, kernels, weight, stride)
