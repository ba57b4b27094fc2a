"""Scores of downstream tasks: accuracy, word and character error rates, equal error rate."""

from collections.abc import Sequence

import jiwer
import numpy as np
import numpy.typing as npt

from common.errors import DataError

Floats = npt.NDArray[np.float64]


def accuracy(expected: Sequence[str], predicted: Sequence[str]) -> float:
    """Share of the clips whose class was found.

    Raises:
        DataError: nothing to score.
    """
    _some(expected)
    return float(np.mean([a == b for a, b in zip(expected, predicted, strict=True)]))


def word_error_rate(expected: Sequence[str], predicted: Sequence[str]) -> float:
    """Words to insert, delete or replace, as a share of the words expected (jiwer).

    Raises:
        DataError: nothing to score.
    """
    _some(expected)
    return float(jiwer.wer(list(expected), list(predicted)))


def character_error_rate(expected: Sequence[str], predicted: Sequence[str]) -> float:
    """Symbols to insert, delete or replace, as a share of the symbols expected (jiwer).

    Raises:
        DataError: nothing to score.
    """
    _some(expected)
    return float(jiwer.cer(list(expected), list(predicted)))


def equal_error_rate(scores: Sequence[float], same: Sequence[bool]) -> tuple[float, float]:
    """The rate at which as many impostors are let in as owners are kept out, and its threshold.

    Scores are sorted once. Between the two neighbouring thresholds where the rates cross, both are
    taken to be linear (as on the convex ROC of the two points).

    Args:
        scores: of trials; higher is more alike.
        same: whether the same person speaks in both recordings of a trial.

    Returns:
        The equal error rate in [0, 1] and the score at which it is reached.

    Raises:
        DataError: no trial of one kind, or a score that is not finite.
    """
    values, owners = np.asarray(scores, np.float64), np.asarray(same, bool)
    if not owners.any() or owners.all():
        raise DataError("the equal error rate needs trials of the same and of different speakers")
    if not np.isfinite(values).all():
        raise DataError("a trial has a score that is not finite")
    thresholds, places = np.unique(values, return_inverse=True)
    # Accepted is a score at or above a threshold; the last threshold accepts nothing.
    owned = np.bincount(places[owners], minlength=len(thresholds))
    foreign = np.bincount(places[~owners], minlength=len(thresholds))
    kept_out = np.concatenate([[0], np.cumsum(owned)]) / owned.sum()
    let_in = 1 - np.concatenate([[0], np.cumsum(foreign)]) / foreign.sum()
    gap = kept_out - let_in
    after = int(np.argmax(gap >= 0))
    edges = np.append(thresholds, thresholds[-1])
    if not gap[after] or not after:
        return float(kept_out[after]), float(edges[after])
    part = gap[after - 1] / (gap[after - 1] - gap[after])
    rate = kept_out[after - 1] + part * (kept_out[after] - kept_out[after - 1])
    return float(rate), float(edges[after - 1] + part * (edges[after] - edges[after - 1]))


def _some(expected: Sequence[str]) -> None:
    if not expected:
        raise DataError("there is nothing to score")
