"""Metrics on cases counted by hand; the equal error rate against all thresholds."""

import itertools
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from ssl_core.downstream.metrics import (
    accuracy,
    character_error_rate,
    equal_error_rate,
    word_error_rate,
)


def test_accuracy() -> None:
    assert accuracy(["a", "b", "b", "c"], ["a", "b", "c", "c"]) == 0.75
    assert accuracy(["a"], ["A"]) == 0.0
    with pytest.raises(ValueError, match="zip"):
        accuracy(["a", "b"], ["a"])


@pytest.mark.parametrize(
    ("expected", "predicted", "rate"),
    [
        (["ONE TWO THREE"], ["ONE TWO THREE"], 0.0),
        (["ONE TWO THREE"], ["ONE THREE"], 1 / 3),
        (["ONE TWO"], ["ONE BIG TWO"], 1 / 2),
        (["ONE TWO"], ["ONE TOO"], 1 / 2),
        (["ONE"], [""], 1.0),
        (["ONE"], ["TWO THREE FOUR"], 3.0),
        # The rate is over the words of all texts, not a mean over texts.
        (["ONE", "ONE TWO THREE"], ["TWO", "ONE TWO THREE"], 1 / 4),
        (["ONE TWO"], [" ONE  TWO "], 0.0),
    ],
)
def test_word_error_rate(expected: list[str], predicted: list[str], rate: float) -> None:
    assert word_error_rate(expected, predicted) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("expected", "predicted", "rate"),
    [
        (["ABCD"], ["ABCD"], 0.0),
        (["ABCD"], ["ABD"], 1 / 4),
        (["AB CD"], ["ABCD"], 1 / 5),
        (["AB"], [""], 1.0),
        (["A", "ABC"], ["B", "ABC"], 1 / 4),
        (["a \ue000b\ue0ff"], ["a b\ue0ff"], 1 / 5),
    ],
)
def test_character_error_rate(expected: list[str], predicted: list[str], rate: float) -> None:
    assert character_error_rate(expected, predicted) == pytest.approx(rate)


@pytest.mark.parametrize("rate", [accuracy, word_error_rate, character_error_rate])
def test_nothing_to_score_is_an_error(rate: object) -> None:
    with pytest.raises(DataError, match="nothing to score"):
        rate([], [])  # type: ignore[operator]


def scan(scores: Sequence[float], same: Sequence[bool]) -> Fraction:
    """The exact error rate where the interpolated rates of all thresholds cross."""
    owners = [score for score, own in zip(scores, same, strict=True) if own]
    others = [score for score, own in zip(scores, same, strict=True) if not own]
    points = []
    for threshold in (*sorted(set(scores)), float("inf")):
        kept_out = Fraction(sum(score < threshold for score in owners), len(owners))
        let_in = Fraction(sum(score >= threshold for score in others), len(others))
        points.append((kept_out, let_in))
    for (out, into), (out_next, into_next) in itertools.pairwise(points):
        if out_next >= into_next:
            # out + t * (out_next - out) == into + t * (into_next - into)
            t = (into - out) / ((into - out) + (out_next - into_next))
            return out + t * (out_next - out)
    raise AssertionError("the rates go from 0 and 1 to 1 and 0")


TRIALS = st.lists(
    # Few distinct scores, so that many are tied.
    st.tuples(st.integers(-3, 3).map(lambda x: x / 4), st.booleans()), min_size=2, max_size=30
).filter(lambda trials: len({same for _, same in trials}) == 2)  # fmt: skip


@given(TRIALS)
def test_equal_error_rate_is_that_of_an_exhaustive_scan(trials: list[tuple[float, bool]]) -> None:
    scores, same = zip(*trials, strict=True)
    rate, threshold = equal_error_rate(scores, same)
    assert rate == pytest.approx(float(scan(scores, same)), abs=1e-12)
    assert min(scores) <= threshold <= max(scores)


@given(TRIALS, st.randoms(use_true_random=False))
def test_the_order_of_trials_and_a_rising_scale_change_nothing(
    trials: list[tuple[float, bool]], random: object
) -> None:
    rate, _ = equal_error_rate(*zip(*trials, strict=True))
    random.shuffle(trials)  # type: ignore[attr-defined]
    scores, same = zip(*trials, strict=True)
    assert equal_error_rate([3 * s + 5 for s in scores], same)[0] == pytest.approx(rate)
    # Swapping impostors and targets and negating scores keeps the rate.
    mirrored = equal_error_rate([-s for s in scores], [not own for own in same])[0]
    assert mirrored == pytest.approx(rate)


@pytest.mark.parametrize(
    ("owners", "others", "rate"),
    [
        ([0.8, 0.9], [0.1, 0.2], 0.0),
        ([0.1, 0.2], [0.8, 0.9], 1.0),
        ([0.5, 0.5], [0.5, 0.5, 0.5], 0.5),
        ([0.9, 0.1], [0.8, 0.0], 0.5),
        ([0.9, 0.8, 0.1], [0.7, 0.0, 0.0], 1 / 3),
        # One threshold rejects none and accepts 1/4, the next rejects 1/3 and accepts none.
        ([0.9, 0.8, 0.5], [0.5, 0.0, 0.0, 0.0], 1 / 7),
    ],
)
def test_equal_error_rate_by_hand(owners: list[float], others: list[float], rate: float) -> None:
    same = [True] * len(owners) + [False] * len(others)
    assert equal_error_rate([*owners, *others], same)[0] == pytest.approx(rate)


def test_the_threshold_parts_what_can_be_parted() -> None:
    rate, threshold = equal_error_rate([0.9, 0.7, 0.4, 0.2], [True, True, False, False])
    assert rate == 0
    assert 0.4 < threshold <= 0.7


@pytest.mark.parametrize("kind", [True, False])
def test_trials_of_one_kind_have_no_error_rate(kind: bool) -> None:
    with pytest.raises(DataError, match="of the same and of different speakers"):
        equal_error_rate([0.1, 0.2], [kind, kind])


def test_scores_must_be_finite() -> None:
    with pytest.raises(DataError, match="not finite"):
        equal_error_rate([0.1, float("nan")], [True, False])
