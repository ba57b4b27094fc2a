"""The wide grouped convolution of positions by way of spectra, for CPUs.

With 128 taps and 48 channels a group, a convolution of `base` is 9.4 MFLOP a frame. Here crops are
cut into blocks with the frames around them (overlap-save), the blocks' spectra multiplied with
those of the taps: a tenth of that. The transforms are short enough to be matrix products, which a
CPU does best. Groups are taken one after the other, so that spectra never take more than some MiB.

Spectra are real: the sums over a signal times cosines and times sines, `[2, bin, ...]`.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_core.wav2vec2.operators import operator

LARGEST = 256
"""Samples of a transform, unless there are more than half as many taps."""
STEP = 32
"""Sizes of transforms are multiples of it."""


class _Transform:
    """How the frames of crops are cut and transformed: blocks of `hop` outputs, `size` inputs."""

    def __init__(self, frames: Sequence[int], weight: Tensor, before: int) -> None:
        """`frames`: of each crop; `before`: inputs before a block's first output."""
        self.frames, self.before, self.taps = list(frames), before, weight.shape[2]
        largest = max(LARGEST, -(-2 * self.taps // STEP) * STEP)
        self.size = min(largest, -(-(max(frames) + self.taps - 1) // STEP) * STEP)
        self.hop = self.size - self.taps + 1
        self.counts = [-(-own // self.hop) for own in self.frames]
        bins, samples = torch.arange(self.size // 2 + 1), torch.arange(self.size)
        angles = (bins[:, None] * samples % self.size).double() * (2 * math.pi / self.size)
        waves = torch.stack([angles.cos(), angles.sin()])
        shares = torch.full((len(bins), 1), 2 / self.size, dtype=torch.float64)
        shares[0] = shares[-1] = 1 / self.size
        self.analysis = waves.flatten(0, 1).to(weight)
        """`[2 bin, sample]`."""
        self.synthesis = (waves * shares).flatten(0, 1).t().contiguous().to(weight)
        """`[sample, 2 bin]`."""

    def of_taps(self, weight: Tensor) -> Tensor:
        """`[out, in, tap]` to `[2, bin, out, in]`."""
        spectra = self.analysis[:, : self.taps] @ weight.flatten(0, 1).t()
        return spectra.view(2, -1, *weight.shape[:2])

    def to_taps(self, spectra: Tensor, out: Tensor) -> None:
        """Write the other way round."""
        signals = spectra.flatten(0, 1).flatten(1)
        torch.mm(signals.t(), self.synthesis[: self.taps].t(), out=out.view(-1, self.taps))

    def of_inputs(self, x: Tensor) -> Tensor:
        """`[frame, channel]` of all crops to `[2, bin, block, channel]`."""
        blocks = []
        for own, count in zip(x.split(self.frames), self.counts, strict=True):
            behind = (count - 1) * self.hop + self.size - self.before - len(own)
            padded = F.pad(own, (0, 0, self.before, max(0, behind)))
            blocks.append(padded.unfold(0, self.size, self.hop)[:count].permute(2, 0, 1))
        return self._spectra(blocks)

    def of_outputs(self, x: Tensor) -> Tensor:
        """The same of blocks of outputs: `hop` frames, and zeros behind them."""
        blocks = []
        for own, count in zip(x.split(self.frames), self.counts, strict=True):
            padded = F.pad(own, (0, 0, 0, count * self.hop - len(own)))
            blocks.append(padded.unflatten(0, (count, self.hop)).transpose(0, 1))
        return self._spectra(blocks)

    def to_outputs(self, spectra: Tensor, out: Tensor) -> None:
        """Write `[2, bin, block, channel]` of blocks of outputs to `[frame, channel]`."""
        for own, blocks in self._crops(spectra, out, self.hop):
            own.copy_(blocks.transpose(0, 1).flatten(0, 1)[: len(own)])

    def to_inputs(self, spectra: Tensor, out: Tensor) -> None:
        """Write the sum of blocks of inputs, which overlap, to `[frame, channel]`."""
        for own, blocks in self._crops(spectra, out, self.size):
            summed = own.new_zeros(self.before + len(own) + self.size, own.shape[1])
            for number, block in enumerate(blocks.unbind(1)):
                summed[number * self.hop : number * self.hop + self.size] += block
            own.copy_(summed[self.before : self.before + len(own)])

    def _spectra(self, blocks: list[Tensor]) -> Tensor:
        signals = torch.cat(blocks, 1)
        spectra = self.analysis[:, : len(signals)] @ signals.flatten(1)
        return spectra.view(2, -1, *signals.shape[1:])

    def _crops(self, spectra: Tensor, out: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The frames of each crop and its blocks, `[sample, block, channel]`."""
        signals = self.synthesis[:size] @ spectra.flatten(0, 1).flatten(1)
        blocks = signals.view(size, *spectra.shape[2:]).split(self.counts, 1)
        return zip(out.split(self.frames), blocks, strict=True)


def _groups(groups: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Of `[batch, frame, channel]` every group's channels in turn, `[frame, channel]` views."""
    return zip(*(x.flatten(0, 1).chunk(groups, 1) for x in tensors), strict=True)


def _transform(x: Tensor, weight: Tensor, before: int, lengths: Sequence[int]) -> _Transform:
    return _Transform(lengths or [x.shape[1]] * len(x), weight, before)


@operator("positions")
def positions(
    x: Tensor, weight: Tensor, before: int, groups: int, lengths: Sequence[int]
) -> Tensor:
    """A grouped convolution over time, as long as its input.

    Args:
        x: `[batch, frame, channel]`, fp32 or fp64.
        weight: `[channel, channel of the group, tap]`, as in `nn.Conv1d`.
        before: how many of the taps stand before the frame of the output. Beyond the ends of a crop
            there are zeros.
        groups: of channels.
        lengths: of packed crops, see `packing`.

    Returns:
        `[batch, frame, channel]`.
    """
    transform, out = _transform(x, weight, before, lengths), torch.empty_like(x)
    for (own, result), taps in zip(_groups(groups, x, out), weight.chunk(groups), strict=True):
        of_taps = transform.of_taps(taps).transpose(2, 3)
        transform.to_outputs(_correlate(transform.of_inputs(own), of_taps), result)
    return out


def _correlate(first: Tensor, second: Tensor) -> Tensor:
    """Spectra of the correlation of two: for each bin, the first's matrix times the second's."""
    return _multiply(first, second, 1)


def _convolve(first: Tensor, second: Tensor) -> Tensor:
    """The same of the convolution."""
    return _multiply(first, second, -1)


def _multiply(first: Tensor, second: Tensor, sign: int) -> Tensor:
    (cosines, sines), (of_cosines, of_sines) = first, second
    result = first.new_empty(2, len(cosines), cosines.shape[1], of_cosines.shape[2])
    torch.bmm(cosines, of_cosines, out=result[0]).baddbmm_(sines, of_sines, alpha=sign)
    torch.bmm(sines, of_cosines, out=result[1]).baddbmm_(cosines, of_sines, alpha=-sign)
    return result


@operator("positions_backward")
def _positions_backward(
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
        # A correlation the other way round has the sines' sign the other way round.
        slopes[1].neg_()
        inputs[1].neg_()
        transform.to_taps(_correlate(slopes.transpose(2, 3), inputs), grad_taps)
    return grad_x, grad_weight


@positions.shapes
def _(x: Tensor, weight: Tensor, before: int, groups: int, lengths: Sequence[int]) -> Tensor:
    return torch.empty_like(x)


@_positions_backward.shapes
def _(
    x: Tensor, weight: Tensor, grad: Tensor, before: int, groups: int, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


@positions.flops
def _(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Those of the convolution that it is."""
    return 2 * x[0] * x[1] * math.prod(weight)


@_positions_backward.flops
def _(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 4 * x[0] * x[1] * math.prod(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.before, ctx.groups, ctx.lengths = inputs
    ctx.save_for_backward(x, weight)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    given = (x, weight, grad.contiguous(), ctx.before, ctx.groups, ctx.lengths)
    return *_positions_backward(*given), None, None, None


positions.gradient(_gradient, _keep)
