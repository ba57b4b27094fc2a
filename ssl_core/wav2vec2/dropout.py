"""Dropout whose mask follows from the crop's seed and the site in the network.

Masks are not saved: the backward pass draws them again. What is dropped therefore depends neither
on how a batch is split nor on which activations are recomputed, and costs no memory. A mask takes
one random byte per element. The threshold is the rate in 256ths, rounded up or down at random for
each crop and site, so that the probability of dropping an element is exactly the rate. On a CPU the
bytes come from NumPy's SFC64, many times faster than torch's Bernoulli; on a GPU from the device.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl_core.wav2vec2.operators import operator


def _unfilled(
    seeds: Tensor, shape: Sequence[int], device: torch.device, lengths: Sequence[int]
) -> Tensor:
    return torch.empty((1 if lengths else len(seeds), *shape), dtype=torch.uint8, device=device)


@operator("keep_mask")
def keep_mask(
    seeds: Tensor, site: int, shape: Sequence[int], rate: float, device: torch.device,
    lengths: Sequence[int],
) -> Tensor:  # fmt: skip
    """Draw dropout masks.

    Args:
        seeds: `[batch]` int64 on the CPU, one per crop.
        site: number of the dropout's site in the network.
        shape: shape of a crop's mask; of all crops together if they are packed.
        rate: fraction to drop.
        device: where to put the mask.
        lengths: frames of each packed crop, `shape[0]` in total (see `packing`), else empty.

    Returns:
        `[batch, *shape]` uint8, or `[1, *shape]` if packed; 1 where an element is kept.
    """
    mask = _unfilled(seeds, shape, device, lengths)
    width = math.prod(shape[1:])
    sizes = [own * width for own in lengths or [shape[0]] * len(seeds)]
    for row, seed in zip(mask.view(-1).split(sizes), seeds.tolist(), strict=True):
        source = np.random.SFC64(np.random.SeedSequence([seed, site]))
        threshold = int(rate * 256 + float(source.random_raw()) / 2**64)
        if device.type == "cpu":
            noise = source.random_raw(-(-len(row) // 8)).view(np.uint8)[: len(row)]
            np.greater_equal(noise, threshold, out=row.numpy().view(bool))
        else:
            generator = torch.Generator(device).manual_seed(int(source.random_raw()) >> 2)
            row.random_(0, 256, generator=generator).ge_(threshold)
    return mask


@keep_mask.shapes
def _(
    seeds: Tensor, site: int, shape: Sequence[int], rate: float, device: torch.device,
    lengths: Sequence[int],
) -> Tensor:  # fmt: skip
    return _unfilled(seeds, shape, device, lengths)


@operator("drop")
def drop(x: Tensor, seeds: Tensor, site: int, rate: float, lengths: Sequence[int]) -> Tensor:
    """Apply dropout.

    Args:
        x: `[batch, frame, ...]`, or `[1, frame, ...]` if packed.
        seeds: `[batch]` int64 on the CPU, one per crop.
        site: number of the dropout's site in the network.
        rate: fraction to drop.
        lengths: frames of each packed crop (see `packing`), else empty.

    Returns:
        The same shape as `x`.
    """
    mask = keep_mask(seeds, site, x.shape[1:], rate, x.device, lengths)
    return torch.mul(x, mask).mul_(1 / (1 - rate))


@drop.shapes
def _(x: Tensor, seeds: Tensor, site: int, rate: float, lengths: Sequence[int]) -> Tensor:
    return torch.empty_like(x)


def _keep_seeds(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seeds, ctx.site, ctx.rate, ctx.lengths = inputs
    ctx.save_for_backward(seeds)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dropped = drop(grad, *ctx.saved_tensors, ctx.site, ctx.rate, ctx.lengths)
    return dropped, None, None, None, None


drop.gradient(_gradient, _keep_seeds)


class Dropout(nn.Module):
    """Dropout at one site of the network."""

    def __init__(self, rate: float, site: int) -> None:
        super().__init__()
        self.rate, self.site = rate, site

    def forward(self, x: Tensor, seeds: Tensor | None, lengths: Sequence[int] = ()) -> Tensor:
        """Apply dropout.

        Args:
            x: `[batch, frame, ...]`, or `[1, frame, ...]` if packed.
            seeds: `[batch]` int64 on the CPU, one per crop; None, as in evaluation, drops nothing.
            lengths: frames of each packed crop (see `packing`), else empty.

        Returns:
            The same shape as `x`.
        """
        if seeds is None or not self.rate:
            return x
        return drop(x, seeds, self.site, self.rate, lengths)
