"""Dropout whose mask follows from a crop's seed and a place in the network, and is never kept.

The backward pass makes the mask again. What is dropped therefore depends neither on how a batch is
split nor on which activations are kept, and costs no memory. A mask takes one random byte an
element: the threshold is the rate in 256ths, rounded up or down at random for every crop and
place, so that an element's chance of being dropped is the rate exactly. On a CPU the bytes are
NumPy's SFC64, many times faster than torch's Bernoulli; on a GPU they are the device's own.
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
    """Which elements are kept.

    Args:
        seeds: `[batch]` int64, one for each crop, on the CPU.
        site: tells apart the places of a crop's network.
        shape: of one crop's mask.
        rate: share that is dropped.
        device: of the mask.
        lengths: of the crops where they are packed (see `packing`), `shape[0]` in all; none: every
            crop is of that shape.

    Returns:
        `[batch, *shape]` uint8, or packed `[1, *shape]`; 1 where an element is kept.
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
    """Dropout of `[batch, ...]`, or packed `[1, ...]`; see `keep_mask`."""
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
        """`[batch, ...]` to the same; without seeds, as in evaluation, nothing is dropped.

        `lengths`: of the crops if they are packed, see `packing`.
        """
        if seeds is None or not self.rate:
            return x
        return drop(x, seeds, self.site, self.rate, lengths)
