"""Strided convolutions as matrix products on views of their input, without copying patches.

Inputs and outputs are `[batch, row, channel]`, a row being a time step of one crop, and an input
has `stride` times as many rows as its output. A window of `stride <= taps <= 2 * stride` rows is
then a *head*, its first `stride` rows, and a *tail*, the other `taps - stride`, which are the first
rows of the next window. All heads of a batch are one view, all tails another: a convolution is one
or two matrix products.

The GELU before a convolution is applied block by block, where its result is multiplied. Autograd
saves the pre-activation only, and the backward pass repeats the GELU.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_core.wav2vec2.cpu.products import add_product, multiply
from ssl_core.wav2vec2.operators import operator

BLOCK = 2048
"""Output rows computed at a time."""


class _Products:
    """The matrix products of one strided convolution, called for one block of windows at a time."""

    def __init__(self, weight: Tensor, stride: int, dtype: torch.dtype) -> None:
        """`weight`: `[out_channel, channel, tap]`; stride <= taps <= 2 * stride."""
        self.shape, self.stride = weight.shape, stride
        self.overlap = weight.shape[2] - stride
        taps = weight.permute(2, 1, 0).to(dtype)  # (K, C, O)
        self.head = taps[:stride].reshape(-1, len(weight))
        self.tail = taps[stride:].reshape(-1, len(weight))
        # Transposed, because products with the gradient on the left are faster.
        self.head_gradient = torch.zeros_like(self.head.t(), dtype=weight.dtype)
        self.tail_gradient = torch.zeros_like(self.tail.t(), dtype=weight.dtype)

    def spans(self, windows: int, rows: int) -> list[tuple[int, int, int, int]]:
        """Blocks of windows as (first window, end window, first row, end row)."""
        # A GPU has no cache to fit, and wants few, large products.
        block = windows if self.head.device.type == "cuda" else BLOCK
        return [
            (
                first,
                min(first + block, windows),
                first * self.stride,
                min(min(first + block, windows) * self.stride + self.overlap, rows),
            )
            for first in range(0, windows, block)
        ]

    def _views(self, rows: Tensor, windows: int) -> tuple[Tensor, Tensor]:
        """Heads, `[window, stride * channel]`, and tails, `[window, overlap * channel]`, as views.

        The last window, a spare one, has no tail where that would reach beyond the last row.
        """
        channels = rows.shape[1]
        whole = min(windows, (len(rows) - self.overlap) // self.stride)
        step = self.stride * channels
        head = rows[: windows * self.stride].view(windows, step)
        offset = rows.storage_offset() + step
        return head, rows.as_strided((whole, self.overlap * channels), (step, 1), offset)

    def forward(self, rows: Tensor, out: Tensor) -> None:
        """Convolve `[row, channel]` into `out`, `[window, out_channel]`."""
        head, tail = self._views(rows, len(out))
        multiply(head, self.head, out=out)
        if self.overlap:
            add_product(out[: len(tail)], tail, self.tail)

    def backward(self, rows: Tensor, grad: Tensor, out: Tensor) -> None:
        """Add to the weight's gradient; write that of `rows` to `out`.

        `rows` and `out` are `[row, channel]`, `grad` is `[window, out_channel]`.
        """
        out[len(grad) * self.stride :] = 0
        head, tail = self._views(rows, len(grad))
        head_out, tail_out = self._views(out, len(grad))
        self.head_gradient += multiply(grad.t(), head)
        multiply(grad, self.head.t(), out=head_out)
        if self.overlap:
            grad = grad[: len(tail)]
            self.tail_gradient += multiply(grad.t(), tail)
            add_product(tail_out, grad, self.tail.t())

    def weight_gradient(self) -> Tensor:
        """The sum over all blocks, `[out_channel, channel, tap]`."""
        out, channels, kernel = self.shape
        taps = torch.cat([self.head_gradient, self.tail_gradient], 1).view(out, kernel, channels)
        return taps.transpose(1, 2).contiguous()


@operator("activated_convolution")
def activated_convolution(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolve the GELU of `x` over time, without padding; autograd saves `x` and the weight only.

    Args:
        x: `[batch, row, channel]`; the number of rows is a multiple of `stride`.
        weight: `[out_channel, channel, tap]`, as in `nn.Conv1d`; stride <= taps <= 2 * stride.
        stride: rows from one window to the next.

    Returns:
        `[batch, row / stride, out_channel]` in the dtype of `x`. Rows whose window contains spare
        rows or reaches into the next crop are spare.
    """
    flat = x.flatten(0, 1)
    out = x.new_empty(x.shape[0], x.shape[1] // stride, len(weight))
    outputs, products = out.flatten(0, 1), _Products(weight, stride, x.dtype)
    for first, last, low, high in products.spans(len(outputs), len(flat)):
        products.forward(F.gelu(flat[low:high]), outputs[first:last])
    return out


@operator("activated_convolution_backward")
def _activated_convolution_backward(
    x: Tensor, weight: Tensor, grad: Tensor, stride: int
) -> tuple[Tensor, Tensor]:
    flat, grad = x.flatten(0, 1), grad.contiguous().flatten(0, 1)
    products = _Products(weight, stride, x.dtype)
    grad_x = torch.empty_like(x)
    result, done = grad_x.flatten(0, 1), 0
    for first, last, low, high in products.spans(len(grad), len(flat)):
        # Blocks overlap in a few rows, which already hold the gradient from the block before.
        overlap, rows = result[low:done].clone(), result[low:high]
        products.backward(F.gelu(flat[low:high]), grad[first:last], rows)
        torch.ops.aten.gelu_backward(rows, flat[low:high], grad_input=rows)
        rows[: len(overlap)] += overlap
        done = high
    return grad_x, products.weight_gradient()


@operator("first_convolutions")
def first_convolutions(windows: Tensor, kernels: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Apply the first two convolutions and the GELU between them, without saving its input.

    Args:
        windows: `[batch, row, column]`, windows of the waveform for the first convolution.
        kernels: `[batch, column, channel]`, weights of the first convolution for each crop.
        weight: `[out_channel, channel, tap]` of the second convolution.
        stride: rows from one window of the second convolution to the next.

    Returns:
        `[batch, row / stride, out_channel]` in the dtype of `windows`.
    """
    out = windows.new_empty(len(windows), windows.shape[1] // stride, len(weight))
    products = _Products(weight, stride, windows.dtype)
    for crop, kernel, outputs in zip(windows, kernels, out, strict=True):
        for first, last, low, high in products.spans(len(outputs), len(crop)):
            rows = multiply(crop[low:high], kernel.to(crop.dtype))
            products.forward(torch.ops.aten.gelu_(rows), outputs[first:last])
    return out


@operator("first_convolutions_backward")
def _first_convolutions_backward(
    windows: Tensor, kernels: Tensor, weight: Tensor, grad: Tensor, stride: int
) -> tuple[Tensor, Tensor]:
    products = _Products(weight, stride, windows.dtype)
    grad_kernels = torch.zeros_like(kernels)
    for crop, kernel, grad_kernel, outputs in zip(
        windows, kernels, grad_kernels, grad.contiguous(), strict=True
    ):
        for first, last, low, high in products.spans(len(outputs), len(crop)):
            before = multiply(crop[low:high], kernel.to(crop.dtype))
            rows = torch.empty_like(before)
            products.backward(F.gelu(before), outputs[first:last], rows)
            torch.ops.aten.gelu_backward(rows, before, grad_input=rows)
            grad_kernel += multiply(crop[low:high].t(), rows)
    return grad_kernels, products.weight_gradient()


@activated_convolution.shapes
@first_convolutions.shapes
def _(x: Tensor, *parts: Tensor | int) -> Tensor:
    weight, stride = parts[-2], parts[-1]
    assert isinstance(weight, Tensor)
    assert isinstance(stride, int)
    return x.new_empty(x.shape[0], x.shape[1] // stride, len(weight))


@_activated_convolution_backward.shapes
def _(x: Tensor, weight: Tensor, grad: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


@_first_convolutions_backward.shapes
def _(
    windows: Tensor, kernels: Tensor, weight: Tensor, grad: Tensor, stride: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(kernels), torch.empty_like(weight)


def _convolution_flops(outputs: tuple[int, ...], weight: tuple[int, ...], times: int) -> int:
    return 2 * times * outputs[0] * outputs[1] * math.prod(weight)


@activated_convolution.flops
def _(x: Any, weight: Any, stride: int, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return _convolution_flops((x[0], x[1] // stride), weight, 1)


@_activated_convolution_backward.flops
def _(
    x: Any, weight: Any, grad: Any, stride: int, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return _convolution_flops(grad, weight, 2)


@first_convolutions.flops
def _(
    windows: Any, kernels: Any, weight: Any, stride: int, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    first = 2 * windows[1] * math.prod(kernels)
    return first + _convolution_flops((windows[0], windows[1] // stride), weight, 1)


@_first_convolutions_backward.flops
def _(
    windows: Any, kernels: Any, weight: Any, grad: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return 4 * windows[1] * math.prod(kernels) + _convolution_flops(grad, weight, 2)


def _keep_convolution(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.stride = inputs
    ctx.save_for_backward(*tensors)


def _convolution_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight = ctx.saved_tensors
    return *_activated_convolution_backward(x, weight, grad, ctx.stride), None


def _first_gradient(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, None]:
    windows, kernels, weight = ctx.saved_tensors
    return None, *_first_convolutions_backward(windows, kernels, weight, grad, ctx.stride), None


activated_convolution.gradient(_convolution_gradient, _keep_convolution)
first_convolutions.gradient(_first_gradient, _keep_convolution)
