"""Fewer bits for the network: what is lost is bounded, known, and made up for."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fl_client.encoding import TOP_FRACTION, Decoded, decode, encode
from fl_client.protocol import ENCODINGS, Encoding, ProtocolError
from fl_client.updates import pack

SHAPES = [(7,), (), (3, 5), (1, 1, 9), (4, 3, 2), (1, 6, 5), (300, 17)]
BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4, "topk": 48 * TOP_FRACTION}


def values(shape: tuple[int, ...], seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    sizes = rng.exponential(1, shape[:1]).reshape(-1, *[1] * (len(shape) - 1)) if shape else 1.0
    return np.asarray(rng.standard_normal(shape) * sizes, np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_there_and_back(shape: tuple[int, ...], encoding: Encoding) -> None:
    value = values(shape)
    found = decode(encode(value, encoding), shape, encoding)
    assert found.shape == shape
    assert found.dtype == np.float32
    if len(shape) < 2 or encoding == "fp32":
        assert np.array_equal(found, value)
    elif encoding in ("int8", "int4"):
        rows = shape[0] if shape[0] > 1 else int(np.prod(shape[:-1]))
        step = np.abs(value.reshape(rows, -1)).max(1) / (127 if encoding == "int8" else 7)
        assert (np.abs(found - value).reshape(rows, -1) <= 0.501 * step[:, None]).all()
    elif encoding == "bf16":
        assert np.array_equal(found, torch.from_numpy(value).bfloat16().float().numpy())
    else:
        largest = np.sort(np.abs(value).ravel())[-max(1, int(TOP_FRACTION * value.size)) :]
        assert np.allclose(np.sort(np.abs(found[found != 0])), largest, rtol=2**-8)


@given(arrays.arrays(np.float32, (5, 8), elements=st.floats(-(2.0**99), 2.0**99, width=32)))
@settings(max_examples=50, deadline=None)
def test_whatever_is_sent_comes_back_finite(value: Any) -> None:
    for encoding in ENCODINGS:
        assert np.isfinite(decode(encode(value, encoding), value.shape, encoding)).all()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_bytes_are_as_promised(encoding: Encoding) -> None:
    value = values((768, 3072))
    assert encode(value, encoding).nbytes <= 1.01 * BITS[encoding] / 8 * value.size


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_bytes_are_not_the_values_own(shape: tuple[int, ...], encoding: Encoding) -> None:
    """A client changes its tensors while their bytes wait to be sent."""
    value = values(shape)
    assert not np.shares_memory(encode(value, encoding), value)


@pytest.mark.parametrize("encoding", ["int8", "int4", "topk"])
def test_what_is_lost_comes_with_the_next_updates(encoding: Encoding) -> None:
    truth, sent, left = np.zeros((30, 40)), np.zeros((30, 40)), np.zeros((30, 40), np.float32)
    for number in range(60):
        update = values((30, 40), number)
        truth += update
        target = update + left
        decoded = decode(encode(target, encoding), target.shape, encoding)
        left, sent = target - decoded, sent + decoded
    assert np.allclose(truth - sent, left, atol=1e-3)
    assert np.abs(left).max() < 20 * np.abs(update).max()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_forged_bytes_are_refused(encoding: Encoding) -> None:
    good = encode(values((6, 8)), encoding)
    for bad in (good[:-1], np.append(good, good[:1]), good[:0]):
        record = pack([("w", np.ascontiguousarray(bad))])
        with pytest.raises(ProtocolError, match=r"w: \d+ bytes are not \(6, 8\)"):
            Decoded(record, {"w": (6, 8)}, encoding)["w"]
    with pytest.raises(ProtocolError, match="1 unknown tensors, such as w"):
        Decoded(pack([("w", good)]), {"v": (6, 8)}, encoding)


def test_a_place_outside_the_tensor_is_refused() -> None:
    data = encode(values((6, 8)), "topk")
    data[:4] = 255
    with pytest.raises(ProtocolError, match="outside"):
        decode(data, (6, 8), "topk")
