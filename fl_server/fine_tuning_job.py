"""Federated fine-tuning of a downstream task, evaluated by the clients on their own clips."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid
from torch import Tensor

from common.errors import DataError, UsageError
from fl_client import protocol
from fl_client.federation_settings import TaskFederation
from fl_client.task_data import load_pool
from fl_client.task_training import Resident
from fl_server.job import Job, client_rows
from fl_server.personal_report import write_personal_report
from fl_server.roster import Client
from fl_server.round_result import RoundResult
from fl_server.rounds import Federation
from partitions.corpus_record import CorpusRecord
from ssl_core.downstream.export import export
from ssl_core.downstream.lora import merge_lora
from ssl_core.training import checkpoint
from ssl_core.training.run_directory import RunDirectory


class FineTuning(Job):
    """A downstream task, evaluated by the clients on their own clips."""

    def __init__(self, settings: TaskFederation) -> None:
        """Make the model; the server reads the corpus only for the labels of a shared head.

        Raises:
            UsageError: the head is shared and there is no corpus for its labels.
        """
        self.settings = settings
        self.labels: tuple[str, ...] = ()
        if settings.method == "fedavg":
            if settings.data is None:
                raise UsageError(
                    "data: with fedavg the server needs the task's corpus for its labels"
                )
            recipe, subsets = settings.recipe, settings.subsets
            pool = load_pool(settings.task, settings.data, recipe, settings.seed, subsets)
            self.labels = pool.labels
        self.own = Resident(settings, max(1, len(self.labels)))
        if self.own.model.upstream.note:
            print(self.own.model.upstream.note, flush=True)
        self.weights = dict(self.own.state_dict())
        self.told = {"backbone": self.own.backbone}
        if self.labels:
            self.told["labels"] = protocol.labels_digest(self.labels)
        self.record = CorpusRecord(labels=self.labels or None, backbone=self.own.backbone)

    def restore(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Load the shared part; returns the checkpoint's state and other tensors, each `[...]`.

        Raises:
            DataError: the checkpoint is broken or holds other tensors.
        """
        state, weights, tensors = checkpoint.load_tensors(path)
        if weights.keys() != self.weights.keys():
            raise DataError(f"{path} holds other tensors than the run shares")
        for name, value in self.weights.items():
            value.copy_(weights[name])
        return state, tensors

    def save(self, path: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint of the shared part.

        Args:
            path: new directory.
            state: see `Federation.state`.
            tensors: see `Federation.tensors`, each `[...]`.
        """
        checkpoint.save_tensors(path, self.weights, state=state, optimizer_state=tensors)

    def row(self, result: RoundResult) -> dict[str, Any]:
        """The metrics of a round; scores are means over the scored clients, each counting once."""
        metrics = dict(result.metrics)
        scored = [client for client in result.clients if client["test_clips"]]
        for name in ("test_before", "test_after"):
            values = torch.tensor([client[name] for client in scored] or [math.nan])
            metrics[name], metrics[f"{name}_deviation"] = (
                float(values.mean()),
                float(values.std(correction=0)),
            )
        return {
            "updates_done": (result.number + 1) * self.settings.local_updates,
            **metrics,
            "clients_not_scored": len(result.clients) - len(scored),
            "clients": client_rows(result),
        }

    def line(self, row: Mapping[str, Any]) -> str:
        """Loss and the clients' scores of a round in words."""
        metric = self.own.model.recipe.metric
        name = "accuracy" if metric == "eer" else metric
        unscored = row["clients_not_scored"]
        if math.isnan(row["test_after"]):
            return f"loss {row['loss']:.3f}  | no client has a usable test clip"
        return (
            f"loss {row['loss']:.3f}  | clients' own clips: {name} "
            f"{100 * row['test_before']:.1f} % before training, {100 * row['test_after']:.1f} % "
            f"after (spread {100 * row['test_after_deviation']:.1f})"
            + (f", {unscored} clients without a usable test clip" if unscored else "")
        )

    def finish(
        self, federation: Federation, grid: Grid, clients: list[Client], run: RunDirectory
    ) -> list[str]:
        """Let all clients score the final weights; write a report and the model.

        Args:
            federation: with the final weights.
            grid: connects to the clients.
            clients: those connected.
            run: where `personal.json`, `personal.png` and `model/` are written.

        Returns:
            Lines to print.
        """
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
