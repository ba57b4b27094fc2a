"""Attention with dropout on a GPU, without frame by frame matrices in memory.

The forward pass is one kernel, the backward pass two, for each clip if clips are packed. No sum
depends on the order in which programs finish.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssl_core.wav2vec2 import packing
from ssl_core.wav2vec2.cuda import attention_kernels as kernels
from ssl_core.wav2vec2.cuda.launching import blocks, launch
from ssl_core.wav2vec2.keyed_bits import threshold_parts

_SMALLEST = 16
"""Least width of a tile that tensor cores multiply."""


class _Tiles(NamedTuple):
    """How a kernel divides its work."""

    rows: int
    """Query frames in a tile, a power of two."""
    size: int
    """Key frames in a tile, a power of two, at least 32."""
    warps: int
    stages: int
    """Tiles of the inner loop in flight."""
    registers: int | None = None
    """Most that a thread may have, where that lets another program fit on a multiprocessor."""

    def launching(self) -> dict[str, int]:
        most = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **most}


class _Settings(NamedTuple):
    """What a call of attention is given beside tensors."""

    heads: int
    rate: float
    """0 without seeds."""
    site: int
    lengths: tuple[int, ...]


def _tiles(kernel: str, query: Tensor) -> _Tiles:
    """Sizes by kernel: `forward`, `query` or `key`.

    Chosen by registers, spills and instructions as compiled for sm_90: two to four programs, of 8
    to 16 warps in all, fit on a multiprocessor. A tile of `forward` has whole tiles of the others:
    they read what it saved of each query frame.
    """
    if query.dtype == torch.float32:
        return _Tiles(32, 32, 8 if kernel == "query" else 4, 1)
    if kernel == "forward" and query.shape[1] > 64:
        return _Tiles(128, 64, 8, 3)
    return _Tiles(64, 64, 4, 2, None if kernel == "key" else 128)


class _Clip(NamedTuple):
    """The crops that are computed by one launch: a whole batch, or a clip of a packed one."""

    frames: slice
    """Rows in tensors of a packed batch."""
    seeds: Tensor | None
    first: int
    """Index of the first of its `[head, query frame]` numbers in a flat tensor."""

    def of(self, x: Tensor) -> Tensor:
        """Its part of `[batch, frame, hidden]`, a view."""
        return x[:, self.frames]


def _clips(seeds: Tensor | None, settings: _Settings) -> list[_Clip]:
    if not settings.lengths:
        return [_Clip(slice(None), seeds, 0)]
    clips, first = [], 0
    for clip, own in enumerate(packing.places(settings.lengths)):
        clips.append(_Clip(own, None if seeds is None else seeds[clip : clip + 1], first))
        first += settings.heads * _padded(own.stop - own.start)
    return clips


def _padded(queries: int) -> int:
    to: int = kernels.PADDED_TO.value
    return blocks(queries, to) * to


def _saved_numbers(query: Tensor, settings: _Settings) -> int:
    """Length of a flat tensor of one number for each crop, head and query frame."""
    clips = settings.lengths or (query.shape[1],) * len(query)
    return settings.heads * sum(_padded(frames) for frames in clips)


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of crops and rows, of each tensor in turn."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def _numbers(query: Tensor, key: Tensor, settings: _Settings) -> tuple[int, int, float]:
    """Query frames, frames, and the scale of scores, whose exponentials are powers of two."""
    width = query.shape[2] // settings.heads
    return query.shape[1], key.shape[1], width**-0.5 * math.log2(math.e)


def _constants(query: Tensor, tiles: _Tiles, drops: bool, settings: _Settings) -> dict[str, Any]:
    width = query.shape[2] // settings.heads
    return {
        "WIDTH": width,
        "PADDED": max(_SMALLEST, 1 << (width - 1).bit_length()),
        "ROWS": tiles.rows,
        "SIZE": tiles.size,
        "DROPS": drops,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        **tiles.launching(),
    }


def _parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of query, key and value of three, two or one tensor (see `_Attention`)."""
    if len(tensors) == 3:
        return list(tensors)
    if len(tensors) == 2:
        return [tensors[0], *tensors[1].chunk(2, 2)]
    return list(tensors[0].chunk(3, 2))


def _rows_together(x: Tensor) -> Tensor:
    """`[batch, frame, channel]` with channels next to each other in memory."""
    return x if x.stride(2) == 1 else x.contiguous()


class _Attention(torch.autograd.Function):
    """Attention of query, key and value; of query, and key and value in one; or of all in one."""

    @staticmethod
    def forward(ctx: Any, settings: _Settings, seeds: Tensor | None, *tensors: Tensor) -> Tensor:
        tensors = tuple(_rows_together(x) for x in tensors)
        query, key, value = _parts(tensors)
        out = query.new_empty(query.shape)
        lse = query.new_empty(_saved_numbers(query, settings), dtype=torch.float32)
        for clip in _clips(seeds, settings):
            q, k, v, o = (clip.of(x) for x in (query, key, value, out))
            tiles = _tiles("forward", q)
            launch(
                kernels.attention_forward,
                (blocks(q.shape[1], tiles.rows), settings.heads, len(q)),
                *(q, k, v, o, lse[clip.first :], clip.seeds),
                *_strides(q, k, v, o),
                *_numbers(q, k, settings),
                *(settings.site, *threshold_parts(settings.rate), 1 / (1 - settings.rate), 0.0),
                **_constants(q, tiles, seeds is not None, settings),
            )
        ctx.settings = settings
        ctx.save_for_backward(seeds, out, lse, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        seeds, out, lse, *tensors = ctx.saved_tensors
        settings: _Settings = ctx.settings
        grad = _rows_together(grad)
        grads = [x.new_empty(x.shape) for x in tensors]
        delta, keys = torch.empty_like(lse), torch.empty_like(lse, dtype=torch.int32)
        tensors_of_all = (*_parts(tensors), out, grad, *_parts(grads))
        for clip in _clips(seeds, settings):
            q, k, v, o, g, q_grad, k_grad, v_grad = (clip.of(x) for x in tensors_of_all)
            width = q.shape[2] // settings.heads
            own = [x[clip.first :] for x in (lse, delta, keys)]
            numbers = (
                *_numbers(q, k, settings), width**-0.5, settings.site,
                *threshold_parts(settings.rate), 1 / (1 - settings.rate), 0.0,
            )  # fmt: skip
            tiles = _tiles("query", q)
            launch(
                kernels.attention_query_gradient,
                (blocks(q.shape[1], tiles.rows), settings.heads, len(q)),
                *(q, k, v, o, g, *own, clip.seeds, q_grad),
                *_strides(q, k, v, o, g, q_grad),
                *numbers,
                **_constants(q, tiles, seeds is not None, settings),
            )
            tiles = _tiles("key", q)
            launch(
                kernels.attention_key_gradient,
                (blocks(k.shape[1], tiles.size), settings.heads, len(q)),
                *(q, k, v, g, *own, clip.seeds, k_grad, v_grad),
                *_strides(q, k, v, g, k_grad, v_grad),
                *numbers,
                **_constants(q, tiles, seeds is not None, settings),
            )
        return None, None, *grads


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    rate: float,
    seeds: Tensor | None,
    site: int,
    lengths: Sequence[int] = (),
) -> Tensor:
    """Scaled dot-product attention within each crop, with dropout of the attention weights.

    Args:
        query: `[batch, query frame, hidden]` fp32, bf16 or fp16; may be a view.
        key: `[batch, frame, hidden]`, likewise.
        value: `[batch, frame, hidden]`, likewise.
        heads: number of heads, a divisor of the hidden size.
        rate: dropout rate of the attention weights.
        seeds: `[batch]` int64 on the same device, one per crop; None, as in evaluation, drops
            nothing.
        site: number of the dropout's site in the network.
        lengths: frames of each packed crop (see `packing`), else empty; if packed, all frames are
            query frames.

    Returns:
        `[batch, query frame, hidden]`; masks are those of `keyed_bits.keep_pairs`.
    """
    settings = _Settings(heads, 0.0 if seeds is None else rate, site, tuple(lengths))
    return _Attention.apply(settings, seeds if rate else None, query, key, value)


def fused_self_attention(
    joined: Tensor,
    *,
    heads: int,
    rate: float,
    seeds: Tensor | None,
    site: int,
    lengths: Sequence[int] = (),
) -> Tensor:
    """`fused_attention` of one product, whose gradient is one tensor too.

    Args:
        joined: `[batch, frame, 3 * hidden]`: queries, keys and values.
        heads: see `fused_attention`.
        rate: see `fused_attention`.
        seeds: see `fused_attention`.
        site: see `fused_attention`.
        lengths: see `fused_attention`.

    Returns:
        `[batch, frame, hidden]`.
    """
    settings = _Settings(heads, 0.0 if seeds is None else rate, site, tuple(lengths))
    return _Attention.apply(settings, seeds if rate else None, joined)


def fused_cross_attention(
    query: Tensor,
    joined: Tensor,
    *,
    heads: int,
    rate: float,
    seeds: Tensor | None,
    site: int,
) -> Tensor:
    """`fused_attention` of some query frames to all frames, whose keys and values are one product.

    Args:
        query: `[batch, query frame, hidden]`.
        joined: `[batch, frame, 2 * hidden]`: keys and values.
        heads: see `fused_attention`.
        rate: see `fused_attention`.
        seeds: see `fused_attention`.
        site: see `fused_attention`.

    Returns:
        `[batch, query frame, hidden]`.
    """
    settings = _Settings(heads, 0.0 if seeds is None else rate, site, ())
    return _Attention.apply(settings, seeds if rate else None, query, joined)
