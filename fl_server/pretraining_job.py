"""Federated pretraining: the global model, and its evaluation on held-out speakers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fl_client import protocol
from fl_client.federation_settings import PretrainingFederation
from fl_client.local_data import held_out, load_manifest
from fl_server.job import Job, client_rows
from fl_server.round_result import RoundResult
from partitions.corpus_record import record_of
from partitions.speakers import select
from ssl_core.training import checkpoint, randomness
from ssl_core.training import hf_checkpoint as hf
from ssl_core.training.collapse import CollapseAlarm
from ssl_core.training.crops import CropBatch, Crops
from ssl_core.training.curves import plot_curves
from ssl_core.training.evaluation import Evaluation, evaluate
from ssl_core.wav2vec2.model import PretrainingModel


class Pretraining(Job):
    """Pretraining, evaluated on held-out speakers."""

    def __init__(self, settings: PretrainingFederation, manifest: str) -> None:
        """Make the model, and decode the held-out crops once.

        Args:
            settings: of the run.
            manifest: file of the recut corpus, or empty.

        Raises:
            DataError: no held-out crop is usable.
        """
        self.settings, self.plan = settings, settings.step_plan()
        self.config = settings.architecture
        self.device = torch.device(self.plan.device)
        with randomness.torch_seed(torch.device("cpu"), settings.seed, "weights"):
            self.model = PretrainingModel(self.config)
        # They share the model's memory, so there is one copy.
        self.weights = dict(self.model.state_dict())
        self.told = {"architecture": protocol.architecture_text(self.config)}
        self.alarm = CollapseAlarm(self.config)
        self.crops: CropBatch | None = None
        if not settings.held_out or not settings.eval_crops:
            return  # a server that does not evaluate needs no corpus
        corpus = load_manifest(settings.data, settings.subset, settings.length, manifest)
        speakers = held_out(corpus, settings)
        if not manifest:  # a simulation, which has one, has compared it
            self.record = record_of(corpus, speakers)
        if speakers:
            crops = Crops(corpus, select(corpus, speakers), self.plan.samples, settings.seed)
            self.crops = crops.fixed(settings.eval_crops)

    def start(self) -> list[str]:
        """Load the weights of the setting `checkpoint`, if there is one; returns lines to print."""
        return self.settings.load_checkpoint(self.model)

    def restore(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Load a checkpoint; returns its state and other tensors, each `[...]`."""
        loaded = checkpoint.load(path)
        hf.require_same(self.config, path)
        hf.load_into(self.model, loaded.weights, str(path))
        return loaded.state, loaded.optimizer_state

    def save(self, path: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint that `transformers` opens.

        Args:
            path: new directory.
            state: see `Federation.state`.
            tensors: see `Federation.tensors`, each `[...]`.
        """
        checkpoint.save(path, self.config, self.weights, state=state, optimizer_state=tensors)

    def evaluate(self) -> dict[str, Any]:
        """Loss, accuracy and perplexity on held-out speakers."""
        if self.crops is None:
            return {}
        found = self._evaluate(self.crops)
        return {
            "held_out_loss": found.loss,
            "held_out_accuracy": found.accuracy,
            "held_out_perplexity": found.perplexity,
        }

    def _evaluate(self, crops: CropBatch) -> Evaluation:
        model = self.model
        if self.device.type != "cpu":
            model = PretrainingModel(self.config)
            model.load_state_dict(self.weights)
            model.to(self.device)
        return evaluate(
            model,
            crops,
            chunk=self.plan.effective_micro_batch,
            device=self.device,
            seed=self.settings.seed,
            precision=self.plan.precision,
        )

    def row(self, result: RoundResult) -> dict[str, Any]:
        """The metrics of a round that are logged."""
        return {
            "updates_done": (result.number + 1) * self.settings.local_updates,
            **result.metrics,
            "clients": client_rows(result),
        }

    def line(self, row: Mapping[str, Any]) -> str:
        """Training and held-out metrics of a round in words."""
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
        """A warning if the codebook has collapsed."""
        return self.alarm.check(
            (result.number + 1) * self.settings.local_updates,
            contrastive=result.metrics["contrastive"],
            accuracy=result.metrics["accuracy"],
            perplexity=result.metrics["perplexity"],
        )

    def plot(self, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
        """Draw the curves of a run."""
        plot_curves(
            {"federated": rows}, path, negatives=self.config.num_negatives, unit="global update"
        )
