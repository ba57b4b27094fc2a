"""What a fault cost a run, judged from what lies on disk."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from common.errors import ShortwaveError
from fl_client.federation_settings import PretrainingFederation
from ssl_core.training import checkpoint
from ssl_core.training.stored_settings import stored_settings

_FAILURE = re.compile(r"^ *client (\d+): (.+)$", re.MULTILINE)
_ROUND = re.compile(r"^round (\d+)/\d+  loss", re.MULTILINE)


@dataclasses.dataclass
class Outcome:
    """The outcome of a run with one fault."""

    fault: str
    encoding: str
    completed: bool = False
    """At the end, all rounds are in metrics.jsonl."""
    rounds_lost: int = 0
    """Rounds that failed or had to be repeated."""
    audio_counted_twice: bool = False
    """A client was folded twice in a round, or an update of another round was folded."""
    state_lost: bool = False
    """The run directory or its last checkpoint cannot be opened, or a client never recovered."""
    updates_lost: int = 0
    """Clients missing from a round, summed over rounds."""
    clients_not_back: int = 0
    """Clients missing from the last round."""
    bad_updates_folded: int = 0
    """Poisoned, truncated or replayed updates, and a liar's, that were folded as they came."""
    bad_updates_bounded: int = 0
    """A liar's updates of which the weight or the norm was bounded."""
    resumed: int = 0
    """How often the run was resumed."""
    seconds: float = 0.0
    notes: list[str] = dataclasses.field(default_factory=list)


def resume_problems(output: Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why the run directory `output` cannot be resumed; empty if it can. `rows`: its metrics."""
    try:
        stored_settings(PretrainingFederation, output)
        last = checkpoint.latest(output / "checkpoints")
        if last is None:
            return ["rounds are logged but there is no checkpoint"] if len(rows) > 1 else []
        loaded = checkpoint.load(last)
        done = int(loaded.state["next_round"])
    except (ShortwaveError, OSError, ValueError, KeyError) as error:
        return [f"run directory: {error}"]
    if not all(bool(torch.isfinite(value).all()) for value in loaded.weights.values()):
        return [f"{last.name} has weights that are not finite"]
    if len(rows) not in (done, done + 1):
        return [f"{last.name}, but {len(rows)} rounds are logged"]
    return []


def lost_states(stream: str) -> Iterator[tuple[str, int]]:
    """Clients that reported StateLost, each with its round (from 1), from the run's output."""
    number = 0
    for line in stream.splitlines():
        if found := _ROUND.match(line):
            number = int(found[1])
        elif (failure := _FAILURE.match(line)) and "StateLost" in failure[2]:
            yield failure[1], number


def failures_of(stream: str) -> list[str]:
    """Each different failure of a client in the run's output."""
    return sorted({f"client {key}: {reason}" for key, reason in _FAILURE.findall(stream)})


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Sums of the outcomes' figures."""
    return {"runs": len(outcomes)} | {
        name: sum(int(getattr(outcome, name)) for outcome in outcomes)
        for name in (
            "completed", "rounds_lost", "audio_counted_twice", "state_lost", "updates_lost",
            "clients_not_back", "bad_updates_folded", "bad_updates_bounded", "resumed",
        )
    }  # fmt: skip


def describe(outcome: Outcome) -> str:
    """An outcome in one line."""
    values = dataclasses.asdict(outcome)
    told = [f"{outcome.fault} ({outcome.encoding}, {outcome.seconds:.0f} s):"]
    told.append("completed" if outcome.completed else "NOT completed")
    told += [
        f"{name.replace('_', ' ')} {int(values[name])}"
        for name in ("rounds_lost", "audio_counted_twice", "state_lost", "updates_lost",
                     "clients_not_back", "bad_updates_folded", "bad_updates_bounded")
        if values[name]
    ]  # fmt: skip
    return "  ".join([*told, *(f"[{note}]" for note in outcome.notes)])
