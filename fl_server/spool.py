"""Keeps updates on disk until all replies of a round are there; memory holds one at a time."""

import mmap
import tempfile
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord


class Spool:
    """Updates on disk, in files without names: nothing is left of them when the process ends."""

    def __init__(self, folder: Path | None = None) -> None:
        """Start empty; `folder` is where files are made, None the system's temporary folder."""
        self.folder = folder
        self._kept: dict[int, tuple[Any, list[tuple[str, str, tuple[int, ...], str, int]]]] = {}

    def keep(self, key: int, update: ArrayRecord) -> None:
        """Write a client's update.

        Raises:
            OSError: the disk is full.
        """
        stream = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
        arrays = []
        for name, array in update.items():
            stream.write(array.data)
            size = len(array.data)
            arrays.append((name, array.dtype, tuple(array.shape), array.stype, size))
        stream.flush()
        self._kept[key] = stream, arrays

    def take(self, key: int) -> ArrayRecord:
        """A client's update, on memory that is mapped from its file; it is no longer kept."""
        stream, arrays = self._kept.pop(key)
        record, first = ArrayRecord(), 0
        with stream:
            size = sum(array[-1] for array in arrays)
            mapped = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ) if size else b""
        whole = memoryview(mapped)
        for name, dtype, shape, stype, length in arrays:
            array: Any = Array(dtype, shape, stype, b"")
            array.data = whole[first : first + length]
            record[name] = array
            first += length
        return record

    def waiting(self) -> list[int]:
        """Keys of the clients whose updates are kept, sorted."""
        return sorted(self._kept)

    def close(self) -> None:
        """Drop what is kept."""
        for stream, _ in self._kept.values():
            stream.close()
        self._kept.clear()
