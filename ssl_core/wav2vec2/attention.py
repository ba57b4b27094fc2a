"""Self-attention within each crop, with dropout of the attention weights."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_core.wav2vec2 import packing
from ssl_core.wav2vec2.cpu.block_attention import attention_with_dropout, by_head
from ssl_core.wav2vec2.device_kernels import fused


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
    """Scaled dot-product attention within each crop.

    Args:
        query: `[batch, query frame, hidden]`.
        key: `[batch, frame, hidden]`.
        value: `[batch, frame, hidden]`.
        heads: number of heads, a divisor of the hidden size.
        rate: dropout rate of the attention weights.
        seeds: `[batch]` int64, one per crop; None, as in evaluation, drops nothing.
        site: number of the dropout's site in the network.
        keep: save attention weights and dropout masks instead of computing them again.
        lengths: frames of each packed crop (see `packing`), else empty; if packed, all frames are
            query frames.

    Returns:
        `[batch, query frame, hidden]`.
    """
    if fused(query):
        from ssl_core.wav2vec2.cuda.fused_attention import fused_attention

        return fused_attention(
            query, key, value, heads=heads, rate=rate, seeds=seeds, site=site, lengths=lengths
        )
    if seeds is not None and rate:
        given = (query, key, value, seeds, site, heads, rate, keep, lengths)
        out: Tensor = attention_with_dropout(*given)[0]
        return out
    q, k, v = (by_head(x, heads) for x in (query, key, value))
    if not lengths:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    alone = [
        F.scaled_dot_product_attention(q[:, :, own], k[:, :, own], v[:, :, own])
        for own in packing.places(lengths)
    ]
    return torch.cat(alone, 2).transpose(1, 2).flatten(2)


def self_attention(
    projected: Tensor, *, heads: int, rate: float, seeds: Tensor | None, site: int
) -> Tensor:
    """Scaled dot-product attention of all frames of each crop.

    Args:
        projected: queries, keys and values, `[batch, frame, 3 hidden]`.
        heads: number of heads, a divisor of the hidden size.
        rate: dropout rate of the attention weights.
        seeds: `[batch]` int64, one per crop; None, as in evaluation, drops nothing.
        site: number of the dropout's site in the network.

    Returns:
        `[batch, frame, hidden]`.
    """
    if fused(projected):
        from ssl_core.wav2vec2.cuda.fused_attention import fused_self_attention

        return fused_self_attention(projected, heads=heads, rate=rate, seeds=seeds, site=site)
    query, key, value = projected.chunk(3, -1)
    return attention(query, key, value, heads=heads, rate=rate, seeds=seeds, site=site)
