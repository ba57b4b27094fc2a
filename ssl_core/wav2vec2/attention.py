"""Self-attention with dropout, without keeping the frame by frame matrices.

torch's own attention is lean as long as nothing is dropped; on a CPU its dropout falls back to a
path that keeps several matrices of frames by frames for every head. Here scores, softmax and mask
are made a few heads at a time and again in the backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_core.wav2vec2.dropout import keep_mask
from ssl_core.wav2vec2.operators import operator

BLOCK = 2**21
"""Elements of the matrices of frames by frames that are made at a time."""


def _blocks(
    crops: int, heads: int, wanted: int, frames: int, lengths: Sequence[int]
) -> list[tuple[slice, slice, slice, slice]]:
    """Ranges of crops, heads, query frames and frames whose matrices are made together.

    Clips of different lengths are taken alone, so that padding is neither looked at nor drawn for.
    """
    if lengths:
        return [
            (slice(crop, crop + 1), some, slice(0, own), slice(0, own))
            for crop, own in enumerate(lengths)
            for _, some, _, _ in _blocks(1, heads, own, own, ())
        ]
    rows, columns = slice(0, wanted), slice(0, frames)
    together = max(1, BLOCK // (wanted * frames))
    if together >= heads:
        step, every = together // heads, slice(0, heads)
        return [(slice(at, at + step), every, rows, columns) for at in range(0, crops, step)]
    return [
        (slice(crop, crop + 1), slice(first, first + together), rows, columns)
        for crop in range(crops)
        for first in range(0, heads, together)
    ]


def _by_head(x: Tensor, heads: int) -> Tensor:
    """`[crop, frame, hidden]` as `[crop, head, frame, width]`, a view."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _probabilities(query: Tensor, key: Tensor) -> Tensor:
    """`[crop, head, frame, width]` each, to `[crop, head, query frame, key frame]`."""
    return torch.softmax(query @ key.transpose(2, 3), dim=-1)


@operator("attention")
def dropping_attention(
    query: Tensor, key: Tensor, value: Tensor, seeds: Tensor, site: int, heads: int, rate: float,
    keep: bool, lengths: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Scaled dot-product attention with dropout of the attention weights.

    Args:
        query: `[batch, query frame, hidden]`.
        key: `[batch, frame, hidden]`.
        value: the same.
        seeds: `[batch]`, for `keep_mask`.
        site: for `keep_mask`.
        heads: the hidden size is divided into so many.
        rate: of the dropout.
        keep: return the weights before dropout and the mask, for the backward pass.
        lengths: frames of each crop, the rest being padding, whose result is zero; none: all.

    Returns:
        `[batch, query frame, hidden]`, then weights and mask, `[batch, head, query frame, frame]`
        or empty.
    """
    out = torch.zeros_like(query) if lengths else torch.empty_like(query)
    kept = (len(query), heads, query.shape[1], key.shape[1]) if keep else (0,)
    all_weights, all_masks = query.new_empty(kept), query.new_empty(kept, dtype=torch.uint8)
    q, k, v, o = (_by_head(x, heads) for x in (query, key, value, out))
    scale = q.shape[-1] ** -0.5
    blocks = _blocks(len(query), heads, query.shape[1], key.shape[1], lengths)
    for crops, some, rows, columns in blocks:
        at_row, at = (crops, some, rows), (crops, some, columns)
        shape = (heads, rows.stop, columns.stop)
        mask = keep_mask(seeds[crops], site, shape, rate, query.device)[:, some]
        weights = _probabilities(q[at_row] * scale, k[at].contiguous())
        if keep:
            square = (crops, some, rows, columns)
            all_weights[square], all_masks[square] = weights, mask
        o[at_row] = weights.mul_(mask) @ (v[at] / (1 - rate))
    return out, all_weights, all_masks


@operator("attention_backward")
def _dropping_attention_backward(
    query: Tensor, key: Tensor, value: Tensor, all_weights: Tensor, all_masks: Tensor,
    grad: Tensor, seeds: Tensor, site: int, heads: int, rate: float, lengths: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    make = torch.zeros_like if lengths else torch.empty_like
    grads = make(query), make(key), make(value)
    q, k, v, g = (_by_head(x, heads) for x in (query, key, value, grad))
    grad_q, grad_k, grad_v = (_by_head(x, heads) for x in grads)
    scale = q.shape[-1] ** -0.5
    blocks = _blocks(len(query), heads, query.shape[1], key.shape[1], lengths)
    for crops, some, rows, columns in blocks:
        at_row, at = (crops, some, rows), (crops, some, columns)
        some_q, some_k = q[at_row] * scale, k[at].contiguous()
        if len(all_weights):
            square = (crops, some, rows, columns)
            weights, mask = all_weights[square], all_masks[square]
        else:
            weights = _probabilities(some_q, some_k)
            shape = (heads, rows.stop, columns.stop)
            mask = keep_mask(seeds[crops], site, shape, rate, query.device)[:, some]
        out = g[at_row] / (1 - rate)
        grad_v[at] = torch.mul(weights, mask).transpose(2, 3) @ out
        slope = (out @ v[at].contiguous().transpose(2, 3)).mul_(mask)
        slope = torch.ops.aten._softmax_backward_data(slope, weights, -1, weights.dtype)
        grad_q[at_row] = slope @ some_k.mul_(scale)
        grad_k[at] = slope.transpose(2, 3) @ some_q
    return grads


@dropping_attention.shapes
def _(
    query: Tensor, key: Tensor, value: Tensor, seeds: Tensor, site: int, heads: int, rate: float,
    keep: bool, lengths: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kept = (len(query), heads, query.shape[1], key.shape[1]) if keep else (0,)
    return (
        torch.empty_like(query), query.new_empty(kept), query.new_empty(kept, dtype=torch.uint8)
    )  # fmt: skip


@_dropping_attention_backward.shapes
def _(
    query: Tensor, key: Tensor, value: Tensor, all_weights: Tensor, all_masks: Tensor,
    grad: Tensor, seeds: Tensor, site: int, heads: int, rate: float, lengths: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _pairs(query: Any, key: Any, lengths: Sequence[int]) -> int:
    """Pairs of frames, summed over crops."""
    return sum(n * n for n in lengths) if lengths else query[0] * query[1] * int(key[1])


@dropping_attention.flops
def _(query: Any, key: Any, *others: Any, out_shape: Any = None, **__: Any) -> int:
    return 4 * query[2] * _pairs(query, key, others[-1])


@_dropping_attention_backward.flops
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
    grads = _dropping_attention_backward(
        *tensors, grad.contiguous(), seeds, ctx.site, ctx.heads, ctx.rate, ctx.lengths
    )
    return *grads, None, None, None, None, None, None


dropping_attention.gradient(_gradient, _keep)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    rate: float,
    seeds: Tensor | None,
    site: int,
    keep: bool = False,
    lengths: Sequence[int] = (),
) -> Tensor:
    """Scaled dot-product attention; without seeds, as in evaluation, nothing is dropped.

    Args:
        query: `[batch, query frame, hidden]`.
        key: `[batch, frame, hidden]`.
        value: the same.
        heads: the hidden size is divided into so many.
        rate: of the dropout of attention weights.
        seeds: `[batch]`, for `keep_mask`.
        site: for `keep_mask`.
        keep: keep the weights of frames by frames for the backward pass.
        lengths: frames of each crop, the rest being padding; none: all. With it a query is wanted
            for every frame.

    Returns:
        `[batch, query frame, hidden]`; zero where there is padding.
    """
    if seeds is not None and rate:
        given = (query, key, value, seeds, site, heads, rate, keep, lengths)
        out: Tensor = dropping_attention(*given)[0]
        return out
    q, k, v = (_by_head(x, heads) for x in (query, key, value))
    if not lengths:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    alone = [
        F.scaled_dot_product_attention(
            q[crop : crop + 1, :, :own], k[crop : crop + 1, :, :own], v[crop : crop + 1, :, :own]
        )
        for crop, own in enumerate(lengths)
    ]
    padded = [
        F.pad(x.transpose(1, 2).flatten(2), (0, 0, 0, q.shape[2] - x.shape[2])) for x in alone
    ]
    return torch.cat(padded)
