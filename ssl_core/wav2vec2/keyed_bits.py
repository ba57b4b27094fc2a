"""Random bits that follow from a crop's seed, a site of the network and a place, on every device.

They are a hash, not a sequence: any device, kernel or process can compute those of any place alone,
and all compute the same. All arithmetic is on 32-bit integers without a sign; torch has none such
with all operations, so there it is on int32, with the same bits. On a CPU NumPy is several times as
fast. The kernels of `cuda` compute the same inside (`cuda/hashing.py`).

The hash is lowbias32 (nullprogram.com/blog/2018/07/31), with the second half of the key mixed in
between. A hash serves four neighbouring elements of a mask, a byte each.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FIRST, SECOND, GOLDEN = 0x7FEB352D, 0x846CA68B, 0x9E3779B9
SITE, ROW, HEAD, COLUMN = 0x85EBCA6B, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F
"""Odd factors that spread numbers of sites, rows, heads and columns over all bits."""
BLOCK = 2**15
"""Hashes that a CPU computes at a time."""

Words = npt.NDArray[np.uint32]
_Bits = TypeVar("_Bits", Tensor, Words)


class Keys(NamedTuple):
    """The keys of a site: two words for each crop, `[batch]` int32."""

    first: Tensor
    second: Tensor


def as_int32(value: int) -> int:
    """The int32 of the same 32 bits."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def _right(x: _Bits, bits: int) -> _Bits:
    """Shift right, zeros from the left."""
    if isinstance(x, Tensor):
        return (x >> bits) & ((1 << (32 - bits)) - 1)
    return x >> np.uint32(bits)


def _times(x: _Bits, factor: int) -> _Bits:
    return x * (as_int32(factor) if isinstance(x, Tensor) else np.uint32(factor))


def _plus(x: _Bits, number: int) -> _Bits:
    return x + (as_int32(number) if isinstance(x, Tensor) else np.uint32(number & 0xFFFFFFFF))


def mixed(x: _Bits) -> _Bits:
    """lowbias32 of each word, `[...]`."""
    x = x ^ _right(x, 16)
    x = _times(x, FIRST)
    x = x ^ _right(x, 15)
    x = _times(x, SECOND)
    return x ^ _right(x, 16)


def site_keys(seeds: Tensor, site: int) -> Keys:
    """The keys of a site from the crops' seeds, `[batch]` int64 on any device."""
    if seeds.device.type == "cpu":
        wide = seeds.numpy().view(np.uint64)
        found = _keys(wide.astype(np.uint32), (wide >> np.uint64(32)).astype(np.uint32), site)
        return Keys(*(torch.from_numpy(key.view(np.int32)) for key in found))
    return Keys(*_keys(seeds.to(torch.int32), (seeds >> 32).to(torch.int32), site))


def _keys(low: _Bits, high: _Bits, site: int) -> tuple[_Bits, _Bits]:
    """Both words of keys from the halves of seeds, `[batch]`."""
    first = mixed(_plus(low, (site + 1) * GOLDEN))
    return first, mixed(_plus(high, (site + 1) * SITE) ^ first)


def thresholds(keys: Keys, rate: float) -> Tensor:
    """Bytes below which an element is dropped, `[batch]` int32.

    It is the rate in 256ths, rounded up or down at random for each crop and site, so that the
    probability of dropping an element is exactly the rate.
    """
    whole, chance = threshold_parts(rate)
    return whole + (_right(mixed(keys.first ^ keys.second), 1) < chance).to(torch.int32)


def threshold_parts(rate: float) -> tuple[int, int]:
    """The rate, at most 255/256, in whole 256ths, and the chance of one more in parts of 2^31."""
    bytes_dropped = min(rate * 256, 255.0)
    whole = math.floor(bytes_dropped)
    return whole, int((bytes_dropped - whole) * 2**31)


def _hashed(words: _Bits, first: _Bits, second: _Bits) -> _Bits:
    """Hash of each word by two keys, which broadcast."""
    x = words + first
    x = x ^ _right(x, 16)
    x = _times(x, FIRST)
    x = x ^ second
    x = x ^ _right(x, 15)
    x = _times(x, SECOND)
    return x ^ _right(x, 16)


def _numbers(count: int, like: _Bits) -> _Bits:
    """0, 1, ... as `[count]`, of the same kind and on the same device."""
    if isinstance(like, Tensor):
        return torch.arange(count, dtype=torch.int32, device=like.device)
    return np.arange(count, dtype=np.uint32)


def _row_keys(first: _Bits, heads: int, rows: int) -> _Bits:
    """`[batch, head, row]` from the first words of keys, `[batch]`."""
    of_head = mixed(first[:, None] + _times(_numbers(heads, first), GOLDEN))
    return mixed(of_head[:, :, None] + _times(_numbers(rows, first), ROW))


def _column_keys(second: _Bits, heads: int, words: int) -> _Bits:
    """`[batch, head, word]` from the second words of keys, `[batch]`."""
    of_head = mixed(second[:, None] ^ _times(_numbers(heads, second), HEAD))
    return mixed(of_head[:, :, None] + _times(_numbers(words, second), COLUMN))


def _words(x: Tensor) -> Words:
    """The same bits in NumPy."""
    return x.numpy().view(np.uint32)


def _byte_thresholds(first: Words, second: Words, rate: float) -> npt.NDArray[np.uint8]:
    """`thresholds` in NumPy, `[batch]`."""
    whole, chance = threshold_parts(rate)
    found = whole + (_right(mixed(first ^ second), 1) < chance)
    return np.array(found.tolist(), dtype=np.uint8)


def _kept_bytes(
    x: Words, spare: Words, limits: npt.NDArray[np.uint8], out: npt.NDArray[np.bool_]
) -> None:
    """Finish hashes in place from their second multiplication on, and compare their bytes.

    Args:
        x: hashes, `[..., word]`.
        spare: of the same shape.
        limits: thresholds, which broadcast to `out`.
        out: `[..., byte]`, the result.
    """
    np.right_shift(x, np.uint32(15), out=spare)
    np.bitwise_xor(x, spare, out=x)
    np.multiply(x, np.uint32(SECOND), out=x)
    np.right_shift(x, np.uint32(16), out=spare)
    np.bitwise_xor(x, spare, out=x)
    np.greater_equal(x.view(np.uint8)[..., : out.shape[-1]], limits, out=out)


def keep_elements(keys: Keys, sizes: Sequence[int], rate: float) -> Tensor:
    """Masks of the elements of crops, one after the other.

    Args:
        keys: of the site, for each crop.
        sizes: elements of each crop.
        rate: fraction to drop.

    Returns:
        `[sum of sizes]` bool, True where an element is kept.
    """
    if keys.first.device.type != "cpu":
        return _keep_elements_on_a_device(keys, sizes, thresholds(keys, rate))
    first, second = (_words(each)[:, None] for each in keys)
    limits = _byte_thresholds(first, second, rate)
    out = np.empty(sum(sizes), dtype=np.bool_)
    words = np.arange(min(BLOCK, -(-max(sizes) // 4)), dtype=np.uint32)
    x, spare, crop, done = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32), 0, 0
    for size, equal in itertools.groupby(sizes):
        last = crop + len(list(equal))
        some = out[done : done + (last - crop) * size].reshape(last - crop, size)
        together = max(1, BLOCK // -(-size // 4))
        for begin, start in itertools.product(
            range(0, last - crop, together), range(0, -(-size // 4), BLOCK)
        ):
            own = some[begin : begin + together, 4 * start : 4 * (start + BLOCK)]
            crops = slice(crop + begin, crop + begin + len(own))
            shape = (len(own), -(-own.shape[1] // 4))
            hashed, beside = (each[: math.prod(shape)].reshape(shape) for each in (x, spare))
            np.add(words[: shape[1]], _plus(first[crops], start), out=hashed)
            np.right_shift(hashed, np.uint32(16), out=beside)
            np.bitwise_xor(hashed, beside, out=hashed)
            np.multiply(hashed, np.uint32(FIRST), out=hashed)
            np.bitwise_xor(hashed, second[crops], out=hashed)
            _kept_bytes(hashed, beside, limits[crops], own)
        crop, done = last, done + (last - crop) * size
    return torch.from_numpy(out)


def _keep_elements_on_a_device(keys: Keys, sizes: Sequence[int], limits: Tensor) -> Tensor:
    """The same in torch, for a device without Triton."""
    device, parts = keys.first.device, []
    if len(set(sizes)) == 1:  # no loop where all crops are as long
        place = torch.arange(sizes[0], dtype=torch.int32, device=device)
        x = _hashed(place >> 2, keys.first[:, None], keys.second[:, None])
        return (((x >> ((place & 3) << 3)) & 255) >= limits[:, None]).flatten()
    for crop, size in enumerate(sizes):
        own = Keys(keys.first[crop : crop + 1], keys.second[crop : crop + 1])
        parts.append(_keep_elements_on_a_device(own, [size], limits[crop : crop + 1]))
    return torch.cat(parts)


def keep_pairs(
    keys: Keys, heads: int, chosen: slice, shape: tuple[int, int], rate: float
) -> Tensor:
    """Masks of the pairs of query frame and frame, of some heads.

    Args:
        keys: of the site, for each crop.
        heads: heads in all.
        chosen: heads whose masks are wanted.
        shape: query frames and frames.
        rate: fraction to drop.

    Returns:
        `[batch, chosen head, query frame, frame]` bool, True where a pair is kept.
    """
    rows, columns = shape
    words = -(-columns // 4)
    if keys.first.device.type != "cpu":
        row_keys = _row_keys(keys.first, heads, rows)[:, chosen, :, None]
        column_keys = _column_keys(keys.second, heads, words)[:, chosen, None]
        return _keep_pairs_on_a_device(row_keys, column_keys, columns, thresholds(keys, rate))
    first, second = (_words(each) for each in keys)
    by_row = _row_keys(first, heads, rows)[:, chosen].reshape(-1, rows, 1)
    by_column = _column_keys(second, heads, words)[:, chosen].reshape(-1, 1, words)
    out = np.empty((len(by_row), rows, columns), dtype=np.bool_)
    limits = _byte_thresholds(first, second, rate).repeat(len(out) // len(first))[:, None, None]
    step = min(rows, max(1, BLOCK // words))
    together = min(len(out), max(1, BLOCK // (words * step)))
    x = np.empty((together, step, words), dtype=np.uint32)
    spare = np.empty_like(x)
    for matrix, row in itertools.product(range(0, len(out), together), range(0, rows, step)):
        some, rows_now = slice(matrix, matrix + together), slice(row, row + step)
        own = out[some, rows_now]
        hashed, beside = (each[: own.shape[0], : own.shape[1]] for each in (x, spare))
        np.bitwise_xor(by_row[some, rows_now], by_column[some], out=hashed)
        np.multiply(hashed, np.uint32(FIRST), out=hashed)
        _kept_bytes(hashed, beside, limits[some], own)
    return torch.from_numpy(out.reshape(len(first), -1, rows, columns))


def _keep_pairs_on_a_device(
    row_keys: Tensor, column_keys: Tensor, columns: int, limits: Tensor
) -> Tensor:
    """The same in torch, for a device without Triton."""
    column = torch.arange(columns, dtype=torch.int32, device=limits.device)
    x = _times(row_keys ^ column_keys, FIRST)
    x = _times(x ^ _right(x, 15), SECOND)
    x = (x ^ _right(x, 16)).repeat_interleave(4, -1)[..., :columns]
    return ((x >> ((column & 3) << 3)) & 255) >= limits[:, None, None, None]


def hashes(keys: Keys, count: int) -> Tensor:
    """`count` hashes of each crop, `[batch, count]` int32."""
    if keys.first.device.type != "cpu":
        place = torch.arange(count, dtype=torch.int32, device=keys.first.device)
        return _hashed(place, keys.first[:, None], keys.second[:, None])
    words = np.arange(count, dtype=np.uint32)
    first, second = _words(keys.first)[:, None], _words(keys.second)[:, None]
    return torch.from_numpy(_hashed(words, first, second).view(np.int32))


def uniform(keys: Keys, count: int) -> Tensor:
    """Numbers between 0 and 1, both excluded, in steps of 2^-24: `[batch, count]` fp32."""
    return (_right(hashes(keys, count), 8).float() + 0.5) * 2.0**-24


def below(keys: Keys, count: int, limit: int) -> Tensor:
    """Integers from 0 to `limit` (exclusive): `[batch, count]` int64."""
    return (_right(hashes(keys, count), 8).long() * limit) >> 24
