"""Self-attention with dropout, in blocks, without saving frame by frame matrices.

torch's own attention saves no such matrices either, unless it has dropout on a CPU; then it saves
several for each head. Here scores, softmax and dropout mask are computed for a few heads at a time,
and again in the backward pass.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_core.wav2vec2 import packing
from ssl_core.wav2vec2.keyed_bits import keep_pairs, site_keys
from ssl_core.wav2vec2.operators import operator

BLOCK = 2**21
"""Elements of the score matrices computed at a time."""


@operator("attention_mask")
def attention_mask(
    seeds: Tensor, site: int, heads: int, first: int, last: int, sides: Sequence[int], rate: float
) -> Tensor:
    """Draw dropout masks of attention weights.

    Args:
        seeds: `[batch]` int64, one per crop.
        site: number of the dropout's site in the network.
        heads: number of heads.
        first: first head whose mask is wanted.
        last: head after the last; more than there are for all that follow.
        sides: query frames and frames.
        rate: fraction to drop.

    Returns:
        `[batch, head, query frame, frame]` uint8; 1 where a weight is kept.
    """
    rows, columns = sides
    kept = keep_pairs(site_keys(seeds, site), heads, slice(first, last), (rows, columns), rate)
    return kept.view(torch.uint8)


@attention_mask.shapes
def _(
    seeds: Tensor, site: int, heads: int, first: int, last: int, sides: Sequence[int], rate: float
) -> Tensor:
    shape = (len(seeds), min(last, heads) - first, *sides)
    return torch.empty(shape, dtype=torch.uint8, device=seeds.device)


class _Block(NamedTuple):
    """Some heads of some crops, whose score matrices are computed together."""

    crops: slice
    """Indices of the crops' seeds."""
    batch: slice
    """Indices of the crops in the batch: those of `crops`, or 0 if packed."""
    heads: slice
    rows: slice
    """Query frames."""
    columns: slice
    """Key frames."""
    first: int
    """Offset of the crops' matrices in the flat tensor of all crops' and heads' matrices."""

    def at(self, x: Tensor, frames: slice) -> Tensor:
        """The block's part of `[batch, head, frame, width]`, a view."""
        return x[self.batch, self.heads, frames]

    def mask(self, seeds: Tensor, site: int, heads: int, rate: float) -> Tensor:
        """Dropout masks, `[crop, head, query frame, frame]` uint8."""
        return attention_mask(
            seeds[self.crops], site, heads, self.heads.start, self.heads.stop, self._sides, rate
        )

    def of(self, matrices: Tensor, heads: int) -> Tensor:
        """The block's part of flat matrices, `[crop, head, query frame, frame]`, a view."""
        shape = (self.crops.stop - self.crops.start, heads, *self._sides)
        own = matrices[self.first : self.first + math.prod(shape)]
        return own.view(shape)[:, self.heads]

    @property
    def _sides(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


def _blocks(query: Tensor, key: Tensor, heads: int, lengths: Sequence[int]) -> Iterator[_Block]:
    """Divide a batch into blocks of at most `BLOCK` matrix elements, or of one head if larger."""
    first = 0
    if lengths:
        for crop, frames in enumerate(packing.places(lengths)):
            own = frames.stop - frames.start
            for _, some in _portions(1, heads, own * own):
                crops = slice(crop, crop + 1)
                yield _Block(crops, slice(0, 1), some, frames, frames, first)
            first += heads * own * own
        return
    wanted, frames_of_key = query.shape[1], key.shape[1]
    if query.device.type == "cuda":  # which has no cache to fit and wants few, large products
        everything = slice(0, len(query))
        rows, columns = slice(0, wanted), slice(0, frames_of_key)
        yield _Block(everything, everything, slice(0, heads), rows, columns, 0)
        return
    for crops, some in _portions(len(query), heads, wanted * frames_of_key):
        first = crops.start * heads * wanted * frames_of_key
        yield _Block(crops, crops, some, slice(0, wanted), slice(0, frames_of_key), first)


def _portions(crops: int, heads: int, matrix: int) -> Iterator[tuple[slice, slice]]:
    """Slices of crops and heads whose matrices, of `matrix` elements each, fit in `BLOCK`."""
    together = max(1, BLOCK // matrix)
    if together >= heads:
        step = together // heads
        for at in range(0, crops, step):
            yield slice(at, min(crops, at + step)), slice(0, heads)
        return
    for crop in range(crops):
        for at in range(0, heads, together):
            yield slice(crop, crop + 1), slice(at, at + together)


def by_head(x: Tensor, heads: int) -> Tensor:
    """`[crop, frame, hidden]` as `[crop, head, frame, width]`, a view."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _probabilities(query: Tensor, key: Tensor) -> Tensor:
    """`[crop, head, frame, width]` each to `[crop, head, query frame, frame]`."""
    return torch.softmax(query @ key.transpose(2, 3), dim=-1)


@operator("attention")
def attention_with_dropout(
    query: Tensor, key: Tensor, value: Tensor, seeds: Tensor, site: int, heads: int, rate: float,
    keep: bool, lengths: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Scaled dot-product attention with dropout of the attention weights.

    Args:
        query: `[batch, query frame, hidden]`.
        key: `[batch, frame, hidden]`.
        value: `[batch, frame, hidden]`.
        seeds: `[batch]` int64, one per crop, for the dropout.
        site: number of the dropout's site in the network.
        heads: number of heads, a divisor of the hidden size.
        rate: dropout rate.
        keep: whether to return weights and masks, for the backward pass.
        lengths: frames of each packed crop (see `packing`), else empty; if packed, all frames are
            query frames.

    Returns:
        The output, `[batch, query frame, hidden]`; weights before dropout and dropout masks, flat:
        `[matrix element]` of all crops' and heads' matrices, or empty.
    """
    out = torch.empty_like(query)
    kept = heads * _pairs(query.shape, key.shape, lengths) if keep else 0
    all_weights, all_masks = query.new_empty(kept), query.new_empty(kept, dtype=torch.uint8)
    q, k, v, o = (by_head(x, heads) for x in (query, key, value, out))
    scale = q.shape[-1] ** -0.5
    for block in _blocks(query, key, heads, lengths):
        rows, columns = block.rows, block.columns
        mask = block.mask(seeds, site, heads, rate)
        weights = _probabilities(block.at(q, rows) * scale, block.at(k, columns).contiguous())
        if keep:
            block.of(all_weights, heads).copy_(weights)
            block.of(all_masks, heads).copy_(mask)
        block.at(o, rows).copy_(weights.mul_(mask) @ (block.at(v, columns) / (1 - rate)))
    return out, all_weights, all_masks


@operator("attention_backward")
def _attention_with_dropout_backward(
    query: Tensor, key: Tensor, value: Tensor, all_weights: Tensor, all_masks: Tensor,
    grad: Tensor, seeds: Tensor, site: int, heads: int, rate: float, lengths: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    q, k, v, g = (by_head(x, heads) for x in (query, key, value, grad))
    grad_q, grad_k, grad_v = (by_head(x, heads) for x in grads)
    scale = q.shape[-1] ** -0.5
    for block in _blocks(query, key, heads, lengths):
        rows, columns = block.rows, block.columns
        some_q, some_k = block.at(q, rows) * scale, block.at(k, columns).contiguous()
        if len(all_weights):
            weights, mask = block.of(all_weights, heads), block.of(all_masks, heads)
        else:
            weights = _probabilities(some_q, some_k)
            mask = block.mask(seeds, site, heads, rate)
        out = block.at(g, rows) / (1 - rate)
        block.at(grad_v, columns).copy_(torch.mul(weights, mask).transpose(2, 3) @ out)
        slope = (out @ block.at(v, columns).contiguous().transpose(2, 3)).mul_(mask)
        slope = torch.ops.aten._softmax_backward_data(slope, weights, -1, weights.dtype)
        block.at(grad_q, rows).copy_(slope @ some_k.mul_(scale))
        block.at(grad_k, columns).copy_(slope.transpose(2, 3) @ some_q)
    return grads


@attention_with_dropout.shapes
def _(
    query: Tensor, key: Tensor, value: Tensor, seeds: Tensor, site: int, heads: int, rate: float,
    keep: bool, lengths: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kept = heads * _pairs(query.shape, key.shape, lengths) if keep else 0
    return (
        torch.empty_like(query), query.new_empty(kept), query.new_empty(kept, dtype=torch.uint8)
    )  # fmt: skip


@_attention_with_dropout_backward.shapes
def _(
    query: Tensor, key: Tensor, value: Tensor, all_weights: Tensor, all_masks: Tensor,
    grad: Tensor, seeds: Tensor, site: int, heads: int, rate: float, lengths: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _pairs(query: Any, key: Any, lengths: Sequence[int]) -> int:
    """Number of pairs of query frame and frame, over all crops."""
    return sum(n * n for n in lengths) if lengths else query[0] * query[1] * int(key[1])


@attention_with_dropout.flops
def _(query: Any, key: Any, *others: Any, out_shape: Any = None, **__: Any) -> int:
    return 4 * query[2] * _pairs(query, key, others[-1])


@_attention_with_dropout_backward.flops
def _(
    query: Any, key: Any, value: Any, weights: Any, *others: Any, out_shape: Any = None, **__: Any
) -> int:
    return (8 if weights[0] else 10) * query[2] * _pairs(query, key, others[-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, seeds, ctx.site, ctx.heads, ctx.rate, _, ctx.lengths = inputs
    ctx.save_for_backward(query, key, value, *output[1:], seeds)
    ctx.mark_non_differentiable(*output[1:])


def _gradient(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seeds = ctx.saved_tensors
    grads = _attention_with_dropout_backward(
        *tensors, grad.contiguous(), seeds, ctx.site, ctx.heads, ctx.rate, ctx.lengths
    )
    return *grads, None, None, None, None, None, None


attention_with_dropout.gradient(_gradient, _keep)
