"""What a federation trains: what the server holds of it, saves, evaluates and says of a round."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from flwr.serverapp import Grid
from torch import Tensor

from common.errors import DataError, UsageError
from common.units import format_bytes, format_seconds
from fl_client.federation_settings import FederationSettings
from fl_client.local_data import held_out, load_manifest
from fl_client.task_data import load_pool
from fl_client.task_training import Resident
from fl_server.personal_report import write_personal_report
from fl_server.rounds import Client, Federation, RoundResult
from partitions.sampling import SAMPLE_RATE
from partitions.speakers import select
from ssl_core.downstream.export import export
from ssl_core.downstream.lora import merge_lora
from ssl_core.training import checkpoint, randomness
from ssl_core.training import hf_checkpoint as hf
from ssl_core.training.collapse import CollapseAlarm
from ssl_core.training.crops import CropBatch, Crops
from ssl_core.training.curves import plot_curves
from ssl_core.training.evaluation import Evaluation, evaluate
from ssl_core.training.run_directory import RunDirectory
from ssl_core.wav2vec2.model import PretrainingModel

_OF_A_CLIENT = ("length", "batch", "micro_batch", "peak_bytes", "fallbacks")


class Job(Protocol):
    """One kind of training."""

    weights: dict[str, Tensor]
    """Global weights by parameter name, changed in place by each round."""
    backbone: str
    """Digest of the backbone that everyone begins with, where it is not in the weights."""

    def start(self) -> None:
        """Take the weights that the settings name, where there is no checkpoint of the run."""

    def restore(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Take the weights of a checkpoint; its state and other tensors."""

    def save(
        self, path: Path, state: Mapping[str, Any], optimizer_state: Mapping[str, Tensor]
    ) -> None:
        """Write a checkpoint."""

    def evaluate(self) -> dict[str, Any]:
        """Of the weights as they are, for the metrics of a round."""

    def row(self, result: RoundResult) -> dict[str, Any]:
        """Metrics of a round."""

    def line(self, row: Mapping[str, Any]) -> str:
        """A round's metrics in words, without times and bytes."""

    def warning(self, result: RoundResult) -> str | None:
        """What is alarming about a round."""

    def finish(
        self, federation: Federation, grid: Grid, clients: list[Client], run: RunDirectory
    ) -> list[str]:
        """When all rounds are done; what to say."""

    def plot(self, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
        """Draw the curves of a run."""


def job_of(settings: FederationSettings, manifest: str) -> Job:
    """The job of a run; `manifest` is a file of the recut corpus, or empty.

    Raises:
        ShortwaveError: settings or data that will not do.
    """
    return FineTuning(settings) if settings.task else Pretraining(settings, manifest)


class Pretraining:
    """Pretraining, evaluated on speakers that no client hears."""

    backbone = ""

    def __init__(self, settings: FederationSettings, manifest: str) -> None:
        """Make the model, and decode the held-out crops once.

        Raises:
            DataError: none of them is usable.
        """
        self.settings, self.plan = settings, settings.resolved_plan()
        self.config, _ = settings.model_and_recipe()
        self.device = torch.device(self.plan.device)
        with randomness.torch_seed(torch.device("cpu"), settings.seed, "weights"):
            self.model = PretrainingModel(self.config)
        # They share the model's memory: one copy serves both.
        self.weights = dict(self.model.state_dict())
        self.alarm = CollapseAlarm(self.config)
        self.crops: CropBatch | None = None
        if not settings.held_out or not settings.eval_crops:
            return  # a server that does not evaluate needs no corpus
        corpus = load_manifest(settings.data, settings.subsets, settings.seconds, manifest)
        speakers = held_out(corpus, settings)
        if speakers:
            held = Crops(corpus, select(corpus, speakers), self.plan.samples, settings.seed)
            self.crops = held.fixed(settings.eval_crops)

    def start(self) -> None:
        """See `Job`."""
        if self.settings.checkpoint:
            path = Path(self.settings.checkpoint)
            hf.load_into(self.model, hf.load_weights(path), str(path))

    def restore(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Job`."""
        loaded = checkpoint.load(path)
        hf.load_into(self.model, loaded.weights, str(path))
        return loaded.state, loaded.optimizer_state

    def save(
        self, path: Path, state: Mapping[str, Any], optimizer_state: Mapping[str, Tensor]
    ) -> None:
        """See `Job`."""
        checkpoint.save(
            path, self.config, self.weights, state=state, optimizer_state=optimizer_state
        )

    def evaluate(self) -> dict[str, Any]:
        """See `Job`."""
        held = self._held()
        if held is None:
            return {}
        return {
            "held_out_loss": held.loss,
            "held_out_accuracy": held.accuracy,
            "held_out_perplexity": held.perplexity,
        }

    def _held(self) -> Evaluation | None:
        if self.crops is None:
            return None
        model = self.model
        if self.device.type != "cpu":
            model = PretrainingModel(self.config)
            hf.load_into(model, self.weights, "the global model")
            model.to(self.device)
        return evaluate(
            model,
            self.crops,
            chunk=self.plan.chunk,
            device=self.device,
            seed=self.settings.seed,
            precision=self.plan.precision,
        )

    def row(self, result: RoundResult) -> dict[str, Any]:
        """See `Job`."""
        return {
            "updates_done": (result.number + 1) * self.settings.local_updates,
            **result.metrics,
            "clients": _clients(result),
        }

    def line(self, row: Mapping[str, Any]) -> str:
        """See `Job`."""
        text = (
            f"loss {row['contrastive']:.3f}  accuracy {row['accuracy']:.3f}  "
            f"perplexity {row['perplexity']:.0f}"
        )
        if "held_out_loss" in row:
            text += (
                f"  | held out: loss {row['held_out_loss']:.3f}  accuracy "
                f"{row['held_out_accuracy']:.3f}  perplexity {row['held_out_perplexity']:.0f}"
            )
        return text

    def warning(self, result: RoundResult) -> str | None:
        """See `Job`."""
        return self.alarm.check(
            (result.number + 1) * self.settings.local_updates,
            contrastive=result.metrics["contrastive"],
            accuracy=result.metrics["accuracy"],
            perplexity=result.metrics["perplexity"],
        )

    def finish(
        self, federation: Federation, grid: Grid, clients: list[Client], run: RunDirectory
    ) -> list[str]:
        """See `Job`."""
        return []

    def plot(self, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
        """See `Job`."""
        plot_curves(
            {"federated": rows}, path, negatives=self.config.num_negatives, unit="global update"
        )


class FineTuning:
    """A downstream task, evaluated by the clients on their own clips."""

    def __init__(self, settings: FederationSettings) -> None:
        """Make the model; the server reads a corpus only for the labels of a head that is shared.

        Raises:
            UsageError: labels that nobody knows.
        """
        self.settings = settings
        self.labels: tuple[str, ...] = ()
        shares_head = settings.method == "fedavg"
        if shares_head:
            if not settings.data:
                raise UsageError(
                    "data: with fedavg the server needs the task's corpus for its labels"
                )
            self.labels = load_pool(settings.task_settings()).labels
        self.own = Resident(settings, max(1, len(self.labels)))
        self.weights = dict(self.own.state_dict())
        self.backbone = self.own.backbone

    def start(self) -> None:
        """See `Job`."""

    def restore(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Job`."""
        state, weights, optimizer_state = checkpoint.load_tensors(path)
        if weights.keys() != self.weights.keys():
            raise DataError(f"{path} holds other tensors than the run shares")
        for name, value in self.weights.items():
            value.copy_(weights[name])
        return state, optimizer_state

    def save(
        self, path: Path, state: Mapping[str, Any], optimizer_state: Mapping[str, Tensor]
    ) -> None:
        """See `Job`."""
        checkpoint.save_tensors(path, self.weights, state=state, optimizer_state=optimizer_state)

    def evaluate(self) -> dict[str, Any]:
        """See `Job`."""
        return {}

    def row(self, result: RoundResult) -> dict[str, Any]:
        """See `Job`; scores are means over clients that have one, each counting once."""
        metrics = dict(result.metrics)
        scored = [client for client in result.clients if client["test_clips"]]
        for name in ("test_before", "test_after"):
            values = torch.tensor([client[name] for client in scored] or [0.0])
            metrics[name], metrics[f"{name}_deviation"] = (
                float(values.mean()),
                float(values.std(correction=0)),
            )
        done = (result.number + 1) * self.settings.local_updates
        lost = len(result.clients) - len(scored)
        return {
            "updates_done": done, **metrics, "clients_not_scored": lost,
            "clients": _clients(result),
        }  # fmt: skip

    def line(self, row: Mapping[str, Any]) -> str:
        """See `Job`."""
        metric = self.own.model.recipe.metric
        name = "accuracy" if metric == "eer" else metric
        lost = row["clients_not_scored"]
        return (
            f"loss {row['loss']:.3f}  | clients' own clips: {name} "
            f"{100 * row['test_before']:.1f} % before training, {100 * row['test_after']:.1f} % "
            f"after (spread {100 * row['test_after_deviation']:.1f})"
            + (f", {lost} clients without a usable test clip" if lost else "")
        )

    def warning(self, result: RoundResult) -> str | None:
        """See `Job`."""
        return None

    def finish(
        self, federation: Federation, grid: Grid, clients: list[Client], run: RunDirectory
    ) -> list[str]:
        """Every client scores the last weights; writes `personal.json`, a figure and the model."""
        found, failures = federation.evaluate(grid, clients, self.settings.rounds)
        lines = write_personal_report(
            run.path, self.settings, self.own.model.recipe.metric, found, failures
        )
        if self.weights:
            model = self.own.model
            if model.wav2vec2 is not None:
                merge_lora(model.wav2vec2)
            export(model, self.settings.task, self.labels, run.path / "model", bool(self.labels))
            lines.append(f"model: {run.path / 'model'}")
        return lines

    def plot(self, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
        """See `Job`."""


def _clients(result: RoundResult) -> list[dict[str, Any]]:
    return [
        {
            "key": int(client["key"]),
            "seconds": client["samples"] / SAMPLE_RATE,
            **{name: client[name] for name in _OF_A_CLIENT},
        }
        for client in result.clients
    ]


def describe_round(
    job: Job, result: RoundResult, row: Mapping[str, Any], settings: FederationSettings
) -> str:
    """A round in one line."""
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
    return text
