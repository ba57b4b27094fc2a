"""Tables in columns: compact NumPy arrays in one file, which processes map and share."""

import contextlib
import hashlib
import json
import mmap
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.atomic import replacing
from common.errors import DataError

Column = npt.NDArray[Any]
Integers = npt.NDArray[np.integer[Any]]

_MAGIC = b"shortwave columns 1\n"
_ALIGNED = 64
_DIGEST = 16
_TOGETHER = 2**16
"""Rows converted at once, so that no whole column is copied."""


def compact(values: npt.ArrayLike) -> Integers:
    """Whole numbers from 0 on as the smallest of uint16, uint32 and int64 that holds them all."""
    found = np.asarray(values)
    largest = int(found.max()) if found.size else 0
    kinds = (kind for kind in (np.uint16, np.uint32) if largest <= np.iinfo(kind).max)
    return found.astype(next(kinds, np.int64), copy=False)


def chunks(count: int, together: int = _TOGETHER) -> Iterator[slice]:
    """Consecutive slices of `count` rows, of at most `together` rows."""
    return (slice(first, min(first + together, count)) for first in range(0, count, together))


class Names:
    """Texts in one byte buffer: UTF-8, with bytes that are not UTF-8 kept as they are."""

    def __init__(self, text: Column, ends: Integers) -> None:
        """Take the buffer, `[byte]`, and where each text ends in it, `[text]`."""
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Names":
        """Collect texts."""
        buffer, ends = bytearray(), array("q")
        for each in texts:
            buffer += each.encode(errors="surrogateescape")
            ends.append(len(buffer))
        return cls(np.frombuffer(buffer, np.uint8), compact(np.frombuffer(ends, np.int64)))

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        """The text with an index from 0 on."""
        if not 0 <= index < len(self.ends):
            raise IndexError(index)
        first = self.ends[index - 1] if index else 0
        return self.text[first : self.ends[index]].tobytes().decode(errors="surrogateescape")

    def __iter__(self) -> Iterator[str]:
        """Texts in order."""
        for part in chunks(len(self)):
            yield from self.within(part)

    def within(self, part: slice) -> Iterator[str]:
        """Texts with consecutive indices, in order."""
        base = first = int(self.ends[part.start - 1]) if part.start else 0
        ends = self.ends[part].tolist()
        text = self.text[first : ends[-1]].tobytes() if ends else b""
        for end in ends:
            yield text[first - base : end - base].decode(errors="surrogateescape")
            first = end


class Columns:
    """Named arrays and a header. Read from a file, they are its pages; pickled, its path."""

    def __init__(
        self, header: Mapping[str, Any], arrays: Mapping[str, Column], path: Path | None = None
    ) -> None:
        """Collect arrays.

        Args:
            header: what JSON can hold.
            arrays: by name, of one dimension or more.
            path: the file that they are mapped from; None for arrays in memory.
        """
        self.header, self.arrays, self.path = dict(header), dict(arrays), path

    def __getitem__(self, name: str) -> Column:
        """A column by name."""
        return self.arrays[name]

    def names(self, name: str) -> Names:
        """Texts stored by `with_names`."""
        return Names(self[f"{name} text"], self[f"{name} ends"])

    @cached_property
    def digest(self) -> str:
        """Digest of header and arrays."""
        digest = hashlib.blake2b(self._described(), digest_size=_DIGEST)
        for each in self.arrays.values():
            digest.update(np.ascontiguousarray(each).data)
        return digest.hexdigest()

    def _described(self) -> bytes:
        """Header, names, types and shapes as JSON."""
        shapes = [[name, each.dtype.str, each.shape] for name, each in self.arrays.items()]
        return json.dumps([self.header, shapes]).encode()

    def save(self, path: Path) -> "Columns":
        """Write the columns to a file, atomically, and map it in their place.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        described = self._described()
        with replacing(path, sync=False) as partial, open(partial, "wb") as stream:
            stream.write(_MAGIC + bytes.fromhex(self.digest))
            stream.write(len(described).to_bytes(8, "little") + described)
            for each in self.arrays.values():
                stream.write(bytes(-stream.tell() % _ALIGNED))
                stream.write(np.ascontiguousarray(each).data)
        return Columns.open(path)

    @classmethod
    def open(cls, path: Path) -> "Columns":
        """Map the columns of a file.

        Raises:
            DataError: the file is missing, cannot be read or is damaged.
        """
        try:
            with open(path, "rb") as stream:
                pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            if pages[: len(_MAGIC)] != _MAGIC:
                raise ValueError("another format")
            place = len(_MAGIC) + _DIGEST
            digest = pages[len(_MAGIC) : place].hex()
            size = int.from_bytes(pages[place : place + 8], "little")
            header, shapes = json.loads(pages[place + 8 : place + 8 + size])
            place += 8 + size
            arrays = {}
            for name, kind, shape in shapes:
                place += -place % _ALIGNED
                count, dtype = int(np.prod(shape)), np.dtype(kind)
                arrays[name] = np.frombuffer(pages, dtype, count, place).reshape(shape)
                place += arrays[name].nbytes
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} is damaged ({error}); delete it") from None
        columns = cls(header, arrays, path)
        if columns.digest != digest:
            raise DataError(f"{path} is damaged (another digest); delete it")
        return columns

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the path where the columns are mapped, so that another process shares them."""
        if self.path is not None and os.path.exists(self.path):
            return Columns.open, (self.path,)
        return Columns, (self.header, self.arrays)


def with_names(**names: Names) -> dict[str, Column]:
    """Arrays of texts, for `Columns.names`."""
    found: dict[str, Column] = {}
    for name, each in names.items():
        found |= {f"{name} text": each.text, f"{name} ends": each.ends}
    return found


def kept(columns: Columns, path: Path) -> Columns:
    """The columns mapped from a cache file, or as they are where the cache cannot be written."""
    with contextlib.suppress(OSError, DataError):
        return columns.save(path)
    return columns
