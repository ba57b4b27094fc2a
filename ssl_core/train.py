"""Centralised pretraining: `python -m ssl_core.train --length 5s --data DIR`."""

import argparse
import collections
import dataclasses
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.process_environment import restart

if __name__ == "__main__":
    restart()

import torch
from rich.console import Console

from common import command
from common.errors import Interrupted, UsageError
from common.progress import bar_of
from common.settings import add_options, from_mapping, from_texts, read_yaml
from common.units import format_seconds
from partitions.demo_corpus import demo_corpus
from partitions.manifest import Manifest
from partitions.prepared import prepare
from partitions.speakers import held_out_speakers, select
from ssl_core.planning.step_plan import Plan
from ssl_core.training import checkpoint, randomness
from ssl_core.training import hf_checkpoint as hf
from ssl_core.training.collapse import CollapseAlarm
from ssl_core.training.crops import CropBatch, Crops, describe
from ssl_core.training.curves import plot_curves
from ssl_core.training.evaluation import evaluate
from ssl_core.training.loader import ahead
from ssl_core.training.pretraining_settings import StepSettings
from ssl_core.training.pretraining_step import StepReport, TrainingStep
from ssl_core.training.run_directory import RunDirectory, resumed
from ssl_core.wav2vec2.model import PretrainingModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings(StepSettings):
    """Settings of a centralised run."""

    updates: int = 1000
    """Updates of the whole run; the learning-rate schedule spans them."""
    batch: int = 16
    """Crops in a batch, over which one loss is taken."""
    eval_every: int = 50
    """Updates between evaluations."""
    save_every: int = 200
    """Updates between checkpoints."""

    def validate(self) -> None:
        """Check values and that they fit together.

        Raises:
            UsageError: what is wrong.
        """
        for name in ("updates", "eval_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise UsageError(f"{option} must be at least 1, not {getattr(self, name)}")
        if self.eval_crops < 0 or self.seed < 0:
            raise UsageError("eval-crops and seed must not be below zero")
        self.resolved_plan()


def parse(arguments: Sequence[str] | None) -> TrainSettings:
    """The settings, from options, `--config` or the run that `--resume` names.

    Raises:
        UsageError: an unknown setting or a bad value.
    """
    parser = command.Parser(
        prog="python -m ssl_core.train",
        description=__doc__,
        formatter_class=argparse.HelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="YAML file of any of the options below")
    add_options(parser, TrainSettings)
    given = vars(parser.parse_args(arguments))
    config = given.pop("config")
    values = from_texts(TrainSettings, given)
    if config is not None:
        listed = {str(key).replace("-", "_"): value for key, value in read_yaml(config).items()}
        from_mapping(TrainSettings, listed, str(config))
        values = listed | values
    if values.get("resume"):
        values = resumed(TrainSettings, values, free=("resume", "keep"))
    return from_mapping(TrainSettings, values, "options")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    settings = parse(arguments)
    plan = settings.resolved_plan()
    if plan.threads:
        torch.set_num_threads(plan.threads)
    root = Path(settings.data) if settings.data else demo_corpus()
    print(describe(root, not settings.data))
    manifest = prepare(root, settings.subsets, settings.seconds, progress=True)
    for line in manifest.describe_skips():
        print(line)
    excluded = held_out_speakers(manifest, settings.held_out, settings.seed)
    train, held = _crops(manifest, excluded, settings, plan)
    print(
        f"{len(train.indices)} sequences of about {settings.length} to train on, "
        f"{len(excluded)} speakers held out"
    )
    if settings.resume:
        run = RunDirectory.reopen(Path(settings.resume).resolve())
    else:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        output = settings.output or f"runs/{stamp}-central-{settings.model}-{settings.length}"
        run = RunDirectory.create(Path(output).resolve(), settings.as_config())
    run.lock()
    print(
        f"{settings.updates} updates of {plan.crops} crops, "
        f"{format_seconds(plan.crops * plan.length)} of audio each ({plan.precision}, "
        f"{plan.device}); run directory {run.path}",
        flush=True,
    )
    Trainer(settings, plan, run, train, held).run()
    print(f"checkpoint: {checkpoint.latest(run.checkpoints)}")
    print(run.path)
    return 0


def _crops(
    manifest: Manifest, excluded: tuple[str, ...], settings: TrainSettings, plan: Plan
) -> tuple[Crops, CropBatch | None]:
    train = select(manifest, set(manifest.speakers) - set(excluded))
    held = None
    if excluded and settings.eval_crops:
        crops = Crops(manifest, select(manifest, excluded), plan.samples, settings.seed)
        held = crops.fixed(settings.eval_crops)
    return Crops(manifest, train, plan.samples, settings.seed), held


class Trainer:
    """A centralised run: the training step on all speakers that are not held out."""

    def __init__(
        self,
        settings: TrainSettings,
        plan: Plan,
        run: RunDirectory,
        train: Crops,
        held: CropBatch | None,
    ) -> None:
        """Begin, or go on from the run's newest checkpoint."""
        self.settings, self.plan, self.directory = settings, plan, run
        self.train, self.held = train, held
        config, recipe = settings.model_and_recipe()
        with randomness.torch_seed(torch.device("cpu"), settings.seed, "weights"):
            model = PretrainingModel(config)
        saved = checkpoint.latest(run.checkpoints)
        self.first = 0
        moments: dict[str, torch.Tensor] = {}
        if saved is not None:
            loaded = checkpoint.load(saved)
            hf.load_into(model, loaded.weights, str(saved))
            self.first, moments = int(loaded.state["next_update"]), loaded.optimizer_state
        elif settings.checkpoint:
            path = Path(settings.checkpoint)
            hf.load_into(model, hf.load_weights(path), str(path))
        self.step = TrainingStep(
            model, recipe, plan, seed=settings.seed, total_updates=settings.updates
        )
        self.step.load_moments(moments)
        self.alarm = CollapseAlarm(config)
        self.console = Console(stderr=True)
        self.skips: collections.Counter[str] = collections.Counter()
        if saved is not None or settings.resume:
            self.directory.rewind(self.first + 1)
            self.console.print(f"going on at update {self.first + 1} of {settings.updates}")

    def run(self) -> None:
        """Take all updates that are left.

        Raises:
            Interrupted: stopped by the user, after a checkpoint.
        """
        stopped = False

        def stop(*_: Any) -> None:
            nonlocal stopped
            if stopped:
                raise KeyboardInterrupt
            stopped = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            with bar_of(self.console) as progress:
                bar = progress.add_task(
                    "updates", total=self.settings.updates, completed=self.first
                )
                numbers = range(self.first, self.settings.updates)
                updates = self.train.updates(numbers, self.plan.batch, self.plan.accumulation)
                for number, batches in ahead(updates):
                    started = time.monotonic()
                    for batch in batches:
                        self.skips.update(batch.skips)
                    report = self.step.update([batch.waveforms for batch in batches], number)
                    self._after(report, time.monotonic() - started, stopped)
                    progress.advance(bar)
                    if stopped:
                        raise Interrupted(
                            f"interrupted after update {number + 1}; go on with "
                            f"--resume {self.directory.path}"
                        )
        finally:
            signal.signal(signal.SIGINT, before)
            self.directory.close()
        rows = self.directory.metrics()
        if rows:
            plot_curves(
                {"central": rows},
                self.directory.path / "curves.png",
                negatives=self.step.model.config.num_negatives,
            )

    def _after(self, report: StepReport, seconds: float, stopped: bool) -> None:
        settings, done = self.settings, report.update + 1
        last = done == settings.updates
        row: dict[str, Any] = {"updates_done": done, **report.metrics(), "step_seconds": seconds}
        row["crops_skipped"] = sum(self.skips.values())
        if self.held is not None and (last or done % settings.eval_every == 0):
            held = evaluate(
                self.step.model,
                self.held,
                chunk=self.plan.chunk,
                device=self.step.device,
                seed=settings.seed,
                precision=self.plan.precision,
            )
            row |= {
                "held_out_loss": held.loss,
                "held_out_accuracy": held.accuracy,
                "held_out_perplexity": held.perplexity,
            }
            self.console.print(
                f"update {done}/{settings.updates}  loss {report.contrastive:.3f}  accuracy "
                f"{report.accuracy:.3f}  perplexity {report.perplexity:.0f}  | held out: loss "
                f"{held.loss:.3f}  accuracy {held.accuracy:.3f}  perplexity {held.perplexity:.0f}"
                f"  | {seconds:.2f} s an update"
                + (f", {row['crops_skipped']} crops skipped" if row["crops_skipped"] else ""),
                highlight=False,
                soft_wrap=True,
            )
        self.directory.log(done, row)
        warning = self.alarm.check(
            done,
            contrastive=report.contrastive,
            accuracy=report.accuracy,
            perplexity=report.perplexity,
        )
        if warning:
            self.console.print(warning, style="yellow")
        if last or stopped or done % settings.save_every == 0:
            checkpoint.save(
                self.directory.checkpoints / f"update-{done:07d}",
                self.step.model.config,
                self.step.model.state_dict(),
                state={"next_update": done, "updates": settings.updates, "seed": settings.seed},
                optimizer_state=self.step.moments(),
            )
            checkpoint.prune(self.directory.checkpoints, settings.keep)


if __name__ == "__main__":
    command.run(main)
