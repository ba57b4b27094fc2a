"""Weights and updates as Flower's arrays, read without copying and never trusted."""

import contextlib
import json
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fl_client import updates
from fl_client.protocol import ProtocolError
from fl_client.updates import FORMAT, Views, pack, size

VALUES = np.arange(12, dtype=np.float32).reshape(3, 4) / 7


def packed() -> bytes:
    (array,) = pack([("a", VALUES)]).values()
    return array.data


def record_of(*data: bytes, kind: str = FORMAT) -> ArrayRecord:
    return ArrayRecord(
        {str(number): Array("uint8", (len(own),), kind, own) for number, own in enumerate(data)}
    )


def with_header(entry: object, payload: bytes = VALUES.tobytes()) -> bytes:
    text = json.dumps(entry).encode()
    return len(text).to_bytes(8, "little") + text + payload


def test_there_and_back() -> None:
    tensors: dict[str, Any] = {
        "a": VALUES,
        "bytes": np.arange(5, dtype=np.uint8),
        "b": np.array(2.5, np.float32),
        "c": np.zeros((0, 3), np.float32),
    }
    found = dict(Views(pack(tensors.items())))
    assert list(found) == list(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert np.array_equal(found[name], value)


def test_small_tensors_share_a_bundle_and_large_ones_have_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(updates, "BUNDLE", 100)
    sizes = (10, 10, 5, 40, 1, 1, 30)
    tensors = {str(number): np.full(n, number, np.float32) for number, n in enumerate(sizes)}
    record = pack(tensors.items())
    assert [list(Views(ArrayRecord({"x": array}))) for array in record.values()] == [
        ["0", "1", "2"], ["3"], ["4", "5"], ["6"],
    ]  # fmt: skip
    assert {name: value.tolist() for name, value in Views(record).items()} == {
        name: value.tolist() for name, value in tensors.items()
    }


def test_a_bundle_is_let_go_when_all_of_it_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "BUNDLE", 100)
    record = pack([("a", VALUES), ("b", VALUES), ("c", VALUES)])
    views = Views(record)
    assert len(record) == 2
    views.release("a")
    assert (len(record), set(views)) == (2, {"b", "c"})
    assert np.array_equal(views["b"], VALUES)
    views.release("b")
    assert (len(record), set(views)) == (1, {"c"})


def test_a_view_copies_nothing_and_cannot_be_written() -> None:
    record = pack([("a", VALUES)])
    seen = Views(record)["a"]
    assert not seen.flags.writeable
    (array,) = record.values()
    assert np.shares_memory(seen, np.frombuffer(array.data, np.uint8))


def test_a_view_of_a_memoryview() -> None:
    record = pack([("a", VALUES)])
    for array in record.values():
        array.data = memoryview(array.data)
    assert np.array_equal(Views(record)["a"], VALUES)


def test_size_is_that_of_the_payload() -> None:
    record = pack([("a", VALUES), ("b", VALUES)])
    assert 2 * 48 < size(record) <= 2 * (48 + 128)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an array",
        packed()[:40],
        packed()[:-1],
        packed() + b" ",
        with_header({"a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [-48, 0]}}, b""),
        with_header({"a": {"dtype": "F32", "shape": [-3, -4], "data_offsets": [0, 48]}}),
        with_header({"a": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 48]}}),
        with_header({"a": {"dtype": "F32", "shape": [2**40] * 9, "data_offsets": [0, 48]}}),
        with_header({"a": {"dtype": "I64", "shape": [6], "data_offsets": [0, 48]}}),
        with_header({"a": {"dtype": "F3", "shape": [12], "data_offsets": [0, 48]}}),
        with_header({"a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, float("inf")]}}),
        with_header({"a": {"dtype": "F32", "shape": [float("nan")], "data_offsets": [0, 48]}}),
        with_header({"a": {"dtype": "F32", "shape": [10**400], "data_offsets": [0, 48]}}),
        with_header({"a": {"dtype": "F32", "shape": [2**1000] * 9, "data_offsets": [0, 48]}}),
        with_header({"a": {"dtype": ["F32"], "shape": [12], "data_offsets": [0, 48]}}),
        with_header({"a": [12]}),
        with_header([12]),
        with_header("a"),
    ],
)
def test_what_is_not_a_bundle_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="an array cannot be read"):
        Views(record_of(data))


def test_another_format_and_a_name_that_is_there_twice_are_refused() -> None:
    with pytest.raises(ProtocolError, match=r"format 'numpy\.ndarray'"):
        Views(record_of(packed(), kind="numpy.ndarray"))
    with pytest.raises(ProtocolError, match="a is there twice"):
        Views(record_of(packed(), packed()))


@settings(deadline=None, max_examples=300)
@given(place=st.integers(0, 127), value=st.integers(0, 255), cut=st.integers(0, 176))
@example(place=0, value=255, cut=176)
@example(place=4, value=1, cut=176)
def test_broken_bytes_give_arrays_or_a_protocol_error(place: int, value: int, cut: int) -> None:
    data = bytearray(packed())
    data[place % len(data)] = value
    with contextlib.suppress(ProtocolError):
        for found in Views(record_of(bytes(data[:cut]))).values():
            assert found.nbytes <= 48
