"""Federated averaging one reply at a time: exact numbers, any order, nothing of a bad update."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_server.fold import LARGEST_CHANGE, Fold, RejectedUpdate

Update = dict[str, npt.NDArray[np.float32]]


def single(*values: float) -> Update:
    return {"w": np.array(values, np.float32)}


def mean(updates: list[tuple[Update, int]], order: list[int] | None = None) -> Update:
    fold = Fold({name: value.shape for name, value in updates[0][0].items()})
    for place in order or range(len(updates)):
        update, weight = updates[place]
        fold.add(update, weight)
    return dict(fold.mean())


def test_exact_numbers() -> None:
    result = mean([(single(1.0, -2.0, 0.5), 1), (single(0.0, 6.0, -1.5), 3)])
    assert result["w"].tolist() == [0.25, 4.0, -1.0]
    assert result["w"].dtype == np.float32


def test_one_client_is_its_own_mean() -> None:
    rng = np.random.default_rng(0)
    update = {
        "a": rng.normal(0, 1e-3, (3, 4)).astype(np.float32),
        "b": np.array(0.25, np.float32),
        "c": np.zeros((0, 5), np.float32),
    }
    result = mean([(update, 80_000)])
    assert {name: value.shape for name, value in result.items()} == {
        "a": (3, 4), "b": (), "c": (0, 5),
    }  # fmt: skip
    np.testing.assert_allclose(result["a"], update["a"], rtol=0, atol=4e-12)
    assert result["b"] == np.float32(0.25)


def test_as_good_as_float64_with_the_weights_of_real_crops() -> None:
    rng = np.random.default_rng(1)
    updates = [(single(*rng.normal(0, 1e-4, 200)), int(rng.integers(1, 40)) * 80_000)
               for _ in range(100)]  # fmt: skip
    exact: Any = sum(update["w"].astype(np.float64) * weight for update, weight in updates)
    exact /= sum(weight for _, weight in updates)
    np.testing.assert_allclose(mean(updates)["w"], exact, rtol=2e-7, atol=3e-12)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_order_gives_the_same_bits(data: st.DataObject) -> None:
    number = data.draw(st.integers(2, 8))
    value = st.floats(-LARGEST_CHANGE, LARGEST_CHANGE, width=32)
    updates = [
        (single(*data.draw(st.lists(value, min_size=3, max_size=3))),
         data.draw(st.integers(1, 10**9)))
        for _ in range(number)
    ]  # fmt: skip
    order = data.draw(st.permutations(range(number)))
    assert mean(updates)["w"].tobytes() == mean(updates, order)["w"].tobytes()


@pytest.mark.parametrize(
    ("update", "weight", "reason"),
    [
        (single(1.0, float("nan")), 1, "w has values not finite"),
        (single(1.0, float("inf")), 1, "w has values not finite"),
        (single(1.0, -float("inf")), 1, "w has values not finite"),
        (single(1.0, -17.0), 1, "w has values as large as 17"),
        (single(1.0), 1, "not float32"),
        ({"w": np.zeros(2, np.float64)}, 1, "w is float64"),
        ({"w": np.zeros(2, np.int64)}, 1, "w is int64"),
        ({"v": np.zeros(2, np.float32)}, 1, "2 tensors missing or unknown, such as v"),
        ({}, 1, "1 tensors missing or unknown, such as w"),
        (single(1.0, 1.0), 0, "no audio"),
        (single(1.0, 1.0), -5, "no audio"),
        (single(16.0, 1.0), 2**60, "overflow"),
    ],
)
def test_a_bad_update_is_refused_whole(update: Update, weight: int, reason: str) -> None:
    fold = Fold({"w": (2,)})
    fold.add(single(3.0, 5.0), 2)
    with pytest.raises(RejectedUpdate, match=reason):
        fold.add(update, weight)
    assert (fold.count, fold.weight) == (1, 2)
    assert dict(fold.mean())["w"].tolist() == [3.0, 5.0]


def test_a_bad_last_tensor_leaves_nothing_of_the_first() -> None:
    fold = Fold({"a": (2,), "b": (1,)})
    bad = {"a": np.ones(2, np.float32), "b": np.array([np.nan], np.float32)}
    with pytest.raises(RejectedUpdate, match="b has values not finite"):
        fold.add(bad, 1)
    assert fold.sums["a"].tolist() == [0, 0]


def test_updates_that_would_overflow_together_are_refused_before_they_do() -> None:
    fold = Fold({"w": (1,)})
    weight = 2**35  # 16 * 2**35 = 2**39, half of what the sum holds
    fold.add(single(LARGEST_CHANGE), weight)
    with pytest.raises(RejectedUpdate, match="overflow"):
        fold.add(single(LARGEST_CHANGE), weight)
    assert fold.sums["w"].tolist() == [2**61]
    fold.add(single(LARGEST_CHANGE), weight - 1)
    assert dict(fold.mean())["w"].tolist() == [LARGEST_CHANGE]
