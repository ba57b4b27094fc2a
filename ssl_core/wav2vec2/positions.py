"""The positional convolution of the context network."""

import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ssl_core.wav2vec2 import packing
from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.cpu.spectral_convolution import spectral_convolution
from ssl_core.wav2vec2.device_kernels import fused
from ssl_core.wav2vec2.precision import compute_dtype

SPECTRA_FROM = 256
"""Frames in a batch from which the spectral convolution is faster on a CPU than the direct one."""

NARROW = 16
"""Channels in a group below which oneDNN's bf16 convolution of many taps is wrong on processors
with AMX (torch 2.11, `findings/amx_grouped_convolution.sh`); such groups are convolved in fp32."""


class PositionalConvolution(nn.Module):
    """A wide grouped convolution and GELU, whose output is added to the input as position."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        taps = config.num_conv_pos_embeddings
        conv = nn.Conv1d(
            config.hidden_size,
            config.hidden_size,
            taps,
            padding=taps // 2,
            groups=config.num_conv_pos_embedding_groups,
        )
        self.conv: nn.Conv1d = parametrizations.weight_norm(conv, dim=2)

    def forward(self, x: Tensor, lengths: Sequence[int] = ()) -> Tensor:
        """Positional embeddings of `[batch, frame, hidden]`, in the same shape.

        `lengths`: frames of each packed crop (see `packing`), else empty.
        """
        weight = self.conv.weight
        many = x.shape[0] * x.shape[1] >= SPECTRA_FROM
        on_cpu = x.device.type == "cpu" and not fused(x)
        if many and on_cpu and compute_dtype(x).itemsize >= 4:
            taps, before = self._reaching(weight, max(lengths or x.shape[1:2]))
            mixed = spectral_convolution(x, taps, before, self.conv.groups, lengths)
            return F.gelu(mixed if self.conv.bias is None else mixed + self.conv.bias)
        if not lengths:
            return self._convolved(x, weight)
        alone = [self._convolved(own[None], weight) for own in packing.split(x, lengths)]
        return torch.cat(alone, 1)

    def _reaching(self, weight: Tensor, frames: int) -> tuple[Tensor, int]:
        """The taps that connect any of `frames` frames, and how many are before the middle."""
        middle = weight.shape[2] // 2
        first = max(0, middle - frames + 1)
        return weight[:, :, first : middle + frames], middle - first

    def _convolved(self, x: Tensor, weight: Tensor) -> Tensor:
        if fused(x):
            from ssl_core.wav2vec2.cuda.grouped_convolution import grouped_convolution

            mixed = grouped_convolution(x.to(compute_dtype(x)), weight, self.conv.groups)
            return F.gelu(
                mixed if self.conv.bias is None else mixed + self.conv.bias.to(mixed.dtype)
            )
        taps, before = self._reaching(weight, x.shape[1])
        narrow = x.device.type == "cpu" and weight.shape[1] < NARROW
        with torch.autocast("cpu", enabled=False) if narrow else contextlib.nullcontext():
            mixed = F.conv1d(
                x.transpose(1, 2).to(taps.dtype if narrow else x.dtype),
                taps,
                self.conv.bias,
                padding=before,
                groups=self.conv.groups,
            )
        return F.gelu(mixed[:, :, : x.shape[1]]).transpose(1, 2)
