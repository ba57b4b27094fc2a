"""Dropout in one kernel, and where it is applied, for all kernels that contain one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssl_core.wav2vec2 import packing
from ssl_core.wav2vec2.cuda.hashing import keep_element, site_keys, threshold
from ssl_core.wav2vec2.cuda.launching import blocks, launch
from ssl_core.wav2vec2.keyed_bits import threshold_parts

_BLOCK = 1024


class Drop(NamedTuple):
    """A dropout at one site, for all frames of a batch."""

    seeds: Tensor
    """`[crop]` int64, or `[frame]` if packed."""
    places: Tensor | None
    """`[frame]` int32: number of each frame in its crop; None if not packed."""
    site: int
    rate: float

    @property
    def scale(self) -> float:
        """By which elements that are kept are multiplied."""
        return 1 / (1 - self.rate)

    def numbers(self) -> tuple[int, int, int, float]:
        """Site, the two parts of the threshold, and scale, as kernels take them."""
        return (self.site, *threshold_parts(self.rate), self.scale)


def drop_at(
    seeds: Tensor | None, site: int, rate: float, lengths: Sequence[int] = ()
) -> Drop | None:
    """Where to drop; None for nowhere.

    Args:
        seeds: `[batch]` int64, one per crop; None drops nothing.
        site: number of the dropout's site in the network.
        rate: fraction to drop.
        lengths: frames of each packed crop (see `packing`), else empty.
    """
    if seeds is None or not rate:
        return None
    if not lengths:
        return Drop(seeds, None, site, rate)
    clips = torch.tensor(lengths, device=seeds.device)
    places = [torch.arange(own.stop - own.start) for own in packing.places(lengths)]
    return Drop(
        seeds.repeat_interleave(clips, output_size=sum(lengths)),
        torch.cat(places).to(seeds.device, torch.int32),
        site,
        rate,
    )


@triton.jit
def row_mask(
    rows, columns, frames, width, SEEDS, PLACES, site, whole, chance, PACKED: tl.constexpr
):
    """Which elements are kept, of rows `[row, 1]` of frames and `[1, column]`."""
    if PACKED:
        seed = tl.load(SEEDS + rows)
        place = tl.load(PLACES + rows)
    else:
        seed = tl.load(SEEDS + rows // frames)
        place = rows % frames
    first, second = site_keys(seed, site)
    at = (place * width + columns).to(tl.uint32)
    return keep_element(at, first, second, threshold(first, second, whole, chance))


@triton.jit(do_not_specialize=["frames", "site", "whole", "chance"])
def drop_kernel(
    X, OUT, SEEDS, PLACES, count, frames, width, site, whole, chance, scale,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiply by the mask; `X` and `OUT` are `[row, width]`, contiguous."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row = tl.where(inside, at // width, 0).to(tl.int32)
    column = (at % width).to(tl.int32)
    keep = row_mask(row, column, frames, width, SEEDS, PLACES, site, whole, chance, PACKED)
    x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + at, tl.where(keep, x * scale, 0.0).to(OUT.dtype.element_ty), mask=inside)


def dropped(x: Tensor, where: Drop) -> Tensor:
    """Apply dropout to `[batch, frame, width]`, without a gradient."""
    x = x.contiguous()
    out, count, width = torch.empty_like(x), x.numel(), x[0, 0].numel()
    places = where.seeds if where.places is None else where.places
    launch(
        drop_kernel, (blocks(count, _BLOCK),), x, out, where.seeds, places, count, x.shape[1],
        width, *where.numbers(), PACKED=where.places is not None, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return out


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, where: Drop) -> Tensor:
        ctx.where = where
        return dropped(x, where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return dropped(grad, ctx.where), None


def fused_dropout(x: Tensor, where: Drop) -> Tensor:
    """Apply dropout to `[batch, frame, ...]`; the gradient computes the mask again."""
    out: Tensor = _Dropped.apply(x, where)
    return out
