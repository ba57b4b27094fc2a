"""Triton kernels of attention with dropout, after FlashAttention-2 (Dao 2023, arXiv 2307.08691).

A program holds a tile of query frames, or of keys, of one head of one crop, and walks over the
others. Scores, weights and dropout masks exist in registers only.

Four neighbouring frames share a hash of the mask (see `keyed_bits`). In a product's result on
tensor cores a thread holds, of a row, the columns 16 j + 8 a + 2 t + b, where t is the thread's
number of four and a and b are 0 or 1. So keys and values are loaded in an order of frames in which
these are neighbours, and a thread computes one hash for four scores. Sums over frames do not mind.
"""

import triton
import triton.language as tl

from ssl_core.wav2vec2.cuda.hashing import (
    column_keys,
    pair_hash,
    row_keys,
    site_keys,
    threshold,
)

_NUMBERS = ["queries", "frames", "site", "whole", "chance"]
"""Arguments of which Triton would compile a kernel for 1 and one for multiples of 16."""

PADDED_TO = tl.constexpr(128)
"""Numbers of query frames are saved for a multiple of this, so that tiles are never masked."""


@triton.jit
def _exists(rows, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Which elements of a tile exist, from which rows do; columns are padded to a power of two."""
    exist = rows[:, None]
    if WIDTH < PADDED:
        exist = exist & (tl.arange(0, PADDED) < WIDTH)[None, :]
    return exist


@triton.jit
def _places(rows, stride, PADDED: tl.constexpr):
    """Offsets of a tile's elements."""
    return rows[:, None] * stride + tl.arange(0, PADDED)[None, :]


@triton.jit
def _numbers(crop, head, queries):
    """Where a head's numbers of query frames start: `[crop, head, query frame]`, padded."""
    padded = tl.cdiv(queries, PADDED_TO) * PADDED_TO
    return (crop.to(tl.int64) * tl.num_programs(1) + head) * padded


@triton.jit
def _column_order(SIZE: tl.constexpr):
    """The frame of each column: 16 j + 4 t + 2 a + b for column 16 j + 8 a + 2 t + b."""
    at = tl.arange(0, SIZE)
    return (at & -16) | ((at >> 1) & 3) << 2 | ((at >> 3) & 1) << 1 | (at & 1)


@triton.jit
def _row_order(SIZE: tl.constexpr):
    """The frame of each row of a transposed product: 16 j + 2 r + a for row 16 j + 8 a + r."""
    at = tl.arange(0, SIZE)
    return (at & -16) | (at & 7) << 1 | ((at >> 3) & 1)


@triton.jit
def _kept_in_columns(of_rows, of_words, order, limit, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Which weights are kept, `[row, column]`, columns in `_column_order`.

    `limit` is the threshold in the highest byte: bytes are compared there, with others below.
    """
    x = pair_hash(of_rows[:, None] ^ of_words[None, :])
    x = tl.reshape(x, [ROWS, SIZE // 16, 1, 4, 1])
    x = tl.reshape(tl.broadcast_to(x, [ROWS, SIZE // 16, 2, 4, 2]), [ROWS, SIZE])
    return (x << (24 - ((order & 3) << 3)).to(tl.uint32)[None, :]) >= limit


@triton.jit
def _kept_in_rows(of_pairs, of_rows, order, limit, SIZE: tl.constexpr, ROWS: tl.constexpr):
    """The same transposed, `[column, row]`, columns in `_row_order`.

    `of_pairs` are the keys of each two columns.
    """
    x = pair_hash(of_pairs[:, None] ^ of_rows[None, :])
    x = tl.reshape(x, [SIZE // 16, 1, 8, ROWS])
    x = tl.reshape(tl.broadcast_to(x, [SIZE // 16, 2, 8, ROWS]), [SIZE, ROWS])
    return (x << (24 - ((order & 3) << 3)).to(tl.uint32)[:, None]) >= limit


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["SEEDS"])
def attention_forward(
    Q, K, V, OUT, LSE, SEEDS,
    q_crop, q_row, k_crop, k_row, v_crop, v_row, out_crop, out_row,
    queries, frames, scale, site, whole, chance, gain, nothing,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    DROPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of `ROWS` query frames, and log2 of their sums of 2^(scale * score).

    `nothing` is 0. As a constant it would make LLVM select halves of registers instead of numbers,
    which takes twice as many instructions.
    """
    head, crop = tl.program_id(1), tl.program_id(2)
    wide = crop.to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exist = _exists(rows < queries, WIDTH, PADDED)
    at = wide * q_crop + head * WIDTH
    q = tl.load(Q + at + _places(rows, q_row, PADDED), mask=exist, other=0.0)
    keys = K + wide * k_crop + head * WIDTH
    values = V + wide * v_crop + head * WIDTH
    order = _column_order(SIZE)
    if DROPS:
        first, second = site_keys(tl.load(SEEDS + crop), site)
        limit = threshold(first, second, whole, chance) << 24
        of_rows = row_keys(first, head, rows)
    highest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(0, frames, SIZE):
        columns = start + order
        valid = _exists(columns < frames, WIDTH, PADDED)
        k = tl.load(keys + _places(columns, k_row, PADDED), mask=valid, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if start + SIZE > frames:
            score += tl.where(columns < frames, 0.0, -1e30)[None, :]
        now = tl.maximum(highest, tl.max(score, 1) * scale)
        weight = tl.exp2(score * scale - now[:, None])
        shrink = tl.exp2(highest - now)
        total = total * shrink + tl.sum(weight, 1)
        if DROPS:
            of_words = column_keys(second, head, start + 4 * tl.arange(0, SIZE // 4))
            kept = _kept_in_columns(of_rows, of_words, order, limit, ROWS, SIZE)
            weight = tl.where(kept, weight, nothing)
        v = tl.load(values + _places(columns, v_row, PADDED), mask=valid, other=0.0)
        out = out * shrink[:, None]
        out = tl.dot(weight.to(v.dtype), v, out, input_precision=PRECISION)
        highest = now
    out = out * (gain / total)[:, None]
    at = wide * out_crop + head * WIDTH
    tl.store(OUT + at + _places(rows, out_row, PADDED), out.to(OUT.dtype.element_ty), mask=exist)
    lse = tl.where(rows < queries, highest + tl.log2(total), 1e30)
    tl.store(LSE + _numbers(crop, head, queries) + rows, lse)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["SEEDS"])
def attention_query_gradient(
    Q, K, V, OUT, GRAD, LSE, DELTA, KEYS, SEEDS, Q_GRAD,
    q_crop, q_row, k_crop, k_row, v_crop, v_row, out_crop, out_row, grad_crop, grad_row,
    q_grad_crop, q_grad_row,
    queries, frames, scale, factor, site, whole, chance, gain, nothing,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    DROPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of `ROWS` query frames; also what the other gradients need of each query frame.

    That is `DELTA`, the sum over the head's width of output times gradient, divided by `gain`; and
    `KEYS`, the query frame's key of the mask.
    """
    head, crop = tl.program_id(1), tl.program_id(2)
    wide = crop.to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < queries
    exist = _exists(inside, WIDTH, PADDED)
    here = head * WIDTH
    q = tl.load(Q + wide * q_crop + here + _places(rows, q_row, PADDED), mask=exist, other=0.0)
    at = wide * grad_crop + here
    grad = tl.load(GRAD + at + _places(rows, grad_row, PADDED), mask=exist, other=0.0)
    at = wide * out_crop + here
    out = tl.load(OUT + at + _places(rows, out_row, PADDED), mask=exist, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1) / gain
    own = _numbers(crop, head, queries) + rows
    lse = tl.load(LSE + own)
    tl.store(DELTA + own, delta)
    keys = K + wide * k_crop + here
    values = V + wide * v_crop + here
    order = _column_order(SIZE)
    if DROPS:
        first, second = site_keys(tl.load(SEEDS + crop), site)
        limit = threshold(first, second, whole, chance) << 24
        of_rows = row_keys(first, head, rows)
        tl.store(KEYS + own, of_rows.to(tl.int32, bitcast=True))
    result = tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(0, frames, SIZE):
        columns = start + order
        valid = _exists(columns < frames, WIDTH, PADDED)
        k = tl.load(keys + _places(columns, k_row, PADDED), mask=valid, other=0.0)
        v = tl.load(values + _places(columns, v_row, PADDED), mask=valid, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        slope = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        # At most 1; beyond the last frame, where keys are 0, it must be finite.
        weight = tl.exp2(tl.minimum(score * scale - lse[:, None], 0.0))
        if DROPS:
            of_words = column_keys(second, head, start + 4 * tl.arange(0, SIZE // 4))
            kept = _kept_in_columns(of_rows, of_words, order, limit, ROWS, SIZE)
            slope = tl.where(kept, slope, 0.0)
        slope = weight * (slope - delta[:, None])
        result = tl.dot(slope.to(k.dtype), k, result, input_precision=PRECISION)
    result = result * (factor * gain)
    at = wide * q_grad_crop + here
    where = Q_GRAD + at + _places(rows, q_grad_row, PADDED)
    tl.store(where, result.to(Q_GRAD.dtype.element_ty), mask=exist)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["SEEDS"])
def attention_key_gradient(
    Q, K, V, GRAD, LSE, DELTA, KEYS, SEEDS, K_GRAD, V_GRAD,
    q_crop, q_row, k_crop, k_row, v_crop, v_row, grad_crop, grad_row,
    k_grad_crop, k_grad_row, v_grad_crop, v_grad_row,
    queries, frames, scale, factor, site, whole, chance, gain, nothing,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    DROPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of `SIZE` keys and values."""
    head, crop = tl.program_id(1), tl.program_id(2)
    wide = crop.to(tl.int64)
    order = _row_order(SIZE)
    columns = tl.program_id(0) * SIZE + order
    exist = _exists(columns < frames, WIDTH, PADDED)
    here = head * WIDTH
    k = tl.load(K + wide * k_crop + here + _places(columns, k_row, PADDED), mask=exist, other=0.0)
    v = tl.load(V + wide * v_crop + here + _places(columns, v_row, PADDED), mask=exist, other=0.0)
    query = Q + wide * q_crop + here
    slopes = GRAD + wide * grad_crop + here
    own = _numbers(crop, head, queries)
    if DROPS:
        first, second = site_keys(tl.load(SEEDS + crop), site)
        limit = threshold(first, second, whole, chance) << 24
        pairs = tl.program_id(0) * SIZE + 2 * tl.arange(0, SIZE // 2)
        of_pairs = column_keys(second, head, pairs)
    k_result = tl.zeros([SIZE, PADDED], tl.float32)
    v_result = tl.zeros([SIZE, PADDED], tl.float32)
    for start in range(0, queries, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = rows < queries
        valid = _exists(inside, WIDTH, PADDED)
        q = tl.load(query + _places(rows, q_row, PADDED), mask=valid, other=0.0)
        grad = tl.load(slopes + _places(rows, grad_row, PADDED), mask=valid, other=0.0)
        lse = tl.load(LSE + own + rows)
        delta = tl.load(DELTA + own + rows)
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        slope = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        weight = tl.exp2(score * scale - lse[None, :])
        used = weight
        if DROPS:
            of_rows = tl.load(KEYS + own + rows).to(tl.uint32, bitcast=True)
            kept = _kept_in_rows(of_pairs, of_rows, order, limit, SIZE, ROWS)
            used = tl.where(kept, weight, nothing)
        v_result = tl.dot(used.to(grad.dtype), grad, v_result, input_precision=PRECISION)
        slope = used * slope - weight * delta[None, :]
        k_result = tl.dot(slope.to(q.dtype), q, k_result, input_precision=PRECISION)
    k_result = k_result * (factor * gain)
    v_result = v_result * gain
    where = K_GRAD + wide * k_grad_crop + here + _places(columns, k_grad_row, PADDED)
    tl.store(where, k_result.to(K_GRAD.dtype.element_ty), mask=exist)
    where = V_GRAD + wide * v_grad_crop + here + _places(columns, v_grad_row, PADDED)
    tl.store(where, v_result.to(V_GRAD.dtype.element_ty), mask=exist)
