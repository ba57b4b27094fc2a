"""Gumbel noise and negatives from the crops' seeds, in one kernel each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssl_core.wav2vec2.cuda.hashing import hashed, site_keys
from ssl_core.wav2vec2.cuda.launching import blocks, launch

_BLOCK = 1024


@triton.jit(do_not_specialize=["site"])
def noise_kernel(SEEDS, OUT, count, site, BLOCK: tl.constexpr):
    """Some of the `count` numbers of one crop a program."""
    crop = tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first, second = site_keys(tl.load(SEEDS + crop), site)
    uniform = ((hashed(place.to(tl.uint32), first, second) >> 8).to(tl.float32) + 0.5) / 16777216.0
    noise = -tl.log(-tl.log(uniform))
    tl.store(OUT + crop.to(tl.int64) * count + place, noise, mask=place < count)


@triton.jit(do_not_specialize=["site"])
def negatives_kernel(SEEDS, COUNTS, own, pool, negatives, site, BLOCK: tl.constexpr):
    """Draw the negatives of one masked frame a program, and count them: exact in any order."""
    row = tl.program_id(0)
    number = tl.arange(0, BLOCK)
    first, second = site_keys(tl.load(SEEDS + row // own), site)
    place = (row % own) * negatives + number
    bits = (hashed(place.to(tl.uint32), first, second) >> 8).to(tl.int64)
    drawn = (bits * (pool - 1)) >> 24
    drawn += (drawn >= row % pool).to(tl.int64)
    ones = tl.full([BLOCK], 1.0, tl.float32)
    tl.atomic_add(COUNTS + row.to(tl.int64) * pool + drawn, ones, mask=number < negatives)


def gumbel_noise(seeds: Tensor, site: int, count: int) -> Tensor:
    """Standard Gumbel noise, from seeds `[batch]` int64: `[batch, count]` fp32."""
    out = torch.empty(len(seeds), count, device=seeds.device)
    launch(
        noise_kernel, (blocks(count, _BLOCK), len(seeds)), seeds, out, count, site,
        BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return out


def sample_negatives(seeds: Tensor, site: int, pools: int, masked: int, negatives: int) -> Tensor:
    """See `contrastive.sample_negatives`.

    Args:
        seeds: `[batch]` int64.
        site: number of the draws' site.
        pools: number of crops, or 1.
        masked: masked frames in a pool.
        negatives: for each of them.

    Returns:
        `[pool, masked, masked]` fp32.
    """
    counts = torch.zeros(pools, masked, masked, device=seeds.device)
    launch(
        negatives_kernel, (pools * masked,), seeds, counts, pools * masked // len(seeds), masked,
        negatives, site, BLOCK=triton.next_power_of_2(negatives), num_warps=4,
    )  # fmt: skip
    return counts
