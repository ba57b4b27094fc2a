"""The feature extractor: seven strided convolutions from samples to 20 ms frames, time-major.

Activations are `[batch, row, channel]`, with a few spare rows behind the frames of every crop, so
many that the rows of a layer are exactly `stride` times those of the next. A strided convolution
of the whole batch is then one or two plain matrix products on views of its input: no patches are
copied, and the output has the layout that the transformer wants. Spare rows hold numbers that
nothing reads.

A layer keeps what goes *into* its GELU and no more: the GELU is taken again, a block of rows at a
time, wherever its result is multiplied. The first layer, half of all activations, is not kept
at all: its group norm is known from the covariance of the waveform's windows, 10 x 10 numbers, so
that convolution and norm are one matrix product with weights scaled for each crop, and it is
cheaper to take that again than to read it back.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.operators import operator
from ssl_core.wav2vec2.precision import compute_dtype

BLOCK = 2048
"""Rows of output that are made at a time."""

WINDOW = 16
"""Columns of a window of samples: its taps, a one, and zeros up to a width that aligns well."""


class _Products:
    """A strided convolution's matrix products, on blocks of rows of any number of windows."""

    def __init__(self, weight: Tensor, stride: int, dtype: torch.dtype) -> None:
        """`weight`: `[out_channel, channel, tap]`; stride <= taps <= 2 * stride."""
        self.shape, self.stride = weight.shape, stride
        self.rest = weight.shape[2] - stride
        taps = weight.permute(2, 1, 0).to(dtype)  # (K, C, O)
        self.head = taps[:stride].reshape(-1, len(weight))
        self.tail = taps[stride:].reshape(-1, len(weight))
        # Transposed: products with the gradient on the left are faster.
        self.head_grad = torch.zeros_like(self.head.t(), dtype=weight.dtype)
        self.tail_grad = torch.zeros_like(self.tail.t(), dtype=weight.dtype)

    def spans(self, windows: int, rows: int) -> list[tuple[int, int, int, int]]:
        """Blocks: (first window, last window, first row, last row), ends excluded."""
        return [
            (
                first,
                min(first + BLOCK, windows),
                first * self.stride,
                min(min(first + BLOCK, windows) * self.stride + self.rest, rows),
            )
            for first in range(0, windows, BLOCK)
        ]

    def _views(self, rows: Tensor, windows: int) -> tuple[Tensor, Tensor]:
        """The first `stride` rows of every window, and the rest of those that have one.

        The last window of all is spare where it would reach beyond the last row.
        """
        channels = rows.shape[1]
        whole = min(windows, (len(rows) - self.rest) // self.stride)
        step = self.stride * channels
        head = rows[: windows * self.stride].view(windows, step)
        offset = rows.storage_offset() + step
        return head, rows.as_strided((whole, self.rest * channels), (step, 1), offset)

    def forward(self, rows: Tensor, out: Tensor) -> None:
        """`[row, channel]` to `out`, `[window, out_channel]`."""
        head, tail = self._views(rows, len(out))
        torch.mm(head, self.head, out=out)
        if self.rest:
            out[: len(tail)].addmm_(tail, self.tail)

    def backward(self, rows: Tensor, grad: Tensor, out: Tensor) -> None:
        """Add to the weight's gradient; that of `rows` goes to `out`, of the same shape."""
        out[len(grad) * self.stride :] = 0
        head, tail = self._views(rows, len(grad))
        head_out, tail_out = self._views(out, len(grad))
        self.head_grad += torch.mm(grad.t(), head)
        torch.mm(grad, self.head.t(), out=head_out)
        if self.rest:
            grad = grad[: len(tail)]
            self.tail_grad += torch.mm(grad.t(), tail)
            tail_out.addmm_(grad, self.tail.t())

    def weight_gradient(self) -> Tensor:
        """`[out_channel, channel, tap]`."""
        out, channels, kernel = self.shape
        taps = torch.cat([self.head_grad, self.tail_grad], 1).view(out, kernel, channels)
        return taps.transpose(1, 2).contiguous()


@operator("activated_convolution")
def activated_convolution(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolve the GELU of `x` over time, without padding; keeps `x`, nothing else.

    Args:
        x: `[batch, row, channel]`, rows a multiple of the stride.
        weight: `[out_channel, channel, tap]`, as in `nn.Conv1d`; stride <= taps <= 2 * stride.
        stride: rows between windows.

    Returns:
        `[batch, row / stride, out_channel]` in the dtype of `x`. Where a crop's rows are spare,
        or its last windows reach into the next crop, the result means nothing.
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
        # The windows of two blocks share a few rows; the block before has its part of them there.
        shared, rows = result[low:done].clone(), result[low:high]
        products.backward(F.gelu(flat[low:high]), grad[first:last], rows)
        torch.ops.aten.gelu_backward(rows, flat[low:high], grad_input=rows)
        rows[: len(shared)] += shared
        done = high
    return grad_x, products.weight_gradient()


@operator("first_convolutions")
def first_convolutions(windows: Tensor, kernels: Tensor, weight: Tensor, stride: int) -> Tensor:
    """The second convolution of the GELU of the first, which is never kept.

    Args:
        windows: `[batch, row, column]`, the waveform's windows.
        kernels: `[batch, column, channel]`, the first convolution's weights for each crop.
        weight: `[out_channel, channel, tap]` of the second convolution.
        stride: of the second convolution.

    Returns:
        `[batch, row / stride, out_channel]` in the dtype of `windows`.
    """
    out = windows.new_empty(len(windows), windows.shape[1] // stride, len(weight))
    products = _Products(weight, stride, windows.dtype)
    for crop, kernel, outputs in zip(windows, kernels, out, strict=True):
        for first, last, low, high in products.spans(len(outputs), len(crop)):
            rows = torch.mm(crop[low:high], kernel.to(crop.dtype))
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
            before = torch.mm(crop[low:high], kernel.to(crop.dtype))
            rows = torch.empty_like(before)
            products.backward(F.gelu(before), outputs[first:last], rows)
            torch.ops.aten.gelu_backward(rows, before, grad_input=rows)
            grad_kernel += torch.mm(crop[low:high].t(), rows)
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


class ConvolutionLayer(nn.Module):
    """A convolution and, where the layer has one, its norm; the GELU after it is left to others."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        inputs = config.conv_dim[index - 1] if index else 1
        outputs = config.conv_dim[index]
        self.conv = nn.Conv1d(
            inputs,
            outputs,
            config.conv_kernel[index],
            config.conv_stride[index],
            bias=config.conv_bias,
        )
        self.layer_norm: nn.Module | None = None
        if config.feat_extract_norm == "layer":
            self.layer_norm = nn.LayerNorm(outputs)
        elif index == 0:
            self.layer_norm = nn.GroupNorm(outputs, outputs)

    def finish(self, x: Tensor) -> Tensor:
        """Bias and layer norm of `[batch, row, channel]`."""
        if self.conv.bias is not None:
            x = x + self.conv.bias.to(x.dtype)
        return self.layer_norm(x).to(x.dtype) if self.layer_norm is not None else x

    def forward(self, x: Tensor) -> Tensor:
        """What goes into the GELU before, `[batch, row, channel]`, to what goes into that after."""
        return self.finish(activated_convolution(x, self.conv.weight, self.conv.stride[0]))

    def normed_kernels(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Group norm with one group a channel, over time, folded into the first convolution.

        With mean m and covariance S of a crop's windows, a channel with taps w has the variance
        w' S w; its normed output is gain * w' (window - m) / sqrt(w' S w + eps) + bias. A crop's
        gain therefore does not matter. Sums are in fp64: neighbouring samples are so alike that S
        is nearly singular.

        Args:
            windows: `[batch, frame, tap]`.

        Returns:
            The centred windows, and the taps for each crop, `[batch, tap + 1, channel]`, whose
            last belongs to a column of ones. What the convolution's own bias adds, the norm takes
            away.
        """
        norm = self.layer_norm
        assert isinstance(norm, nn.GroupNorm)
        wide = windows.double()
        wide = wide - wide.mean(1, keepdim=True)
        covariance = wide.transpose(1, 2) @ wide / wide.shape[1]
        taps = self.conv.weight[:, 0].double()  # (C, K)
        variance = torch.einsum("bij,ci,cj->bc", covariance, taps, taps)
        scale = torch.rsqrt(variance + norm.eps) * norm.weight
        kernels = (taps * scale[:, :, None]).transpose(1, 2)  # (N, K, C)
        bias = norm.bias.expand(len(kernels), 1, -1)
        if self.conv.bias is not None:
            bias = bias + 0 * self.conv.bias
        return wide.to(windows.dtype), torch.cat([kernels.to(bias.dtype), bias], 1)


class FeatureExtractor(nn.Module):
    """All convolution layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kernel, self.stride = config.conv_kernel, config.conv_stride
        self.conv_layers = nn.ModuleList(
            ConvolutionLayer(config, index) for index in range(len(config.conv_dim))
        )

    def rows(self, samples: int) -> tuple[int, int, int]:
        """Frames of the first and the last layer, and rows of the first, spare ones included."""
        frames = [samples]
        for kernel, stride in zip(self.kernel, self.stride, strict=True):
            frames.append((frames[-1] - kernel) // stride + 1)
        first, *later = frames[1:]
        reach = [math.prod(self.stride[1 : index + 1]) for index in range(len(self.stride))]
        last = max(-(-n * r // reach[-1]) for n, r in zip((first, *later), reach, strict=True))
        return first, frames[-1], last * reach[-1]

    def forward(self, waveforms: Tensor) -> Tensor:
        """`[batch, sample]` to `[batch, frame, channel]`."""
        first, second, *others = self.conv_layers
        assert isinstance(first, ConvolutionLayer)
        assert isinstance(second, ConvolutionLayer)
        dtype = compute_dtype(waveforms)
        valid, frames, rows = self.rows(waveforms.shape[1])
        windows = waveforms.unfold(1, self.kernel[0], self.stride[0])  # (N, T, K)
        spare = (0, 0, 0, rows - valid)
        if isinstance(first.layer_norm, nn.GroupNorm):
            windows, kernels = first.normed_kernels(windows)
            width = -(-kernels.shape[1] // WINDOW) * WINDOW
            windows = F.pad(F.pad(windows, (0, 1), value=1.0), (0, width - kernels.shape[1]))
            kernels = F.pad(kernels, (0, 0, 0, width - kernels.shape[1]))
            x = first_convolutions(
                F.pad(windows.to(dtype), spare), kernels, second.conv.weight, self.stride[1]
            )
            x = second.finish(x)
        else:
            x = first.finish(F.linear(windows.to(dtype), first.conv.weight[:, 0].to(dtype)))
            x = second(F.pad(x, spare))
        for layer in others:
            x = layer(x)
        return F.gelu(x[:, :frames])
