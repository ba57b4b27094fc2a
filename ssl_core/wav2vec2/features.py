"""The feature extractor: seven strided convolutions from samples to 20 ms frames.

Activations are `[batch, row, channel]`, the layout that the transformer wants. Each crop has a few
spare rows behind its frames, so that every layer has exactly `stride` times as many rows as the
next one: see `strided_convolution`. Spare rows hold numbers that nothing reads.

Each layer takes and returns pre-activations, and saves only these for the backward pass. The first
layer's, half of all activations, are not saved either where the norm is a group norm. Mean and
variance of a channel follow from the covariance of the waveform's windows, 10 x 10 numbers, so that
convolution and norm are one matrix product with weights scaled for each crop. To repeat it is
cheaper than to read its result from memory.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.cpu import strided_convolution
from ssl_core.wav2vec2.device_kernels import fused
from ssl_core.wav2vec2.precision import compute_dtype

WINDOW = 16
"""A window's columns (samples, then a one for the bias) are zero-padded to a multiple of this."""


def normalised(waveforms: Tensor) -> Tensor:
    """Bring each waveform `[..., sample]` to mean 0 and variance 1, as transformers does."""
    variance, mean = torch.var_mean(waveforms, -1, correction=0, keepdim=True)
    return (waveforms - mean) / (variance + 1e-7).sqrt()


COVARIANCE = 64
"""Windows whose products a GPU sums at a time."""


def activated_convolution(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """See `strided_convolution.activated_convolution`; `[batch, row, channel]`, on any device."""
    if fused(x):
        from ssl_core.wav2vec2.cuda import extractor

        return extractor.activated_convolution(x, weight, stride)
    convolved: Tensor = strided_convolution.activated_convolution(x, weight, stride)
    return convolved


def first_convolutions(windows: Tensor, kernels: Tensor, weight: Tensor, stride: int) -> Tensor:
    """See `strided_convolution.first_convolutions`, on any device.

    Args:
        windows: `[batch, row, column]`.
        kernels: `[batch, column, channel]`.
        weight: `[out_channel, channel, tap]`.
        stride: rows from one window to the next.

    Returns:
        `[batch, row / stride, out_channel]`.
    """
    if fused(windows):
        from ssl_core.wav2vec2.cuda import extractor

        return extractor.first_convolutions(windows, kernels, weight, stride)
    convolved: Tensor = strided_convolution.first_convolutions(windows, kernels, weight, stride)
    return convolved


def _covariance(wide: Tensor) -> Tensor:
    """Mean of the windows' outer products: `[batch, window, tap]` to `[batch, tap, tap]`."""
    batch, count, taps = wide.shape
    if not fused(wide):
        return wide.transpose(1, 2) @ wide / count
    # A GPU sums short products side by side: one long one would keep a single processor busy.
    parts = F.pad(wide, (0, 0, 0, -count % COVARIANCE)).view(-1, COVARIANCE, taps)
    return torch.bmm(parts.transpose(1, 2), parts).view(batch, -1, taps, taps).sum(1) / count


class ConvolutionLayer(nn.Module):
    """A convolution and its norm, if it has one; the next layer applies the GELU."""

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
        """Add the bias and apply the layer norm, if any; `[batch, row, channel]` in and out."""
        if self.conv.bias is not None:
            x = x + self.conv.bias.to(x.dtype)
        return self.layer_norm(x).to(x.dtype) if self.layer_norm is not None else x

    def forward(self, x: Tensor) -> Tensor:
        """Pre-activations `[batch, row, channel]` in, `[batch, row / stride, out_channel]` out."""
        return self.finish(activated_convolution(x, self.conv.weight, self.conv.stride[0]))

    def normed_kernels(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Fold the group norm, over time with one group per channel, into the first convolution.

        With mean m and covariance S of a crop's windows, the output of a channel with taps w has
        variance w' S w; normed, it is gain * w' (window - m) / sqrt(w' S w + eps) + bias. It is
        thus independent of the waveform's scale. Sums are in fp64: neighbouring samples are so
        similar that S is nearly singular.

        Args:
            windows: `[batch, frame, tap]`.

        Returns:
            The centred windows, `[batch, frame, tap]`, and the taps for each crop,
            `[batch, tap + 1, channel]`; the last tap is the norm's bias, for a column of ones. The
            convolution's own bias cancels in the norm.
        """
        norm = self.layer_norm
        assert isinstance(norm, nn.GroupNorm)
        wide = windows.double()  # (N, T, K)
        wide = wide - wide.mean(1, keepdim=True)
        covariance = _covariance(wide)  # (N, K, K)
        taps = self.conv.weight[:, 0].double()  # (C, K)
        variance = torch.einsum("bij,ci,cj->bc", covariance, taps, taps)  # (N, C)
        scale = torch.rsqrt(variance + norm.eps) * norm.weight
        kernels = (taps * scale[:, :, None]).transpose(1, 2)  # (N, K, C)
        bias = norm.bias.expand(len(kernels), 1, -1)
        if self.conv.bias is not None:
            bias = bias + 0 * self.conv.bias  # its gradient is zero, not None
        return wide.to(windows.dtype), torch.cat([kernels.to(bias.dtype), bias], 1)


class FeatureExtractor(nn.Module):
    """All convolution layers, from waveforms to features."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kernel, self.stride = config.conv_kernel, config.conv_stride
        self.conv_layers = nn.ModuleList(
            ConvolutionLayer(config, index) for index in range(len(config.conv_dim))
        )

    def rows(self, samples: int) -> tuple[int, int, int]:
        """Frames of the first layer, frames of the last, and rows of the first with spare ones."""
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
