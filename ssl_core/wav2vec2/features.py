"""The feature extractor: seven strided convolutions from samples to 20 ms frames, time-major.

Activations are `[batch, frame, channel]` throughout, so that a strided convolution is one or two
matrix products on views of its input, without a patch copy, and its output is already in the
layout that the transformer wants.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.precision import at_least_fp32, in_dtype


def _windows(x: Tensor, kernel: int, stride: int) -> tuple[Tensor, Tensor | None]:
    """Two views of `x` whose rows are the inputs of each output frame.

    `x`: `[batch, time, channel]`, contiguous; stride <= kernel <= 2 * stride. The first view holds
    taps 0 to stride - 1, `[batch, frame, stride * channel]`, the second the remaining taps or None.
    """
    frames = (x.shape[1] - kernel) // stride + 1
    head = x.unfold(1, stride, stride)[:, :frames].transpose(2, 3).flatten(2)
    if kernel == stride:
        return head, None
    return head, x[:, stride:].unfold(1, kernel - stride, stride).transpose(2, 3).flatten(2)


class _StridedConvolution(torch.autograd.Function):
    """A convolution over time as matrix products; keeps its input and weight, nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        x = x.contiguous()
        out_channels, channels, kernel = weight.shape
        taps = weight.permute(2, 1, 0).reshape(kernel * channels, out_channels)  # (K * C, O)
        head, tail = _windows(x, kernel, stride)
        split = stride * channels
        out = torch.matmul(head, taps[:split])
        if tail is not None:
            out = torch.baddbmm(out, tail, taps[split:].expand(len(x), -1, -1))
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        stride = ctx.stride
        out_channels, channels, kernel = weight.shape
        batch = len(x)
        grad = grad.contiguous()
        frames = grad.shape[1]
        head, tail = _windows(x, kernel, stride)
        split = stride * channels
        parts = [torch.bmm(head.transpose(1, 2), grad).sum(0)]
        if tail is not None:
            parts.append(torch.bmm(tail.transpose(1, 2), grad).sum(0))
        grad_weight = torch.cat(parts).view(kernel, channels, out_channels).permute(2, 1, 0)
        taps = weight.permute(2, 0, 1)  # (K, O, C)
        grad_x = x.new_zeros(x.shape)
        covered = grad_x[:, : frames * stride].view(batch, frames, split)
        covered.copy_(
            torch.matmul(grad, taps[:stride].permute(1, 0, 2).reshape(out_channels, split))
        )
        if tail is not None:
            rest = taps[stride:].permute(1, 0, 2).reshape(out_channels, -1)
            part = torch.matmul(grad, rest).unflatten(2, (kernel - stride, channels))
            inner = grad_x[:, stride : frames * stride].unflatten(1, (frames - 1, stride))
            inner[:, :, : kernel - stride] += part[:, :-1]
            grad_x[:, frames * stride : (frames - 1) * stride + kernel] += part[:, -1]
        return grad_x, grad_weight, None


def strided_convolution(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolve over time without padding.

    Args:
        x: `[batch, time, channel]`.
        weight: `[out_channel, channel, tap]`, as in `nn.Conv1d`.
        stride: time steps between output frames.

    Returns:
        `[batch, frame, out_channel]` with frame = (time - taps) // stride + 1.
    """
    kernel = weight.shape[2]
    if x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if x.shape[2] == 1:
        return F.linear(x[:, :, 0].unfold(1, kernel, stride), weight[:, 0])
    if not stride <= kernel <= 2 * stride:
        return F.conv1d(x.transpose(1, 2), weight, stride=stride).transpose(1, 2)
    with torch.autocast(x.device.type, enabled=False):
        return _StridedConvolution.apply(x, weight, stride)


class _TimeNormGelu(torch.autograd.Function):
    """Normalisation over time and GELU; keeps its input and the two statistics, nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        variance, mean = torch.var_mean(
            at_least_fp32(x), dim=1, correction=0, keepdim=True
        )  # (N, 1, C)
        inverse = torch.rsqrt(variance + eps)
        scale = inverse * weight
        shift = bias - mean * scale
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        return in_dtype(F.gelu(torch.addcmul(shift, at_least_fp32(x), scale)), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias, mean, inverse = ctx.saved_tensors
        dtype = x.dtype
        x = at_least_fp32(x)
        scale = inverse * weight
        normed = torch.addcmul(bias - mean * scale, x, scale)
        grad = torch.ops.aten.gelu_backward(at_least_fp32(grad), normed)
        total = grad.sum(1, keepdim=True)
        slope = inverse * ((grad * x).sum(1, keepdim=True) - mean * total)
        mix = scale * inverse * slope / x.shape[1]
        constant = mix * mean - scale * total / x.shape[1]
        grad_x = torch.addcmul(torch.addcmul(constant, x, mix, value=-1), grad, scale)
        return in_dtype(grad_x, dtype), slope.sum((0, 1)), total.sum((0, 1)), None


class TimeNormGelu(nn.GroupNorm):
    """Group norm with one group a channel, over time, then GELU.

    A crop's gain therefore does not matter, and a batch must not be padded.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, time, channel]` to the same."""
        return _TimeNormGelu.apply(x, self.weight, self.bias, self.eps)


class ConvolutionLayer(nn.Module):
    """Convolution, normalisation where the layer has one, GELU."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        inputs = config.conv_dim[index - 1] if index else 1
        outputs = config.conv_dim[index]
        self.stride = config.conv_stride[index]
        self.conv = nn.Conv1d(
            inputs, outputs, config.conv_kernel[index], self.stride, bias=config.conv_bias
        )
        self.layer_norm: nn.Module | None = None
        if config.feat_extract_norm == "layer":
            self.layer_norm = nn.LayerNorm(outputs)
        elif index == 0:
            self.layer_norm = TimeNormGelu(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, time, channel]` to `[batch, frame, out_channel]`."""
        x = strided_convolution(x, self.conv.weight, self.stride)
        if self.conv.bias is not None:
            x = x + self.conv.bias.to(x.dtype)
        if isinstance(self.layer_norm, TimeNormGelu):
            return self.layer_norm(x)
        return F.gelu(x if self.layer_norm is None else self.layer_norm(x))


class FeatureExtractor(nn.Module):
    """All convolution layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.conv_layers = nn.ModuleList(
            ConvolutionLayer(config, index) for index in range(len(config.conv_dim))
        )

    def forward(self, waveforms: Tensor) -> Tensor:
        """`[batch, sample]` to `[batch, frame, channel]`."""
        x = waveforms[:, :, None]
        for layer in self.conv_layers:
            x = layer(x)
        return x
