"""Centralised pretraining on all speakers that are not held out."""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from rich.console import Console

from common.errors import Interrupted
from common.progress import bar_of
from common.stop import Stop
from partitions.manifest import Manifest
from partitions.speakers import held_out_speakers, select
from ssl_core.planning.step_plan import Plan
from ssl_core.training import checkpoint, hf_checkpoint, randomness
from ssl_core.training.collapse import CollapseAlarm
from ssl_core.training.crops import CropBatch, Crops
from ssl_core.training.curves import plot_curves
from ssl_core.training.divergence import Diverged, Watch
from ssl_core.training.evaluation import evaluate
from ssl_core.training.loader import ahead
from ssl_core.training.pretraining_settings import PretrainingSettings
from ssl_core.training.pretraining_step import PretrainingStep
from ssl_core.training.run_directory import RunDirectory
from ssl_core.training.step_report import StepReport
from ssl_core.training.step_runner import Taken
from ssl_core.wav2vec2.model import PretrainingModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class CentralSettings(PretrainingSettings):
    """Settings of a centralised run."""

    updates: int = 1000
    """Updates of the whole run, the length of the learning-rate schedule."""
    batch: int = 16
    """Crops in a batch, over which one loss is computed."""
    eval_every: int = 50
    """Updates between evaluations."""
    save_every: int = 200
    """Updates between checkpoints."""

    def validate(self) -> None:
        """Check ranges and combinations of settings.

        Raises:
            UsageError: what is wrong.
        """
        super().validate()
        self.require_at_least(1, "updates", "eval_every", "save_every")


def divide(
    manifest: Manifest, settings: CentralSettings, plan: Plan
) -> tuple[Crops, CropBatch | None, tuple[str, ...]]:
    """Split a corpus into crops for training and crops of held-out speakers for evaluation.

    Args:
        manifest: the recut corpus.
        settings: of the run.
        plan: how a step is taken.

    Returns:
        Crops to train on, crops to evaluate on or None, and the held-out speakers.

    Raises:
        DataError: no usable audio.
    """
    excluded = held_out_speakers(manifest, settings.held_out, settings.seed)
    train = select(manifest, set(manifest.speakers) - set(excluded))
    held = None
    if excluded and settings.eval_crops:
        crops = Crops(manifest, select(manifest, excluded), plan.samples, settings.seed)
        held = crops.fixed(settings.eval_crops)
    return Crops(manifest, train, plan.samples, settings.seed), held, excluded


class _Pending(NamedTuple):
    """An update that was taken but is not yet logged."""

    done: int
    taken: Taken
    started: float
    skipped: int
    """Crops skipped up to here."""


class CentralRun:
    """A centralised run, new or resumed from its newest checkpoint."""

    def __init__(
        self,
        settings: CentralSettings,
        plan: Plan,
        run: RunDirectory,
        train: Crops,
        held: CropBatch | None,
    ) -> None:
        """Build or load the model.

        Args:
            settings: of the run.
            plan: how a step is taken.
            run: run directory.
            train: crops to train on.
            held: crops to evaluate on; None does not evaluate.
        """
        self.settings, self.plan, self.directory = settings, plan, run
        self.train, self.held = train, held
        with randomness.torch_seed(torch.device("cpu"), settings.seed, "weights"):
            model = PretrainingModel(settings.architecture)
        self.console = Console(stderr=True)
        saved = checkpoint.latest(run.checkpoints)
        self.watch = Watch(lambda: checkpoint.latest(run.checkpoints))
        self.first = 0
        optimizer_state: dict[str, torch.Tensor] = {}
        if saved is not None:
            loaded = checkpoint.load(saved)
            hf_checkpoint.require_same(model.config, saved)
            hf_checkpoint.load_into(model, loaded.weights, str(saved))
            self.first, optimizer_state = int(loaded.state["next_update"]), loaded.optimizer_state
            self.watch.load(loaded.state.get("watch", {}), self.first)
        else:
            for line in settings.load_checkpoint(model):
                self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self.step = PretrainingStep(
            model, settings.recipe, plan, seed=settings.seed, total_updates=settings.updates
        )
        self.step.load_optimizer_state(optimizer_state)
        self.pending: list[_Pending] = []
        """Updates taken but not yet logged."""
        self.noted = 0.0
        """When the last update was logged."""
        self.alarm = CollapseAlarm(settings.architecture)
        self.skips: collections.Counter[str] = collections.Counter()
        if saved is not None or settings.resume:
            self.directory.rewind(self.first + 1)
            self.console.print(f"going on at update {self.first + 1} of {settings.updates}")

    def run(self) -> None:
        """Take all remaining updates.

        Raises:
            Interrupted: the user stopped the run; a checkpoint was saved.
            Diverged: the gradients, the weights or the held-out loss are not finite.
        """
        plan, total = self.plan, self.settings.updates
        try:
            with Stop() as stop, bar_of(self.console) as progress:
                bar = progress.add_task("updates", total=total, completed=self.first)
                numbers = range(self.first, total)
                updates = self.train.updates(numbers, plan.batch, plan.accumulation)
                for number, batches in ahead(updates):
                    self._update(number, batches, stop)
                    progress.update(bar, completed=number + 1 - len(self.pending))
                    if stop():
                        raise Interrupted(
                            f"interrupted after update {number + 1}; go on with "
                            f"--resume {self.directory.path}"
                        )
            self.watch.finish()
        finally:
            with contextlib.suppress(Diverged):  # what stops the run says more
                self._note_pending(0)
            self.directory.close()
        rows = self.directory.metrics()
        if rows:
            negatives = self.settings.architecture.num_negatives
            path = self.directory.path / "curves.png"
            plot_curves({"central": rows}, path, negatives=negatives)

    def _update(self, number: int, batches: list[CropBatch], stop: Stop) -> None:
        """Take an update, log it, and evaluate, warn and save when due.

        A GPU computes an update while the next batch is prepared: updates are logged one later,
        unless there is something to do at once.
        """
        settings, done, started = self.settings, number + 1, time.monotonic()
        for batch in batches:
            self.skips.update(batch.skips)
        taken = self.step.take([batch.waveforms for batch in batches], number)
        self.pending.append(_Pending(done, taken, started, sum(self.skips.values())))
        last = done == settings.updates
        evaluates = self.held is not None and (last or done % settings.eval_every == 0)
        saves = last or stop() or done % settings.save_every == 0
        self._note_pending(1 if self.step.resident and not (evaluates or saves) else 0)
        # While updates fail, checkpoints would be alike and replace those before.
        if last or stop() or (saves and not self.watch.failed):
            self._note_pending(0)
            self._save(done)

    def _note_pending(self, left: int) -> None:
        """Log updates, evaluate and warn, until `left` updates are not yet logged."""
        while len(self.pending) > left:
            self._note(self.pending.pop(0))

    def _note(self, pending: "_Pending") -> None:
        """Log an update, evaluate if due, and warn."""
        settings, done = self.settings, pending.done
        report = pending.taken.report()
        # Waiting for the report of the update before is no part of this one.
        now = time.monotonic()
        seconds, self.noted = now - max(pending.started, self.noted), now
        row: dict[str, Any] = {"updates_done": done, **report.metrics(), "step_seconds": seconds}
        row["crops_skipped"] = pending.skipped
        row["updates_skipped"] = self.watch.skipped + (not report.applied)
        last = done == settings.updates
        if self.held is not None and (last or done % settings.eval_every == 0):
            row |= self._evaluate(self.held)
            self._print(report, row)
        self.directory.log(done, row)
        warning = self.alarm.check(
            done,
            contrastive=report.contrastive,
            accuracy=report.accuracy,
            perplexity=report.perplexity,
        )
        if warning:
            self.console.print(warning, style="yellow")
        self.watch.take(done, report)
        self.watch.require_finite("held-out loss", row.get("held_out_loss", 0.0), done)

    def _evaluate(self, held: CropBatch) -> dict[str, float]:
        chunk = self.plan.effective_micro_batch
        if self.step.resident:  # the memory of an update stays with its CUDA graphs
            chunk = -(-chunk // 8)
        found = evaluate(
            self.step.model,
            held,
            chunk=chunk,
            device=self.step.device,
            seed=self.settings.seed,
            precision=self.plan.precision,
        )
        return {
            "held_out_loss": found.loss,
            "held_out_accuracy": found.accuracy,
            "held_out_perplexity": found.perplexity,
        }

    def _print(self, report: StepReport, row: Mapping[str, Any]) -> None:
        skipped, late = row["crops_skipped"], row["updates_skipped"]
        self.console.print(
            f"update {row['updates_done']}/{self.settings.updates}  loss {report.contrastive:.3f}  "
            f"accuracy {report.accuracy:.3f}  perplexity {report.perplexity:.0f}  | held out: loss "
            f"{row['held_out_loss']:.3f}  accuracy {row['held_out_accuracy']:.3f}  perplexity "
            f"{row['held_out_perplexity']:.0f}  | {row['step_seconds']:.2f} s an update"
            + (f", {skipped} crops skipped" if skipped else "")
            + (f", {late} updates skipped" if late else ""),
            highlight=False,
            soft_wrap=True,
        )

    def _save(self, done: int) -> None:
        checkpoint.save(
            self.directory.checkpoints / f"update-{done:07d}",
            self.step.model.config,
            self.step.model.state_dict(),
            state={
                "next_update": done,
                "updates": self.settings.updates,
                "seed": self.settings.seed,
                "watch": self.watch.state(),
            },
            optimizer_state=self.step.optimizer_state(),
        )
        checkpoint.prune(self.directory.checkpoints, self.settings.keep)
