"""Metrics of downstream tasks: accuracy, word, character and equal error rates."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import DataError, UsageError

Floats = npt.NDArray[np.float64]


def accuracy(expected: Sequence[str], predicted: Sequence[str]) -> float:
    """Fraction of clips whose class was predicted.

    Raises:
        DataError: nothing to score.
    """
    _check_not_empty(expected)
    return float(np.mean([a == b for a, b in zip(expected, predicted, strict=True)]))


def word_error_rate(expected: Sequence[str], predicted: Sequence[str]) -> float:
    """Word edits (insertions, deletions, substitutions) per expected word (jiwer).

    Raises:
        DataError: nothing to score.
    """
    _check_not_empty(expected)
    return float(_jiwer().wer(list(expected), list(predicted)))


def character_error_rate(expected: Sequence[str], predicted: Sequence[str]) -> float:
    """Symbol edits (insertions, deletions, substitutions) per expected symbol (jiwer).

    Raises:
        DataError: nothing to score.
    """
    _check_not_empty(expected)
    return float(_jiwer().cer(list(expected), list(predicted)))


def equal_error_rate(scores: Sequence[float], same: Sequence[bool]) -> tuple[float, float]:
    """Equal error rate: where the false acceptance and false rejection rates are equal.

    Both rates are interpolated linearly between the two neighbouring thresholds where they cross
    (as on the convex ROC of the two points).

    Args:
        scores: of trials; higher is more similar.
        same: whether both recordings of a trial are of the same speaker.

    Returns:
        The equal error rate in [0, 1] and its threshold.

    Raises:
        DataError: no trial of the same or of different speakers, or a score that is not finite.
    """
    values, targets = np.asarray(scores, np.float64), np.asarray(same, bool)
    if not targets.any() or targets.all():
        raise DataError("the equal error rate needs trials of the same and of different speakers")
    if not np.isfinite(values).all():
        raise DataError("a trial has a score that is not finite")
    thresholds, places = np.unique(values, return_inverse=True)
    # Scores at or above a threshold are accepted; the last threshold accepts nothing.
    targets_at = np.bincount(places[targets], minlength=len(thresholds))
    impostors_at = np.bincount(places[~targets], minlength=len(thresholds))
    rejected = np.concatenate([[0], np.cumsum(targets_at)]) / targets_at.sum()
    accepted = 1 - np.concatenate([[0], np.cumsum(impostors_at)]) / impostors_at.sum()
    gap = rejected - accepted
    after = int(np.argmax(gap >= 0))
    edges = np.append(thresholds, thresholds[-1])
    if not gap[after] or not after:
        return float(rejected[after]), float(edges[after])
    part = gap[after - 1] / (gap[after - 1] - gap[after])
    rate = rejected[after - 1] + part * (rejected[after] - rejected[after - 1])
    return float(rate), float(edges[after - 1] + part * (edges[after] - edges[after - 1]))


def _check_not_empty(expected: Sequence[str]) -> None:
    if not expected:
        raise DataError("nothing to score")


def require_error_rates() -> None:
    """Check that word and character error rates can be computed.

    Raises:
        UsageError: jiwer is not installed.
    """
    _jiwer()


def _jiwer() -> Any:
    try:
        import jiwer
    except ImportError:
        raise UsageError(
            "tasks that transcribe need jiwer: pip install jiwer, or install the extra `tasks`"
        ) from None
    return jiwer
