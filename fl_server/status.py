"""The current state of a federation: a file in the run directory, and a table of it."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from common import atomic, strict_json
from common.units import format_bytes, format_length, format_number, format_seconds
from fl_server.roster import Client
from ssl_core.training.run_directory import RunDirectory

STATUS = "status.json"
_KEPT = (
    "length", "batch", "micro_batch", "peak_bytes", "predicted_bytes", "memory_bytes",
    "train_seconds", "paused_seconds", "fallbacks",
)  # fmt: skip


@dataclasses.dataclass
class Status:
    """Writes a file at every change, for `python -m fl_server watch DIR`."""

    path: Path
    """The run directory."""
    rounds: int
    """Of the whole run."""
    advance: Callable[[], None] = lambda: None
    """Called for every reply."""

    def __post_init__(self) -> None:
        """Start without clients."""
        self.clients: dict[int, dict[str, Any]] = {}
        self.round = 0

    def began(self, number: int, cohort: Sequence[Client]) -> None:
        """Round `number`, from 0, is being sent to its cohort."""
        self.round = number
        for client in cohort:
            row = self.clients.setdefault(client.key, {"replies": 0, "failures": 0})
            row |= {"state": "training", "since": time.time(), "error": ""}
        self._write()

    def replied(self, key: int, metrics: dict[str, float] | None, error: str = "") -> None:
        """A client has answered, or is known not to.

        Args:
            key: the client's number.
            metrics: those of a folded update; None if there is none.
            error: why there is none.
        """
        row = self.clients[key]
        if metrics is None:
            row |= {"state": "failed", "error": error, "since": time.time()}
            row["failures"] += 1
        else:
            row |= {"state": "done", "since": time.time()}
            row |= {name: metrics[name] for name in _KEPT}
            row["replies"] += 1
        self._write()
        self.advance()

    def judged(self, key: int, refused: bool, reason: str) -> None:
        """A client's update was bounded, or refused after all.

        Args:
            key: the client's number.
            refused: whether the update does not count.
            reason: what was bounded, or why it does not count.
        """
        row = self.clients[key]
        row["error"] = reason
        if refused:
            row |= {"state": "failed", "replies": row["replies"] - 1}
            row["failures"] += 1
        self._write()

    def _write(self) -> None:
        values = {
            "round": self.round + 1,
            "rounds": self.rounds,
            "updated": time.time(),
            "clients": {str(key): row for key, row in sorted(self.clients.items())},
        }
        atomic.write_text(self.path / STATUS, strict_json.dumps(values) + "\n")


def is_done(path: Path) -> bool:
    """Whether all rounds of a run are done."""
    try:
        rounds = strict_json.loads((path / STATUS).read_text(encoding="utf-8"))["rounds"]
    except (OSError, ValueError):
        return False
    return len(RunDirectory.reopen(path).metrics()) >= rounds


def view(path: Path, now: float | None = None) -> Group:
    """A table of a federation's clients, and its latest metrics.

    Args:
        path: the run directory.
        now: seconds since the epoch; None is the current time.

    Raises:
        UsageError: the directory is not a run.
    """
    run = RunDirectory.reopen(path)
    now = time.time() if now is None else now
    try:
        status: dict[str, Any] = strict_json.loads((path / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Group(Text(f"{path}: waiting for the first round"))
    table = Table()
    for head in ("client", "now", "for", "crops", "at a time", "peak", "predicted", "may take",
                 "trained", "updates", "error"):  # fmt: skip
        table.add_column(head, justify="left" if head in ("now", "error") else "right")
    for key, row in status["clients"].items():
        known = "length" in row
        table.add_row(
            key,
            row["state"],
            format_seconds(max(0.0, now - row["since"])),
            f"{int(row['batch'])} x {format_length(row['length'])}" if known else "",
            str(int(row["micro_batch"])) if known else "",
            format_bytes(row["peak_bytes"]) if known else "",
            format_bytes(row["predicted_bytes"]) if known and row["predicted_bytes"] else "",
            format_bytes(row["memory_bytes"]) if known and row["memory_bytes"] else "",
            format_seconds(row["train_seconds"]) if known else "",
            str(row["replies"]),
            row["error"][:60],
            style={"failed": "red", "training": "yellow"}.get(row["state"]),
        )
    rows = run.metrics()
    lines = [f"round {status['round']} of {status['rounds']}, {len(rows)} done; {path}"]
    if rows:
        last = rows[-1]
        if "contrastive" in last:
            text = (
                f"loss {format_number(last['contrastive'], 3)}, "
                f"accuracy {format_number(last['accuracy'], 3)}"
            )
        else:
            text = (
                f"loss {format_number(last['loss'], 3)}, "
                f"on the clients' own clips {format_number(last['test_after'], 3)}"
            )
        if "held_out_loss" in last:
            text += (
                f"; held out: loss {format_number(last['held_out_loss'], 3)}, "
                f"accuracy {format_number(last['held_out_accuracy'], 3)}"
            )
        if last.get("undone"):
            text += "; the last round was undone"
        seconds = sum(row["round_seconds"] for row in rows) / len(rows)
        left = seconds * (status["rounds"] - len(rows))
        lines.append(f"{text}; about {format_seconds(left)} left")
    return Group(*(Text(line) for line in lines), table)
