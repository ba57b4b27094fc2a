"""Reads and writes safetensors files one tensor at a time.

The safetensors library copies all tensors to write them and maps whole files to read them. That is
too much for a small board: here a file takes the memory of its largest tensor. Messages hold
tensors in the same format.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import DataError

_NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
    torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip
_TYPES = {name: dtype for dtype, name in _NAMES.items()}
_LONGEST_HEADER = 100_000_000


class Entry(NamedTuple):
    """Position of a tensor in a file."""

    dtype: torch.dtype
    shape: list[int]
    start: int
    """First byte, from the beginning of the file."""
    end: int
    """One past the last byte."""


def read_header(stream: IO[bytes], size: int) -> dict[str, Entry]:
    """Read the entries of a file of `size` bytes, by tensor name, in file order.

    Raises:
        ValueError: the file is truncated or broken.
    """
    try:
        length = int.from_bytes(stream.read(8), "little")
        if length > _LONGEST_HEADER:
            raise ValueError("header too long")
        header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            start, end = (8 + length + int(offset) for offset in entry["data_offsets"])
            dtype, shape = _TYPES[entry["dtype"]], [int(size) for size in entry["shape"]]
            count = int(np.prod(shape, dtype=np.float64)) if min(shape, default=0) >= 0 else -1
            if start < 8 + length or end - start != count * dtype.itemsize:
                raise ValueError(f"the offsets of {name} do not fit its shape")
            found[name] = Entry(dtype, shape, start, end)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"bad header: {error!r}") from None
    if size != max((entry.end for entry in found.values()), default=8 + length):
        raise ValueError("truncated")
    return found


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a file; the same tensors give the same bytes.

    Args:
        path: file to write.
        tensors: by name, of any shape `[...]`.
        metadata: for the header.

    Raises:
        OSError: such as a full disk.
    """
    with open(path, "wb") as stream:
        write_stream(stream, tensors, metadata)


def write_stream(
    stream: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a binary stream in the same format.

    Args:
        stream: to write to.
        tensors: by name, of any shape `[...]`.
        metadata: for the header.

    Raises:
        OSError: such as a full disk.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, value in tensors.items():
        end = offset + value.numel() * value.element_size()
        header[name] = {
            "dtype": _NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for value in tensors.values():
        flat = value.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            stream.write(flat.view(torch.uint8).numpy().data)


class TensorFile(Mapping[str, Tensor]):
    """Tensors of a file by name; each access reads one from disk."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            OSError: the file is missing or cannot be read.
            DataError: the file is truncated or broken.
        """
        self._path = path
        try:
            with open(path, "rb") as stream:
                self._entries = read_header(stream, path.stat().st_size)
        except ValueError as error:
            raise DataError(f"{path} is broken: {error}") from None

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor, `[*shape]` as written.

        Raises:
            DataError: the file is truncated.
        """
        dtype, shape, start, end = self._entries[name]
        with open(self._path, "rb") as stream:
            stream.seek(start)
            data = np.fromfile(stream, np.uint8, end - start)
        if len(data) < end - start:
            raise DataError(f"{self._path} is truncated at {name}")
        if not len(data):
            return torch.empty(shape, dtype=dtype)
        return torch.from_numpy(data).view(dtype).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, in file order."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._entries)
