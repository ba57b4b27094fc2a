"""Tensors in fewer bits for the network: bf16, int8 and int4 with a scale a channel, and top-k.

A tensor becomes one array of bytes; its name and shape both sides know. Decoding is exact and the
same on every machine, so what is lost is known to the sender, who adds it to what it sends next
(error feedback; Seide et al., "1-Bit Stochastic Gradient Descent", 2014; Karimireddy et al., "Error
Feedback Fixes SignSGD", 2019).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord

from fl_client.protocol import ProtocolError
from fl_client.updates import Floats, view

Encoding = Literal["fp32", "bf16", "int8", "int4", "topk"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
Bytes = npt.NDArray[np.uint8]
Shapes = Mapping[str, tuple[int, ...]]

TOP_SHARE = 0.05
"""Share of a tensor's values that `topk` sends, the largest ones."""


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _rows(shape: tuple[int, ...]) -> int:
    """Channels, each with a scale: the first dimension, or all but the last where that is one."""
    return shape[0] if shape[0] > 1 else _count(shape[:-1])


def _encode_bf16(value: Floats) -> Bytes:
    bits = value.reshape(-1).view(np.uint32)
    # To nearest, ties to even.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16).view(np.uint8)


def _decode_bf16(data: Bytes, shape: tuple[int, ...]) -> Floats:
    wide = data.view(np.uint16).astype(np.uint32) << 16
    return wide.view(np.float32).reshape(shape)


def _scaled(value: Floats, levels: int) -> tuple[Floats, Floats]:
    """Scales `[channel]`, and integers in -levels..levels as floats `[channel, value]`."""
    rows = value.reshape(_rows(value.shape), -1)
    scales = np.max(np.abs(rows), axis=1, initial=0.0).astype(np.float32) / np.float32(levels)
    safe = np.where(scales > 0, scales, np.float32(1))
    return scales, np.rint(rows / safe[:, None])


def _times(codes: npt.NDArray[np.int8], scales: Floats) -> Floats:
    """A forged scale may overflow; who folds the result sees that it is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.multiply(codes, scales[:, None], dtype=np.float32)


def _encode_int8(value: Floats) -> Bytes:
    scales, codes = _scaled(value, 127)
    return np.concatenate([scales.view(np.uint8), codes.astype(np.int8).reshape(-1).view(np.uint8)])


def _decode_int8(data: Bytes, shape: tuple[int, ...]) -> Floats:
    rows = _rows(shape)
    scales = data[: 4 * rows].copy().view(np.float32)
    codes = data[4 * rows :].view(np.int8).reshape(rows, -1)
    return _times(codes, scales).reshape(shape)


def _encode_int4(value: Floats) -> Bytes:
    scales, codes = _scaled(value, 7)
    flat = (codes.reshape(-1) + 8).astype(np.uint8)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(8))
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
    return max(1, int(TOP_SHARE * _count(shape)))


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
        raise ProtocolError("a place outside the tensor")
    flat[places] = _decode_bf16(data[4 * count :].copy(), (count,))
    return flat.reshape(shape)


class _Code(NamedTuple):
    encode: Callable[[Floats], Bytes]
    decode: Callable[[Bytes, tuple[int, ...]], Floats]
    size: Callable[[tuple[int, ...]], int]
    """Bytes by shape."""


_CODES: dict[str, _Code] = {
    "fp32": _Code(
        lambda value: value.reshape(-1).view(np.uint8),
        lambda data, shape: data.view(np.float32).reshape(shape),
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
    """Vectors and single numbers (biases, norms: 0.2 % of `base`) stay as they are."""
    return _CODES["fp32" if len(shape) < 2 or encoding == "fp32" else encoding]


def encode(value: Floats, encoding: Encoding) -> Bytes:
    """A tensor's bytes.

    Args:
        value: fp32, of any shape, not empty.
        encoding: how.
    """
    return _code(encoding, value.shape).encode(np.ascontiguousarray(value, np.float32))


def decode(data: Bytes, shape: tuple[int, ...], encoding: Encoding) -> Floats:
    """The tensor again.

    Raises:
        ProtocolError: not as many bytes as such a tensor has, or places outside it.
    """
    code = _code(encoding, shape)
    if data.dtype != np.uint8 or data.ndim != 1 or data.size != code.size(shape):
        raise ProtocolError(f"{data.size} bytes are not {shape} in {encoding}")
    return code.decode(data, shape)


class Decoded(Mapping[str, Floats]):
    """Tensors of a message, each decoded when it is asked for; those left out are unchanged."""

    def __init__(self, record: ArrayRecord, shapes: Shapes, encoding: Encoding) -> None:
        """Read `record`, whose tensors have these shapes.

        Raises:
            ProtocolError: a tensor that is not known.
        """
        unknown = sorted(set(record) - set(shapes))
        if unknown:
            raise ProtocolError(f"{len(unknown)} unknown tensors, such as {unknown[0]}")
        self._record, self._shapes, self._encoding = record, shapes, encoding

    def __getitem__(self, name: str) -> Floats:
        """Decode a tensor."""
        data: Any = view(self._record[name])
        try:
            return decode(data, self._shapes[name], self._encoding)
        except ProtocolError as error:
            raise ProtocolError(f"{name}: {error}") from None

    def __iter__(self) -> Iterator[str]:
        """Names of the tensors that are there."""
        return iter(self._record)

    def __len__(self) -> int:
        """How many tensors are there."""
        return len(self._record)
