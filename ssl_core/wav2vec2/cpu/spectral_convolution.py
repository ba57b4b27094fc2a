"""The positional convolution by overlap-save in the frequency domain, for CPUs.

With 128 taps and 48 channels per group, the direct convolution of `base` takes 9.4 MFLOP per frame.
Here crops are cut into overlapping blocks whose spectra are multiplied with those of the taps, for
a tenth of that. The Fourier transforms are short enough to be matrix products, which suit a CPU.
Groups are processed one by one, so that spectra take only a few MiB.

Spectra are real, `[2, bin, ...]`: the cosine and sine sums of a signal.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_core.wav2vec2.cpu.products import multiply
from ssl_core.wav2vec2.operators import operator

LARGEST = 256
"""Maximum transform size in frames, unless there are more than half as many taps."""
STEP = 32
"""Transform sizes are multiples of this."""


class _Transform:
    """Cuts crops into blocks of `size` inputs and `hop` outputs and transforms these."""

    def __init__(self, frames: Sequence[int], weight: Tensor, before: int) -> None:
        """`frames`: frames of each crop; `before`: inputs before a block's first output frame."""
        self.frames, self.before, self.taps = list(frames), before, weight.shape[2]
        largest = max(LARGEST, -(-2 * self.taps // STEP) * STEP)
        self.size = min(largest, -(-(max(frames) + self.taps - 1) // STEP) * STEP)
        self.hop = self.size - self.taps + 1
        self.counts = [-(-own // self.hop) for own in self.frames]
        bins, samples = torch.arange(self.size // 2 + 1), torch.arange(self.size)
        angles = (bins[:, None] * samples % self.size).double() * (2 * math.pi / self.size)
        waves = torch.stack([angles.cos(), angles.sin()])
        scale = torch.full((len(bins), 1), 2 / self.size, dtype=torch.float64)
        scale[0] = scale[-1] = 1 / self.size
        self.analysis = waves.flatten(0, 1).to(weight)
        """Forward transform, `[2 bin, sample]`."""
        self.synthesis = (waves * scale).flatten(0, 1).t().contiguous().to(weight)
        """Inverse transform, `[sample, 2 bin]`."""

    def of_taps(self, weight: Tensor) -> Tensor:
        """Spectra of taps: `[out, in, tap]` to `[2, bin, out, in]`."""
        spectra = multiply(self.analysis[:, : self.taps], weight.flatten(0, 1).t())
        return spectra.view(2, -1, *weight.shape[:2])

    def to_taps(self, spectra: Tensor, out: Tensor) -> None:
        """Inverse transform of `[2, bin, out, in]` into `out`, `[out, in, tap]`."""
        signals = spectra.flatten(0, 1).flatten(1)
        multiply(signals.t(), self.synthesis[: self.taps].t(), out=out.view(-1, self.taps))

    def of_inputs(self, x: Tensor) -> Tensor:
        """Spectra of all crops' input blocks: `[frame, channel]` to `[2, bin, block, channel]`."""
        blocks = []
        for own, count in zip(x.split(self.frames), self.counts, strict=True):
            behind = (count - 1) * self.hop + self.size - self.before - len(own)
            padded = F.pad(own, (0, 0, self.before, max(0, behind)))
            blocks.append(padded.unfold(0, self.size, self.hop)[:count].permute(2, 0, 1))
        return self._spectra(blocks)

    def of_outputs(self, x: Tensor) -> Tensor:
        """Spectra of output blocks, `hop` frames then zeros; shapes as in `of_inputs`."""
        blocks = []
        for own, count in zip(x.split(self.frames), self.counts, strict=True):
            padded = F.pad(own, (0, 0, 0, count * self.hop - len(own)))
            blocks.append(padded.unflatten(0, (count, self.hop)).transpose(0, 1))
        return self._spectra(blocks)

    def to_outputs(self, spectra: Tensor, out: Tensor) -> None:
        """Inverse transform of output blocks `[2, bin, block, channel]` into `[frame, channel]`."""
        for own, blocks in self._crops(spectra, out, self.hop):
            own.copy_(blocks.transpose(0, 1).flatten(0, 1)[: len(own)])

    def to_inputs(self, spectra: Tensor, out: Tensor) -> None:
        """The same for input blocks, which are added where they overlap."""
        for own, blocks in self._crops(spectra, out, self.size):
            summed = own.new_zeros(self.before + len(own) + self.size, own.shape[1])
            for number, block in enumerate(blocks.unbind(1)):
                summed[number * self.hop : number * self.hop + self.size] += block
            own.copy_(summed[self.before : self.before + len(own)])

    def _spectra(self, blocks: list[Tensor]) -> Tensor:
        signals = torch.cat(blocks, 1)
        spectra = multiply(self.analysis[:, : len(signals)], signals.flatten(1))
        return spectra.view(2, -1, *signals.shape[1:])

    def _crops(self, spectra: Tensor, out: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Each crop's part of `out`, and its blocks, `[sample, block, channel]`."""
        signals = multiply(self.synthesis[:size], spectra.flatten(0, 1).flatten(1))
        blocks = signals.view(size, *spectra.shape[2:]).split(self.counts, 1)
        return zip(out.split(self.frames), blocks, strict=True)


def _groups(groups: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views `[frame, channel]` of `[batch, frame, channel]`, one per group of channels."""
    return zip(*(x.flatten(0, 1).chunk(groups, 1) for x in tensors), strict=True)


def _transform(x: Tensor, weight: Tensor, before: int, lengths: Sequence[int]) -> _Transform:
    return _Transform(lengths or [x.shape[1]] * len(x), weight, before)


@operator("positions")
def spectral_convolution(
    x: Tensor, weight: Tensor, before: int, groups: int, lengths: Sequence[int]
) -> Tensor:
    """Grouped convolution over time, zero-padded so that the output is as long as the input.

    Args:
        x: `[batch, frame, channel]`, fp32 or fp64.
        weight: `[channel, channel of the group, tap]`, as in `nn.Conv1d`.
        before: number of taps before the output frame; each crop is padded with as many zeros.
        groups: number of groups of channels.
        lengths: frames of each packed crop (see `packing`), else empty.

    Returns:
        `[batch, frame, channel]`.
    """
    transform, out = _transform(x, weight, before, lengths), torch.empty_like(x)
    for (own, result), taps in zip(_groups(groups, x, out), weight.chunk(groups), strict=True):
        of_taps = transform.of_taps(taps).transpose(2, 3)
        transform.to_outputs(_correlate(transform.of_inputs(own), of_taps), result)
    return out


def _correlate(first: Tensor, second: Tensor) -> Tensor:
    """Spectra of the correlation of two signals, with a matrix product in each bin."""
    return _multiply(first, second, 1)


def _convolve(first: Tensor, second: Tensor) -> Tensor:
    """Spectra of the convolution of two signals, with a matrix product in each bin."""
    return _multiply(first, second, -1)


def _multiply(first: Tensor, second: Tensor, sign: int) -> Tensor:
    (cosines, sines), (of_cosines, of_sines) = first, second
    result = first.new_empty(2, len(cosines), cosines.shape[1], of_cosines.shape[2])
    torch.bmm(cosines, of_cosines, out=result[0]).baddbmm_(sines, of_sines, alpha=sign)
    torch.bmm(sines, of_cosines, out=result[1]).baddbmm_(cosines, of_sines, alpha=-sign)
    return result


@operator("positions_backward")
def _spectral_convolution_backward(
    x: Tensor, weight: Tensor, grad: Tensor, before: int, groups: int, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    transform = _transform(x, weight, before, lengths)
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    for (own, slope, result), taps, grad_taps in zip(
        _groups(groups, x, grad, grad_x), weight.chunk(groups), grad_weight.chunk(groups),
        strict=True,
    ):  # fmt: skip
        slopes = transform.of_outputs(slope)
        transform.to_inputs(_convolve(slopes, transform.of_taps(taps)), result)
        inputs = transform.of_inputs(own)
        # With spectra S and X, the taps' gradient X conj(S) is a correlation of their conjugates.
        slopes[1].neg_()
        inputs[1].neg_()
        transform.to_taps(_correlate(slopes.transpose(2, 3), inputs), grad_taps)
    return grad_x, grad_weight


@spectral_convolution.shapes
def _(x: Tensor, weight: Tensor, before: int, groups: int, lengths: Sequence[int]) -> Tensor:
    return torch.empty_like(x)


@_spectral_convolution_backward.shapes
def _(
    x: Tensor, weight: Tensor, grad: Tensor, before: int, groups: int, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


@spectral_convolution.flops
def _(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """FLOPs of the direct convolution."""
    return 2 * x[0] * x[1] * math.prod(weight)


@_spectral_convolution_backward.flops
def _(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 4 * x[0] * x[1] * math.prod(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.before, ctx.groups, ctx.lengths = inputs
    ctx.save_for_backward(x, weight)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    given = (x, weight, grad.contiguous(), ctx.before, ctx.groups, ctx.lengths)
    return *_spectral_convolution_backward(*given), None, None, None


spectral_convolution.gradient(_gradient, _keep)
