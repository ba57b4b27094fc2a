"""Fine-tuning, epoch by epoch: a head and, if unfrozen, a backbone; a run can be resumed."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from common import atomic
from common.errors import DataError, Interrupted
from common.progress import bar_of
from common.units import format_number
from ssl_core.downstream.clip_loader import ClipLoader
from ssl_core.downstream.clips import TaskData
from ssl_core.downstream.learning_rates import Rates
from ssl_core.downstream.scoring import score_clips
from ssl_core.downstream.task_step import BACKBONE, HEAD, TaskStep
from ssl_core.training import checkpoint
from ssl_core.training.divergence import Watch
from ssl_core.training.loader import ahead
from ssl_core.training.run_directory import RunDirectory
from ssl_core.training.tensor_file import TensorFile, write_tensors

BEST, WEIGHTS = "best", checkpoint.PART


class FineTuning:
    """A run of fine-tuning: scores every epoch and keeps the weights of the best."""

    def __init__(
        self,
        step: TaskStep,
        data: TaskData,
        loader: ClipLoader,
        run: RunDirectory,
        *,
        seed: int,
        keep: int,
    ) -> None:
        """Begin, or resume from the run's newest checkpoint.

        Args:
            step: trains the model.
            data: clips to train and validate on.
            loader: makes batches of the clips.
            run: directory of the run.
            seed: of the order of clips.
            keep: number of checkpoints to keep.
        """
        self.step, self.data, self.loader, self.directory = step, data, loader, run
        self.recipe, self.seed, self.keep = step.model.recipe, seed, keep
        self.rates = Rates(self.recipe)
        self.batches = -(-len(data.train) // self.recipe.batch)
        self.first = 0
        self.best: dict[str, float] = {}
        self.sums = _Sums()
        self.watch = Watch(lambda: checkpoint.latest(run.checkpoints))
        self.console = Console(stderr=True)
        saved = checkpoint.latest(run.checkpoints)
        if saved is not None:
            self._load(saved)
            # Metrics of complete epochs stay; an interrupted epoch is logged when it completes.
            run.rewind(self.first // self.batches * self.batches + 1)
            self.console.print(f"going on at update {self.first + 1}", highlight=False)
        elif run.metrics():  # stopped before the first checkpoint was complete
            run.rewind(1)

    def trained(self) -> dict[str, Tensor]:
        """Trained parameters by name, `[*parameter shape]` each."""
        return {n: p.detach() for n, p in self.step.model.named_parameters() if p.requires_grad}

    def _save(self, next_update: int) -> None:
        state = {
            "next_update": next_update,
            "rates": self.rates.state(),
            "best": self.best,
            "sums": self.sums.state(),
            "watch": self.watch.state(),
        }
        path = self.directory.checkpoints / f"update-{next_update:07d}"
        checkpoint.save_tensors(
            path, self.trained(), state=state, optimizer_state=self.step.optimizer_state()
        )
        checkpoint.prune(self.directory.checkpoints, self.keep)

    def _load(self, path: Path) -> None:
        state, weights, optimizer_state = checkpoint.load_tensors(path)
        self._take(weights, path)
        self.step.load_optimizer_state(optimizer_state)
        try:
            self.first, self.best = int(state["next_update"]), state["best"]
            self.rates.load(state["rates"])
            self.sums = _Sums.from_state(state["sums"])
            self.watch.load(state.get("watch", {}), self.first)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"checkpoint {path} is broken: {error}") from None

    def _take(self, stored: Mapping[str, Tensor], path: Path) -> None:
        own = self.trained()
        if set(stored) != set(own):
            odd = sorted(set(stored) ^ set(own))
            raise DataError(f"{path} does not fit the model: {len(odd)} tensors, such as {odd[0]}")
        for name, value in own.items():
            value.copy_(stored[name])

    def load_best(self) -> None:
        """Load the weights of the best epoch."""
        path = self.directory.path / BEST / WEIGHTS
        if path.exists():
            self._take(TensorFile(path), path)

    def run(self, stopped: Callable[[], bool]) -> None:
        """Train the remaining epochs.

        Args:
            stopped: whether the user wants to stop.

        Raises:
            Interrupted: the user stopped; a checkpoint was saved.
            Diverged: the gradients, the weights or the validation loss are not finite.
        """
        data, recipe, size = self.data, self.recipe, self.recipe.batch
        total = recipe.epochs * self.batches
        with bar_of(self.console) as progress:
            bar = progress.add_task("updates", total=total, completed=self.first)
            for epoch in range(self.first // self.batches, recipe.epochs):
                start, rates = time.monotonic(), self.rates.at(epoch)
                skip = max(0, self.first - epoch * self.batches)
                batches = self.loader.epoch(data.train, size, self.seed, epoch, skip)
                with contextlib.closing(ahead(batches)) as read:
                    for number, batch in read:
                        update = epoch * self.batches + number
                        report = self.step.update(batch, update, rates)
                        self.sums.add(report.loss, report.correct, report.clips, report.applied)
                        self.sums.seconds += report.seconds
                        self.watch.take(update + 1, report)
                        progress.update(bar, completed=update + 1)
                        if stopped() and number + 1 < self.batches:
                            self._save(update + 1)
                            raise Interrupted(f"interrupted after update {update + 1}")
                trained = time.monotonic() - start
                self._end(epoch, rates, trained)
                if stopped() and epoch + 1 < recipe.epochs:
                    raise Interrupted(f"interrupted after epoch {epoch + 1}")
        self.watch.finish()

    def _end(self, epoch: int, rates: Mapping[str, float], seconds: float) -> None:
        """Score an epoch, log it and save a checkpoint."""
        recipe, sums = self.recipe, self.sums
        start = time.monotonic()
        scored = score_clips(self.step, self.loader, self.data.valid, recipe.batch)
        value = scored.score(recipe.metric)
        better = recipe.higher_is_better or recipe.metric == "eer"
        error = 1 - value if better else value
        name = "accuracy" if recipe.metric == "eer" else recipe.metric
        row: dict[str, Any] = {
            "epoch": epoch + 1,
            "loss": sums.loss / sums.clips if sums.clips else math.nan,
            "valid_loss": scored.loss,
            f"valid_{name}": value,
            "head_rate": rates[HEAD],
            "train_seconds": seconds,
            "score_seconds": time.monotonic() - start,
            "updates_skipped": sums.skipped,
            "clips_skipped": sum(self.loader.skips.values()),
        }
        if not recipe.transcribes:
            row["accuracy"] = sums.correct / sums.clips if sums.clips else math.nan
        if self.step.unfrozen:
            row["backbone_rate"] = rates[BACKBONE]
        self.rates.after(error)
        done = (epoch + 1) * self.batches
        self.directory.log(done, row)
        self.watch.require_finite("validation loss", scored.loss, done)
        if not self.best or error < self.best["error"]:
            self.best = {"epoch": epoch + 1, "error": error, "value": value}
            with atomic.directory(self.directory.path / BEST) as partial:
                write_tensors(partial / WEIGHTS, self.trained())
        self.sums = _Sums()
        self._save(done)
        self.console.print(
            f"epoch {epoch + 1}/{recipe.epochs}  loss {format_number(row['loss'], 3)}  | "
            f"validation: loss "
            f"{scored.loss:.3f}  {name} {100 * value:.2f} %  | {seconds:.2f} s to train"
            + (f", {sums.skipped} updates skipped" if sums.skipped else ""),
            highlight=False,
            soft_wrap=True,
        )


@dataclasses.dataclass
class _Sums:
    """Totals over the updates of the current epoch."""

    loss: float = 0.0
    correct: int = 0
    clips: int = 0
    skipped: int = 0
    seconds: float = 0.0

    def add(self, loss: float, correct: int, clips: int, applied: bool) -> None:
        if not applied:
            self.skipped += 1
            return
        self.loss += loss * clips
        self.correct += correct
        self.clips += clips

    def state(self) -> dict[str, float]:
        """For a checkpoint, where `skipped` is called `left_out` as in version 0.1."""
        state = dataclasses.asdict(self)
        return state | {"left_out": state.pop("skipped")}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "_Sums":
        """Restore what `state` returned."""
        values = dict(state)
        return cls(skipped=values.pop("left_out"), **values)
