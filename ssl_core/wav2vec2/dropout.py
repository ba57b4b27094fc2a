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


@operator("keep_mask")
def keep_mask(
    seeds: Tensor, site: int, shape: Sequence[int], rate: float, device: torch.device
) -> Tensor:
    """Which elements are kept.

    Args:
        seeds: `[batch]` int64, one for each crop, on the CPU.
        site: tells apart the places of a crop's network.
        shape: of one crop's mask.
        rate: share that is dropped.
        device: of the mask.

    Returns:
        `[batch, *shape]` uint8, 1 where an element is kept.
    """
    mask = torch.empty((len(seeds), *shape), dtype=torch.uint8, device=device)
    count = math.prod(shape)
    rows = mask.view(len(seeds), count)
    kept = rows.numpy().view(bool) if device.type == "cpu" else None
    for number, seed in enumerate(seeds.tolist()):
        source = np.random.SFC64(np.random.SeedSequence([seed, site]))
        threshold = int(rate * 256 + float(source.random_raw()) / 2**64)
        if kept is not None:
            noise = source.random_raw(-(-count // 8)).view(np.uint8)[:count]
            np.greater_equal(noise, threshold, out=kept[number])
        else:
            generator = torch.Generator(device).manual_seed(int(source.random_raw()) >> 2)
            rows[number].random_(0, 256, generator=generator).ge_(threshold)
    return mask


@keep_mask.shapes
def _(seeds: Tensor, site: int, shape: Sequence[int], rate: float, device: torch.device) -> Tensor:
    return torch.empty((len(seeds), *shape), dtype=torch.uint8, device=device)


@operator("drop")
def drop(x: Tensor, seeds: Tensor, site: int, rate: float) -> Tensor:
    """Dropout of `[batch, ...]`; see `keep_mask`."""
    mask = keep_mask(seeds, site, x.shape[1:], rate, x.device)
    return torch.mul(x, mask).mul_(1 / (1 - rate))


@drop.shapes
def _(x: Tensor, seeds: Tensor, site: int, rate: float) -> Tensor:
    return torch.empty_like(x)


def _keep_seeds(ctx: Any, inputs: tuple[Tensor, Tensor, int, float], output: Tensor) -> None:
    _, seeds, ctx.site, ctx.rate = inputs
    ctx.save_for_backward(seeds)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return drop(grad, *ctx.saved_tensors, ctx.site, ctx.rate), None, None, None


drop.gradient(_gradient, _keep_seeds)


class Dropout(nn.Module):
    """Dropout at one site of the network."""

    def __init__(self, rate: float, site: int) -> None:
        super().__init__()
        self.rate, self.site = rate, site

    def forward(self, x: Tensor, seeds: Tensor | None) -> Tensor:
        """`[batch, ...]` to the same; without seeds, as in evaluation, nothing is dropped."""
        if seeds is None or not self.rate:
            return x
        return drop(x, seeds, self.site, self.rate)
