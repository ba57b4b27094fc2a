"""What a federation trains: what its jobs have in common, and how a round is reported."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid
from torch import Tensor

from common.units import format_bytes, format_seconds
from fl_client.federation_settings import RunSettings
from fl_server.roster import Client
from fl_server.round_result import RoundResult
from fl_server.rounds import Federation
from partitions.corpus_record import NOTHING
from partitions.sampling import SAMPLE_RATE
from ssl_core.training.run_directory import RunDirectory

_OF_A_CLIENT = ("length", "batch", "micro_batch", "peak_bytes", "fallbacks")


class Job:
    """One kind of training, as the server sees it."""

    weights: dict[str, Tensor]
    """Global weights by parameter name, each `[...]`; each round changes them in place."""
    told: Mapping[str, str] = {}
    """What clients are told in every round, by the names of `protocol.instructions`, so that none
    trains something else."""
    record = NOTHING
    """Of the corpus that the server reads, with which a resumed run is compared."""

    def start(self) -> list[str]:
        """Load the weights that the settings name, for a run without a checkpoint.

        Returns:
            Lines to print.
        """
        return []

    def restore(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Load the weights of a checkpoint; returns its state and other tensors, each `[...]`."""
        raise NotImplementedError

    def save(self, path: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint.

        Args:
            path: new directory.
            state: see `Federation.state`.
            tensors: see `Federation.tensors`, each `[...]`.
        """
        raise NotImplementedError

    def evaluate(self) -> dict[str, Any]:
        """Evaluate the current weights on the server; metrics to add to those of a round."""
        return {}

    def row(self, result: RoundResult) -> dict[str, Any]:
        """The metrics of a round that are logged."""
        raise NotImplementedError

    def line(self, row: Mapping[str, Any]) -> str:
        """A round's logged metrics in words, without times and bytes."""
        raise NotImplementedError

    def warning(self, result: RoundResult) -> str | None:
        """A warning about a round, or None."""
        return None

    def finish(
        self, federation: Federation, grid: Grid, clients: list[Client], run: RunDirectory
    ) -> list[str]:
        """Finish a run when all rounds are done.

        Args:
            federation: with the final weights.
            grid: connects to the clients.
            clients: those connected.
            run: where results are written.

        Returns:
            Lines to print.
        """
        return []

    def plot(self, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
        """Draw the curves of a run."""


def client_rows(result: RoundResult) -> list[dict[str, Any]]:
    """What is logged of each client whose update was folded."""
    return [
        {
            "key": int(client["key"]),
            "seconds": client["samples"] / SAMPLE_RATE,
            **{name: client[name] for name in _OF_A_CLIENT},
        }
        for client in result.clients
    ]


def describe_round(
    job: Job, result: RoundResult, row: Mapping[str, Any], settings: RunSettings
) -> str:
    """A round in one line.

    Args:
        job: what is trained.
        result: of the round.
        row: the round's logged metrics.
        settings: of the run.
    """
    metrics = result.metrics
    skipped = sum(int(v) for k, v in metrics.items() if k.startswith("skipped_"))
    text = (
        f"round {result.number + 1}/{settings.rounds}  {job.line(row)}"
        f"  | {format_seconds(metrics['round_seconds'])}"
        f", sent {format_bytes(metrics['bytes_sent'])}"
        f", received {format_bytes(metrics['bytes_received'])}"
    )
    if skipped:
        text += f", {skipped} {'clips' if settings.task else 'crops'} skipped"
    if result.failures:
        text += f", {len(result.failures)} of {int(metrics['cohort'])} clients failed"
    if result.bounded:
        text += f", {len(result.bounded)} updates bounded"
    if row.get("undone"):
        text += ", undone"
    return text
