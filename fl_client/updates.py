"""Weights and updates as Flower arrays that each hold many tensors, read without copying.

Flower makes an object of every array and of every 5 MiB of it, and sends each object in a request
of its own. Two hundred small arrays of a model cost the SuperLink more than their bytes do, so
tensors travel in bundles, in the safetensors format.
"""

import io
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord

from fl_client.protocol import ProtocolError
from ssl_core.training.tensor_file import Entry, read_header, write_stream

Floats = npt.NDArray[np.float32]
BUNDLE = 15 * 2**20
"""Most bytes of a bundle of several tensors: the part of a message that a client holds in memory
beside the model while it reads or writes the message."""
FORMAT = "safetensors"
_TYPES: dict[torch.dtype, "np.dtype[Any]"] = {
    torch.float32: np.dtype(np.float32),
    torch.uint8: np.dtype(np.uint8),
}


def as_tensor(value: npt.NDArray[Any]) -> torch.Tensor:
    """An array `[...]` as a tensor on its memory, which may be read-only: never write to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(value)


def pack(tensors: Iterable[tuple[str, npt.NDArray[Any]]]) -> ArrayRecord:
    """Pack tensors into an ArrayRecord of bundles.

    Args:
        tensors: distinct names and arrays, fp32 or uint8, each `[...]`.
    """
    record, bundle, size = ArrayRecord(), dict[str, torch.Tensor](), 0

    def close() -> None:
        stream = io.BytesIO()
        write_stream(stream, bundle)
        bundle.clear()
        data = stream.getvalue()
        record[f"{len(record):04d}"] = Array("uint8", (len(data),), FORMAT, data)

    for name, value in tensors:
        if bundle and size + value.nbytes > BUNDLE:
            close()
            size = 0
        bundle[name] = as_tensor(value)
        size += value.nbytes
    if bundle:
        close()
    return record


class Views(Mapping[str, npt.NDArray[Any]]):
    """Named tensors of an ArrayRecord, as read-only views of its memory."""

    def __init__(self, record: ArrayRecord) -> None:
        """Read the bundles' headers.

        Raises:
            ProtocolError: a broken bundle, or a name that occurs twice.
        """
        self._record = record
        self._places: dict[str, tuple[str, Entry]] = {}
        self._left: dict[str, int] = {}
        for key, array in record.items():
            try:
                if array.stype != FORMAT:
                    raise ValueError(f"it is in the format '{array.stype}'")
                stream = io.BytesIO(memoryview(array.data)[:_HEADER])
                entries = read_header(stream, len(array.data))
            except (ValueError, RecursionError) as error:
                raise ProtocolError(f"an array cannot be read: {error}") from None
            for name, entry in entries.items():
                if entry.dtype not in _TYPES:
                    kind = str(entry.dtype).removeprefix("torch.")
                    raise ProtocolError(f"an array cannot be read: {name} is {kind}")
                if name in self._places:
                    raise ProtocolError(f"{name} is there twice")
                self._places[name] = (key, entry)
            self._left[key] = len(entries)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """A tensor `[...]` on the message's memory."""
        key, (dtype, shape, start, end) = self._places[name]
        kind = _TYPES[dtype]
        count = (end - start) // kind.itemsize
        data: Any = self._record[key].data
        return np.frombuffer(data, kind, count, start).reshape(shape)

    def release(self, name: str) -> None:
        """Drop a tensor; a bundle's memory is freed with its last tensor and view."""
        key, _ = self._places.pop(name)
        self._left[key] -= 1
        if not self._left[key]:
            del self._record[key]

    def __iter__(self) -> Iterator[str]:
        """Names of the tensors."""
        return iter(self._places)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._places)


_HEADER = 2**20
"""Largest header of a bundle in bytes: some ten thousand tensors."""


def size(record: ArrayRecord) -> int:
    """Bytes of payload in a record."""
    return sum(len(array.data) for array in record.values())
