"""What a round did, and what those who look on are told meanwhile."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from fl_server.roster import Client


@dataclasses.dataclass(frozen=True)
class RoundResult:
    """What a round did."""

    number: int
    """From 0."""
    metrics: dict[str, float]
    """Means over clients, weighted by audio; counts and bytes are sums."""
    clients: tuple[dict[str, float], ...]
    """Metrics of each client whose update was folded, with its `key`, ordered by key."""
    failures: tuple[str, ...]
    """A line for each other client of the cohort."""
    bounded: tuple[str, ...] = ()
    """A line for each folded update of which something was bounded."""


class Observer(Protocol):
    """Is told what happens in a round."""

    def began(self, number: int, cohort: Sequence[Client]) -> None:
        """Round `number` is being sent to its cohort."""

    def replied(self, key: int, metrics: dict[str, float] | None, error: str = "") -> None:
        """A client has answered, or is known not to.

        Args:
            key: the client's number.
            metrics: those of a folded update; None if there is none.
            error: why there is none.
        """

    def judged(self, key: int, refused: bool, reason: str) -> None:
        """A client's update was bounded, or refused after all, when the cohort had answered.

        Args:
            key: the client's number.
            refused: whether the update does not count.
            reason: what was bounded, or why it does not count.
        """
