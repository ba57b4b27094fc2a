"""Weights and updates as Flower's arrays, read without copying and never trusted."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fl_client.protocol import ProtocolError
from fl_client.updates import NUMPY, pack, size, unpack, view

VALUES = np.arange(12, dtype=np.float32).reshape(3, 4) / 7


def forged(data: bytes) -> Array:
    return Array("float32", (3, 4), NUMPY, data)


def test_there_and_back() -> None:
    tensors: dict[str, Any] = {
        "a": VALUES,
        "b": np.array(2.5, np.float32),
        "c": np.zeros((0, 3), np.float32),
    }
    record = pack(tensors.items())
    found = dict(unpack(record))
    assert list(found) == ["a", "b", "c"]
    for name, value in tensors.items():
        assert found[name].dtype == np.float32
        assert found[name].shape == value.shape
        assert np.array_equal(found[name], value)


def test_a_view_copies_nothing_and_cannot_be_written() -> None:
    array = Array(VALUES)
    seen = view(array)
    assert not seen.flags.writeable
    assert np.shares_memory(seen, np.frombuffer(array.data, np.uint8))


def test_a_view_of_a_memoryview() -> None:
    array = Array(VALUES)
    array.data = memoryview(array.data)
    assert np.array_equal(view(array), VALUES)


def test_size_is_that_of_the_payload() -> None:
    record = ArrayRecord({"a": Array(VALUES), "b": Array(VALUES)})
    assert size(record) == 2 * len(Array(VALUES).data)
    assert 2 * 48 < size(record) <= 2 * (48 + 128)


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(value), allow_pickle=True)
    return stream.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an array",
        Array(VALUES).data[:40],
        Array(VALUES).data[:-1],
        saved(np.array([{"a": 1}], dtype=object)),
        saved(np.asfortranarray(VALUES)),
    ],
    ids=["empty", "text", "header cut", "data cut", "pickle", "column order"],
)
def test_what_is_not_a_plain_array_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="an array cannot be read"):
        view(forged(data))


@settings(deadline=None, max_examples=300)
@given(place=st.integers(0, 127), value=st.integers(0, 255), cut=st.integers(0, 176))
@example(place=6, value=2, cut=176)
@example(place=6, value=9, cut=176)
def test_broken_bytes_give_an_array_or_a_protocol_error(place: int, value: int, cut: int) -> None:
    data = bytearray(Array(VALUES).data)
    data[place] = value
    with contextlib.suppress(ProtocolError):
        assert view(forged(bytes(data[:cut]))).nbytes <= 48
