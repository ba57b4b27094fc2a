"""The hash of `keyed_bits` inside Triton kernels: the same bits as there, see there."""

import triton
import triton.language as tl

from ssl_core.wav2vec2 import keyed_bits

FIRST = tl.constexpr(keyed_bits.FIRST)
SECOND = tl.constexpr(keyed_bits.SECOND)
GOLDEN = tl.constexpr(keyed_bits.GOLDEN)
SITE = tl.constexpr(keyed_bits.SITE)
ROW = tl.constexpr(keyed_bits.ROW)
HEAD = tl.constexpr(keyed_bits.HEAD)
COLUMN = tl.constexpr(keyed_bits.COLUMN)


@triton.jit
def mixed(x):
    """lowbias32 of uint32 words."""
    x ^= x >> 16
    x *= FIRST
    x ^= x >> 15
    x *= SECOND
    x ^= x >> 16
    return x


@triton.jit
def site_keys(seed, site):
    """Both keys of a site, uint32, from int64 seeds and the site's number."""
    number = tl.cast(site, tl.uint32) + 1  # Triton makes a 1 a constant
    first = mixed(seed.to(tl.uint32) + number * GOLDEN)
    high = (seed >> 32).to(tl.uint32)
    return first, mixed((high + number * SITE) ^ first)


@triton.jit
def threshold(first, second, whole, chance):
    """The byte below which an element is dropped; `whole` and `chance` are `threshold_parts`."""
    more = (mixed(first ^ second) >> 1) < tl.cast(chance, tl.uint32)
    return tl.cast(whole, tl.uint32) + more.to(tl.uint32)


@triton.jit
def hashed(words, first, second):
    """Hash of uint32 words by two keys."""
    x = words + first
    x ^= x >> 16
    x *= FIRST
    x ^= second
    x ^= x >> 15
    x *= SECOND
    x ^= x >> 16
    return x


@triton.jit
def keep_element(place, first, second, limit):
    """Whether elements at `place` (uint32, counted in the crop) are kept."""
    return ((hashed(place >> 2, first, second) >> ((place & 3) << 3)) & 255) >= limit


@triton.jit
def row_keys(first, head, rows):
    """Keys of query frames: from the site's first key, head and row numbers."""
    return mixed(mixed(first + tl.cast(head, tl.uint32) * GOLDEN) + rows.to(tl.uint32) * ROW)


@triton.jit
def column_keys(second, head, columns):
    """Keys of frames: from the site's second key, head and column numbers; four share one."""
    of_head = mixed(second ^ (tl.cast(head, tl.uint32) * HEAD))
    return mixed(of_head + (columns.to(tl.uint32) >> 2) * COLUMN)


@triton.jit
def pair_hash(x):
    """Hashes of pairs of frames, whose bytes are compared, from their keys combined by xor."""
    x *= FIRST
    x ^= x >> 15
    x *= SECOND
    x ^= x >> 16
    return x
