"""Tensors in fewer bits for the network: bf16, int8 and int4 with a scale a channel, and top-k.

A tensor becomes one array of bytes; both sides know its name and shape. Decoding gives the same
bits on every machine, so the sender knows the encoding error and adds it to what it sends next
(error feedback; Seide et al., "1-Bit Stochastic Gradient Descent", 2014; Karimireddy et al., "Error
Feedback Fixes SignSGD", 2019).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord

from fl_client.protocol import Encoding, ProtocolError
from fl_client.updates import Floats, Views

Bytes = npt.NDArray[np.uint8]
Shapes = Mapping[str, tuple[int, ...]]

TOP_FRACTION = 0.05
"""Fraction of a tensor's values that `topk` sends, the largest ones."""
_BLOCK = 2**17
"""Values encoded at a time."""


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _rows(shape: tuple[int, ...]) -> int:
    """Number of channels, each with a scale: the first dimension; if it is 1, all but the last."""
    return shape[0] if shape[0] > 1 else _count(shape[:-1])


def _encode_bf16(value: Floats) -> Bytes:
    bits = value.reshape(-1).view(np.uint32)
    # Round to nearest, ties to even.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16).view(np.uint8)


def _decode_bf16(data: Bytes, shape: tuple[int, ...]) -> Floats:
    wide = data.view(np.uint16).astype(np.uint32) << 16
    return wide.view(np.float32).reshape(shape)


def _scale(value: Floats, levels: int, scales: Floats, codes: npt.NDArray[np.int8]) -> None:
    """Write scales `[channel]`, and integers in -levels..levels `[channel, value]`.

    It works on a few rows at a time, so that intermediate results stay in the processor's cache.
    """
    rows: Any = value.reshape(codes.shape)
    step = max(1, _BLOCK // max(1, codes.shape[1]))
    for first in range(0, len(rows), step):
        own = rows[first : first + step]
        largest = np.maximum(own.max(axis=1, initial=0.0), -own.min(axis=1, initial=0.0))
        found = largest.astype(np.float32) / np.float32(levels)
        scaled = own / np.where(found > 0, found, np.float32(1)).reshape(-1, 1)
        scales[first : first + step] = found
        codes[first : first + step] = np.rint(scaled, out=scaled)


def _times(codes: npt.NDArray[np.int8], scales: Floats) -> Floats:
    """Codes times scales; a forged scale may overflow, and folding rejects what is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.multiply(codes, scales[:, None], dtype=np.float32)


def _encode_int8(value: Floats) -> Bytes:
    rows = _rows(value.shape)
    data = np.empty(4 * rows + value.size, np.uint8)
    codes = data[4 * rows :].view(np.int8).reshape(rows, -1)
    _scale(value, 127, data[: 4 * rows].view(np.float32), codes)
    return data


def _decode_int8(data: Bytes, shape: tuple[int, ...]) -> Floats:
    rows = _rows(shape)
    scales = data[: 4 * rows].copy().view(np.float32)
    codes = data[4 * rows :].view(np.int8).reshape(rows, -1)
    return _times(codes, scales).reshape(shape)


def _encode_int4(value: Floats) -> Bytes:
    rows = _rows(value.shape)
    scales, codes = np.empty(rows, np.float32), np.zeros(-(-value.size // 2) * 2, np.int8)
    _scale(value, 7, scales, codes[: value.size].reshape(rows, -1))
    codes += 8
    flat = codes.view(np.uint8)
    return np.concatenate([scales.view(np.uint8), flat[::2] | (flat[1::2] << 4)])


def _decode_int4(data: Bytes, shape: tuple[int, ...]) -> Floats:
    rows = _rows(shape)
    scales = data[: 4 * rows].copy().view(np.float32)
    packed = data[4 * rows :]
    codes = np.empty(2 * len(packed), np.int8)
    codes[::2] = packed & 15
    codes[1::2] = packed >> 4
    codes -= 8
    count = _count(shape)
    return _times(codes[:count].reshape(rows, -1), scales).reshape(shape)


def _kept(shape: tuple[int, ...]) -> int:
    return max(1, int(TOP_FRACTION * _count(shape)))


def _encode_topk(value: Floats) -> Bytes:
    flat = value.reshape(-1)
    count = _kept(value.shape)
    places = np.argpartition(np.abs(flat), flat.size - count)[flat.size - count :]
    places = np.sort(places).astype(np.uint32)
    return np.concatenate([places.view(np.uint8), _encode_bf16(flat[places])])


def _decode_topk(data: Bytes, shape: tuple[int, ...]) -> Floats:
    count = _kept(shape)
    places = data[: 4 * count].copy().view(np.uint32)
    flat = np.zeros(_count(shape), np.float32)
    if places.size and int(places.max()) >= flat.size:
        raise ProtocolError("an index outside the tensor")
    flat[places] = _decode_bf16(data[4 * count :].copy(), (count,))
    return flat.reshape(shape)


class _Code(NamedTuple):
    encode: Callable[[Floats], Bytes]
    decode: Callable[[Bytes, tuple[int, ...]], Floats]
    size: Callable[[tuple[int, ...]], int]
    """Bytes by shape."""


_CODES: dict[str, _Code] = {
    "fp32": _Code(
        # Copied, as callers change the value while its bytes wait for their bundle.
        lambda value: value.reshape(-1).view(np.uint8).copy(),
        # Not aligned after an odd number of bytes.
        lambda data, shape: np.require(data.view(np.float32), requirements="A").reshape(shape),
        lambda shape: 4 * _count(shape),
    ),
    "bf16": _Code(_encode_bf16, _decode_bf16, lambda shape: 2 * _count(shape)),
    "int8": _Code(_encode_int8, _decode_int8, lambda shape: 4 * _rows(shape) + _count(shape)),
    "int4": _Code(
        _encode_int4, _decode_int4, lambda shape: 4 * _rows(shape) + (_count(shape) + 1) // 2
    ),
    "topk": _Code(_encode_topk, _decode_topk, lambda shape: 6 * _kept(shape)),
}


def _code(encoding: Encoding, shape: tuple[int, ...]) -> _Code:
    """Vectors and scalars (biases, norms: 0.2 % of `base`) stay in fp32."""
    return _CODES["fp32" if len(shape) < 2 or encoding == "fp32" else encoding]


def encode(value: Floats, encoding: Encoding) -> Bytes:
    """Encode a tensor.

    Args:
        value: fp32 `[...]`, not empty.
        encoding: of matrices; vectors stay in fp32.

    Returns:
        Bytes `[byte]`.
    """
    return _code(encoding, value.shape).encode(np.ascontiguousarray(value, np.float32))


def decode(data: Bytes, shape: tuple[int, ...], encoding: Encoding) -> Floats:
    """Decode a tensor.

    Args:
        data: bytes `[byte]`.
        shape: of the tensor.
        encoding: as in `encode`.

    Returns:
        fp32 `[*shape]`.

    Raises:
        ProtocolError: the wrong number of bytes for this shape, or an index outside the tensor.
    """
    code = _code(encoding, shape)
    if data.dtype != np.uint8 or data.ndim != 1 or data.size != code.size(shape):
        raise ProtocolError(f"{data.size} bytes are not {shape} in {encoding}")
    return code.decode(data, shape)


class Decoded(Mapping[str, Floats]):
    """Tensors of a message, decoded on access; those missing have not changed."""

    def __init__(self, record: ArrayRecord, shapes: Shapes, encoding: Encoding) -> None:
        """Read the names in a record.

        Args:
            record: arrays of a message.
            shapes: of all tensors that may be there, by name.
            encoding: as in `encode`.

        Raises:
            ProtocolError: an unknown tensor, or an array that cannot be read.
        """
        self._views = Views(record)
        unknown = sorted(set(self._views) - set(shapes))
        if unknown:
            raise ProtocolError(f"{len(unknown)} unknown tensors, such as {unknown[0]}")
        self._shapes, self._encoding = shapes, encoding

    def __getitem__(self, name: str) -> Floats:
        """Decode a tensor, fp32 `[...]`."""
        try:
            return decode(self._views[name], self._shapes[name], self._encoding)
        except ProtocolError as error:
            raise ProtocolError(f"{name}: {error}") from None

    def __iter__(self) -> Iterator[str]:
        """Names of the tensors in the message."""
        return iter(self._views)

    def __len__(self) -> int:
        """Number of tensors in the message."""
        return len(self._views)

    def release(self, name: str) -> None:
        """Drop a tensor that is no longer needed; see `Views.release`."""
        self._views.release(name)
