"""The order of crops: a permutation of any size, another each epoch, even, by position alone."""

import collections
import itertools
import pickle
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from ssl_core.training.crop_order import CropOrder

SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 97, 127, 128, 129, 1023, 1024, 1025, 4099)


def epoch(size: int, number: int = 0, seed: int = 0, partition: int = 0) -> list[int]:
    order = CropOrder(size, seed, partition)
    return [order.place(number * size + place) for place in range(size)]


@pytest.mark.parametrize("size", SIZES)
def test_each_place_comes_once_an_epoch(size: int) -> None:
    for number in (0, 1, 1_000_000):
        assert sorted(epoch(size, number)) == list(range(size))


def test_places_of_three_million_differ() -> None:
    order, size = CropOrder(3_000_017, 5, 2), 3_000_017
    positions = np.random.default_rng(0).choice(size, 30_000, replace=False)
    places = {order.place(int(position)) for position in positions}
    assert len(places) == len(positions)
    assert 0 <= min(places) < 1_000
    assert size - 1_000 < max(places) < size


def test_epochs_seeds_and_partitions_differ() -> None:
    orders = [
        epoch(1000),
        epoch(1000, number=1),
        epoch(1000, number=2),
        epoch(1000, seed=1),
        epoch(1000, partition=1),
    ]
    for one, other in itertools.combinations(orders, 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 8  # 1 by chance


@pytest.mark.parametrize(("size", "limit"), [(2, 10.8), (3, 20.6), (4, 49.7), (5, 172.5)])
def test_all_permutations_of_few_places_are_as_likely(size: int, limit: float) -> None:
    # Chi-squared of as many epochs as 50 for each permutation, below its 99.9th percentile.
    expected = 50
    every = list(itertools.permutations(range(size)))
    counts = collections.Counter(tuple(epoch(size, n)) for n in range(expected * len(every)))
    assert sum((counts[each] - expected) ** 2 / expected for each in every) < limit


def test_where_a_place_comes_is_even_and_neighbours_part() -> None:
    size, epochs, parts = 1000, 40, 10
    orders = np.array([epoch(size, number) for number in range(epochs)])
    table = np.zeros((parts, parts))
    for order in orders:
        np.add.at(table, (np.arange(size) * parts // size, order * parts // size), 1)
    expected = size * epochs / parts**2
    assert ((table - expected) ** 2 / expected).sum() < 126.0  # 99.9th percentile, 81 degrees
    steps = np.abs(np.diff(orders, axis=1))
    assert steps.mean() == pytest.approx(size / 3, rel=0.02)
    assert np.mean(steps == 1) == pytest.approx(2 / size, rel=0.3)


def test_starts_are_even_and_within_the_sequence() -> None:
    order = CropOrder(10, 0, 0)
    starts = np.array([order.start(position, 99) for position in range(10_000)])
    counts = np.bincount(starts, minlength=100)
    assert len(counts) == 100
    assert ((counts - 100) ** 2 / 100).sum() < 148.1  # chi-squared of 99 degrees, 99.9th percentile
    assert order.start(7, 0) == 0
    assert np.corrcoef(starts[:-1], starts[1:])[0, 1] == pytest.approx(0, abs=0.03)


def test_the_order_is_that_of_this_version() -> None:
    # A run that goes on takes the crops that it would have taken.
    assert epoch(10) == [5, 1, 7, 3, 0, 4, 2, 8, 6, 9]
    order = CropOrder(3_000_017, 7, 3)
    assert [order.place(position) for position in (0, 1, 3_000_017)] == [1957376, 644308, 1128]
    assert [order.start(position, 1_600) for position in range(4)] == [667, 676, 1264, 293]


def test_other_processes_agree() -> None:
    order = CropOrder(5000, 3, 1)
    expected = [order.place(position) for position in range(64)]
    with ProcessPoolExecutor(1) as pool:
        assert list(pool.map(pickle.loads(pickle.dumps(order)).place, range(64))) == expected
