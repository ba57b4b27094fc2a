"""Fine-tuning a head, and a backbone if wanted, epoch by epoch; a run can be resumed."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from partitions import atomic
from partitions.errors import DataError, Interrupted
from partitions.progress import bar_of
from ssl_core import checkpoint
from ssl_core.crops import ahead
from ssl_core.downstream import metrics
from ssl_core.downstream.clips import Clip, TaskData, Trial
from ssl_core.downstream.decoding import Decoder, greedy
from ssl_core.downstream.loading import ClipLoader
from ssl_core.downstream.recipe import TaskRecipe
from ssl_core.downstream.task_step import BACKBONE, HEAD, TaskStep
from ssl_core.run_directory import RunDirectory
from ssl_core.tensor_file import TensorFile, write_tensors
from ssl_core.wav2vec2.precision import autocast

WEIGHTS, MOMENTS, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
BEST = "best"


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a model made of some clips."""

    clips: tuple[Clip, ...]
    expected: tuple[str, ...]
    predicted: tuple[str, ...]
    loss: float
    """Mean over clips, as in training."""
    embeddings: Tensor | None
    """`[clip, embedding]`, of heads that have one."""

    def score(self, metric: str) -> float:
        """Accuracy, `wer` or `cer`; of `eer` the accuracy, as there are no trials here."""
        if metric == "wer":
            return metrics.word_error_rate(self.expected, self.predicted)
        if metric == "cer":
            return metrics.character_error_rate(self.expected, self.predicted)
        return metrics.accuracy(self.expected, self.predicted)


def score_clips(
    loader: ClipLoader, clips: Sequence[Clip], size: int, decode: Decoder | None = None
) -> Scored:
    """Run a model on clips without dropout.

    Args:
        loader: of the model's step.
        clips: what to run it on; those that cannot be used are left out.
        size: clips at a time.
        decode: how logits become text; None is greedily.

    Raises:
        DataError: none of the clips can be used.
    """
    step = loader.step
    model, recipe = step.model, step.model.recipe
    decode = decode or greedy(loader.labels)
    order = sorted(clips, key=lambda clip: (clip.piece.samples, clip.name))
    used: list[Clip] = []
    predicted: list[str] = []
    loss, embeddings = 0.0, []
    model.eval()
    try:
        for first in range(0, len(order), size):
            made = loader.batch(order[first : first + size])
            if made is None:
                continue
            batch, chosen = made
            with torch.no_grad(), autocast(step.device, step.plan.precision):
                x = batch.padded(step.device)
                prediction = model.predict(x, batch.samples, batch.stage)
            lengths = model.head_lengths(batch.samples, batch.stage)
            losses = model.head.losses(prediction, lengths, batch.targets.to(step.device))
            loss += float(losses.sum())
            if recipe.transcribes:
                predicted += decode(prediction.logits, lengths)
            else:
                best = prediction.logits.argmax(1).tolist()
                predicted += [loader.labels[place] for place in best]
            if prediction.embedding is not None:
                embeddings.append(prediction.embedding.float().cpu())
            used += chosen
    finally:
        model.train()
    if not used:
        raise DataError(f"none of the clips can be used, such as: {loader.examples[0]}")
    expected = tuple(clip.text if recipe.transcribes else clip.label for clip in used)
    return Scored(
        tuple(used),
        expected,
        tuple(predicted),
        loss / len(used),
        torch.cat(embeddings) if embeddings else None,
    )


def verify(scored: Scored, trials: Sequence[Trial]) -> tuple[float, float, list[float]]:
    """The equal error rate of trials, its threshold, and the cosine of each trial.

    Raises:
        DataError: a trial's clip could not be used.
    """
    assert scored.embeddings is not None
    unit = torch.nn.functional.normalize(scored.embeddings, dim=1)
    places = {clip.piece.path: row for row, clip in enumerate(scored.clips)}
    lost = sorted({path for t in trials for path in (t.first, t.second)} - places.keys())
    if lost:
        raise DataError(f"{len(lost)} files of the trials cannot be used, such as {lost[0]}")
    rows = [(places[trial.first], places[trial.second]) for trial in trials]
    firsts, seconds = (list(column) for column in zip(*rows, strict=True))
    cosines = (unit[firsts] * unit[seconds]).sum(1).tolist()
    rate, threshold = metrics.equal_error_rate(cosines, [trial.same for trial in trials])
    return rate, threshold, cosines


class Rates:
    """The learning rates, as a recipe changes them from epoch to epoch."""

    def __init__(self, recipe: TaskRecipe) -> None:
        """Begin with the recipe's."""
        self.recipe = recipe
        self.factors = {HEAD: 1.0, BACKBONE: 1.0}
        self.last: float | None = None

    def at(self, epoch: int) -> dict[str, float]:
        """Rates in an epoch, from 0."""
        recipe = self.recipe
        first = {HEAD: recipe.head_rate, BACKBONE: recipe.backbone_rate}
        if recipe.schedule == "newbob":
            return {group: rate * self.factors[group] for group, rate in first.items()}
        part = epoch / max(1, recipe.epochs - 1)
        share = 1 + part * (recipe.final_rate / recipe.head_rate - 1)
        return {group: rate * share for group, rate in first.items()}

    def after(self, error: float) -> None:
        """Take note of an epoch's validation error; newbob compares it with that before."""
        recipe, before = self.recipe, self.last
        self.last = error
        if before is None:
            return
        gain = (before - error) / before if before else 0.0
        if gain < recipe.improvement:
            self.factors[HEAD] *= recipe.anneal
            self.factors[BACKBONE] *= recipe.backbone_anneal

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"factors": self.factors, "last": self.last}

    def load(self, state: Mapping[str, Any]) -> None:
        """Bring back what `state` gave."""
        self.factors, self.last = dict(state["factors"]), state["last"]


class FineTuning:
    """A run: a task's step on its clips, scored after every epoch, the best epoch kept."""

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
        """Begin, or go on from the run's newest checkpoint."""
        self.step, self.data, self.loader, self.directory = step, data, loader, run
        self.recipe, self.seed, self.keep = step.model.recipe, seed, keep
        self.rates = Rates(self.recipe)
        self.batches = -(-len(data.train) // self.recipe.batch)
        self.first = 0
        self.best: dict[str, float] = {}
        self.sums = _Sums()
        self.console = Console(stderr=True)
        saved = checkpoint.latest(run.checkpoints)
        if saved is not None:
            self._load(saved)
            # The rows of whole epochs stay; one in the middle is logged when it is whole.
            run.rewind(self.first // self.batches * self.batches + 1)
            self.console.print(f"going on at update {self.first + 1}", highlight=False)

    def trained(self) -> dict[str, Tensor]:
        """The parameters that are trained, by name."""
        return {n: p.detach() for n, p in self.step.model.named_parameters() if p.requires_grad}

    def _save(self, next_update: int) -> None:
        state = {
            "next_update": next_update,
            "rates": self.rates.state(),
            "best": self.best,
            "sums": dataclasses.asdict(self.sums),
        }
        with atomic.directory(self.directory.checkpoints / f"update-{next_update:07d}") as partial:
            write_tensors(partial / WEIGHTS, self.trained())
            write_tensors(partial / MOMENTS, self.step.moments())
            (partial / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        checkpoint.prune(self.directory.checkpoints, self.keep)

    def _load(self, path: Path) -> None:
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            self._load_weights(path / WEIGHTS)
            self.step.load_moments(dict(TensorFile(path / MOMENTS)))
            self.first, self.best = int(state["next_update"]), state["best"]
            self.rates.load(state["rates"])
            self.sums = _Sums(**state["sums"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"checkpoint {path} is broken: {error}") from None

    def _load_weights(self, path: Path) -> None:
        stored, own = TensorFile(path), self.trained()
        if set(stored) != set(own):
            odd = sorted(set(stored) ^ set(own))
            raise DataError(f"{path} does not fit the model: {len(odd)} tensors, such as {odd[0]}")
        for name, value in own.items():
            value.copy_(stored[name])

    def load_best(self) -> None:
        """Take the weights of the best epoch."""
        path = self.directory.path / BEST / WEIGHTS
        if path.exists():
            self._load_weights(path)

    def run(self, stopped: Callable[[], bool]) -> None:
        """Train all epochs that are left.

        Args:
            stopped: whether the user wants to stop.

        Raises:
            Interrupted: stopped, after a checkpoint.
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
                        progress.update(bar, completed=update + 1)
                        if stopped() and number + 1 < self.batches:
                            self._save(update + 1)
                            raise Interrupted(
                                f"interrupted after update {update + 1}; go on with "
                                f"--resume {self.directory.path}"
                            )
                trained = time.monotonic() - start
                self._end(epoch, rates, trained)
                if stopped() and epoch + 1 < recipe.epochs:
                    raise Interrupted(
                        f"interrupted after epoch {epoch + 1}; go on with "
                        f"--resume {self.directory.path}"
                    )

    def _end(self, epoch: int, rates: Mapping[str, float], seconds: float) -> None:
        """Score an epoch, log it and save."""
        recipe, sums = self.recipe, self.sums
        start = time.monotonic()
        scored = score_clips(self.loader, self.data.valid, recipe.batch)
        value = scored.score(recipe.metric)
        better = recipe.higher_is_better or recipe.metric == "eer"
        error = 1 - value if better else value
        name = "accuracy" if recipe.metric == "eer" else recipe.metric
        row: dict[str, Any] = {
            "epoch": epoch + 1,
            "loss": sums.loss / max(1, sums.clips),
            "valid_loss": scored.loss,
            f"valid_{name}": value,
            "head_rate": rates[HEAD],
            "train_seconds": seconds,
            "score_seconds": time.monotonic() - start,
            "updates_left_out": sums.left_out,
            "clips_passed_over": sum(self.loader.skips.values()),
        }
        if not recipe.transcribes:
            row["accuracy"] = sums.correct / max(1, sums.clips)
        if self.step.unfrozen:
            row["backbone_rate"] = rates[BACKBONE]
        self.rates.after(error)
        done = (epoch + 1) * self.batches
        if not self.best or error < self.best["error"]:
            self.best = {"epoch": epoch + 1, "error": error, "value": value}
            with atomic.directory(self.directory.path / BEST) as partial:
                write_tensors(partial / WEIGHTS, self.trained())
        self.directory.log(done, row)
        self.sums = _Sums()
        self._save(done)
        self.console.print(
            f"epoch {epoch + 1}/{recipe.epochs}  loss {row['loss']:.3f}  | validation: loss "
            f"{scored.loss:.3f}  {name} {100 * value:.2f} %  | {seconds:.2f} s to train"
            + (f", {sums.left_out} updates left out" if sums.left_out else ""),
            highlight=False,
            soft_wrap=True,
        )


@dataclasses.dataclass
class _Sums:
    """Of the updates of an epoch so far."""

    loss: float = 0.0
    correct: int = 0
    clips: int = 0
    left_out: int = 0
    seconds: float = 0.0

    def add(self, loss: float, correct: int, clips: int, applied: bool) -> None:
        if not applied:
            self.left_out += 1
            return
        self.loss += loss * clips
        self.correct += correct
        self.clips += clips
