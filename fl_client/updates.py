"""Weights and updates as Flower's arrays, read without copying."""

import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord

from fl_client.protocol import ProtocolError

Floats = npt.NDArray[np.float32]
NUMPY = "numpy.ndarray"
"""How flwr names the `.npy` serialisation of an array."""


def view(array: Array) -> npt.NDArray[Any]:
    """A read-only view of an array's data, in place.

    Raises:
        ProtocolError: the data is not what the array says it is.
    """
    try:
        stream = io.BytesIO(memoryview(array.data)[:4096])
        major, _ = np.lib.format.read_magic(stream)
        reader = (
            np.lib.format.read_array_header_1_0
            if major == 1
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = reader(stream)
        if dtype.hasobject or fortran:
            raise ValueError("not a plain array")
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(array.data, dtype, count, stream.tell()).reshape(shape)
    except Exception as error:  # NumPy reads the header as Python: whatever bytes are, it raises
        raise ProtocolError(f"an array cannot be read: {error}") from None


def pack(tensors: Iterable[tuple[str, npt.NDArray[Any]]]) -> ArrayRecord:
    """Named tensors as an ArrayRecord."""
    return ArrayRecord({name: Array(value) for name, value in tensors})


def unpack(record: ArrayRecord) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Named tensors of an ArrayRecord, one at a time, without copying."""
    for name, array in record.items():
        yield name, view(array)


class Views(Mapping[str, npt.NDArray[Any]]):
    """Named tensors of an ArrayRecord, each read in place when it is asked for."""

    def __init__(self, record: ArrayRecord) -> None:
        self._record = record

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """A tensor; `ProtocolError` when its data is not what it says it is."""
        return view(self._record[name])

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self._record)

    def __len__(self) -> int:
        """How many tensors."""
        return len(self._record)


def size(record: ArrayRecord) -> int:
    """Bytes of payload."""
    return sum(len(array.data) for array in record.values())
