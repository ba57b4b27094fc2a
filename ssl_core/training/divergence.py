"""Ends a training that has diverged: one rule for central pretraining, fine-tuning, federations.

An update fails if its gradient is not finite. One that the loss scale of fp16 explains, whose loss
is finite while the scale can still fall, does not count: skipping it is how the scale is found.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from common.errors import ShortwaveError

PATIENCE = 10
"""Failed updates in a row after which a training has diverged."""
ADVICE = (
    "try a lower learning rate, a longer warm-up, gradient clipping (recipe.clip-norm), or fp32 if "
    "the precision was 16 bits"
)


class Diverged(ShortwaveError):
    """Training has diverged; what it has learnt since is lost."""

    def __init__(self, what: str, saved: Path | None) -> None:
        """Say what was seen, what is left and what to try.

        Args:
            what: what is not finite, and since when.
            saved: the newest checkpoint, whose weights are finite; None if there is none.
        """
        left = "no checkpoint was saved before"
        if saved is not None:
            left = f"the last checkpoint with finite weights is {saved}"
        super().__init__(f"training has diverged: {what}; {left}; {ADVICE}")


class Update(Protocol):
    """The report of an update."""

    @property
    def loss(self) -> float:
        """Mean loss."""

    @property
    def applied(self) -> bool:
        """Whether the gradient was finite."""

    @property
    def loss_scale(self) -> float:
        """By which the loss was multiplied; 1 except in fp16."""


class Watch:
    """Counts the updates of a run that were applied, and those that failed since."""

    def __init__(self, newest: Callable[[], Path | None]) -> None:
        """Start before the first update; `newest` returns the run's newest checkpoint."""
        self._newest = newest
        self.applied = self.skipped = self.failed = self.since = 0

    def take(self, done: int, report: Update) -> None:
        """Take note of an update.

        Args:
            done: number of updates done, this one included.
            report: of the update.

        Raises:
            Diverged: `PATIENCE` updates in a row have failed.
        """
        if report.applied:
            self.applied, self.failed = self.applied + 1, 0
            return
        self.skipped += 1
        if math.isfinite(report.loss) and report.loss_scale > 1:
            return
        self.failed += 1
        if self.failed == 1:
            self.since = done
        if self.failed >= PATIENCE:
            raise self._diverged()

    def finish(self) -> None:
        """Check a run whose updates are all done; raises `Diverged` if all of them failed."""
        if self.failed and not self.applied:
            raise self._diverged()

    def require_finite(self, name: str, value: float, done: int) -> None:
        """Check a loss of an evaluation.

        Args:
            name: of the loss.
            value: the loss.
            done: number of updates done.

        Raises:
            Diverged: it is not finite.
        """
        if not math.isfinite(value):
            raise Diverged(f"the {name} is not finite after update {done}", self._newest())

    def _diverged(self) -> Diverged:
        return Diverged(
            f"the gradient is not finite from update {self.since} on ({self.failed} updates)",
            self._newest(),
        )

    def state(self) -> dict[str, int]:
        """For a checkpoint."""
        return {
            "applied": self.applied,
            "skipped": self.skipped,
            "failed": self.failed,
            "since": self.since,
        }

    def load(self, state: Mapping[str, Any], done: int) -> None:
        """Restore `state`; in a checkpoint of version 0.1, which has none, all `done` are applied.

        Args:
            state: of the checkpoint; may be empty.
            done: number of updates done.

        Raises:
            ValueError: a value is not a number.
        """
        self.applied = int(state.get("applied", done))
        self.skipped, self.failed = int(state.get("skipped", 0)), int(state.get("failed", 0))
        self.since = int(state.get("since", 0))


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors `[...]` with NaN or infinity in them."""
    return [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
