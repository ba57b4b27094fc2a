"""Fine-tuning a task: `python -m ssl_core.finetune --task kws12 --data DIR --checkpoint DIR`."""

import argparse
import dataclasses
import functools
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from common.process_environment import restart

if __name__ == "__main__":
    restart()

import torch
from rich.console import Console

from common import command
from common.errors import DataError, Interrupted, UsageError
from common.settings import add_options, from_mapping, from_texts, read_yaml, to_yaml
from common.units import format_seconds
from ssl_core.downstream import results
from ssl_core.downstream.clips import TaskData
from ssl_core.downstream.decoding import Decoder, beam_search, greedy
from ssl_core.downstream.export import export
from ssl_core.downstream.finetuning import FineTuning
from ssl_core.downstream.loading import ClipLoader, check
from ssl_core.downstream.scoring import Scored, score_clips, verify
from ssl_core.downstream.task_model import LOGMEL, TaskModel, load_upstream
from ssl_core.downstream.task_recipe import TaskRecipe, recipe_of
from ssl_core.downstream.task_settings import TaskSettings
from ssl_core.downstream.task_step import TaskStep
from ssl_core.downstream.tasks import slots
from ssl_core.training.run_directory import RunDirectory, resumed


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneSettings(TaskSettings):
    """Settings of a centralised run."""

    checkpoint: str = ""
    """Directory of a backbone, this project's or transformers'; `random`, one as it is initialised;
    `logmel`, none."""
    model: str = "base"
    """Preset of `--checkpoint random`."""
    backbone: Literal["frozen", "unfrozen"] = "frozen"
    """Whether the backbone is trained too (also as `--frozen`, `--unfrozen`)."""
    beam: int = 0
    """Hypotheses of a beam search over the test set's texts; 0 decodes greedily."""
    words: str = ""
    """File with a word a line that a beam search chooses from."""
    ngram: str = ""
    """N-gram model of words that a beam search weighs, as KenLM reads it."""
    score_train: Literal["no", "yes"] = "no"
    """Whether the training clips are scored at the end too: how far they were learnt by heart."""
    keep: int = 2
    """Checkpoints to keep, beside the best epoch's weights."""
    output: str = ""
    """Run directory; empty makes one under `runs/`."""
    resume: str = ""
    """Run directory to go on with (its own settings are used)."""

    def as_config(self) -> str:
        """A run's `config.yaml`; what `recipe` says is in its `set`, as the file may change."""
        if not self.recipe:
            return super().as_config()
        listed = dataclasses.asdict(recipe_of(self.task, Path(self.recipe))).items()
        words = [f"{name.replace('_', '-')}={value}" for name, value in listed]
        return to_yaml(dataclasses.replace(self, recipe="", set=" ".join([*words, self.set])))

    def validate(self) -> None:
        """Check values and that they fit together.

        Raises:
            UsageError: what is wrong.
        """
        if not self.task:
            raise UsageError("--task: say which, such as --task kws12")
        recipe = self.task_recipe()
        if not self.checkpoint:
            raise UsageError("--checkpoint: give a directory, or one of random, logmel")
        if self.checkpoint == LOGMEL and self.backbone == "unfrozen":
            raise UsageError("--checkpoint logmel has no backbone to unfreeze")
        if self.beam < 0 or self.seed < 0 or self.keep < 1 or self.epochs < 0 or self.batch < 0:
            raise UsageError(
                "beam, seed, epochs and batch must not be below zero, keep not below 1"
            )
        if (self.beam or self.words or self.ngram) and not recipe.transcribes:
            raise UsageError(f"--beam, --words and --ngram are for texts; {self.task} has classes")
        if (self.words or self.ngram) and not self.beam:
            raise UsageError("--words and --ngram need a beam search, such as --beam 50")
        if self.task != "emotion" and self.fold != "1":
            raise UsageError("--fold is for emotion")
        self.cache_bytes  # noqa: B018, raises
        self.task_plan(recipe)


def parse(arguments: Sequence[str] | None) -> FinetuneSettings:
    """The settings, from options, `--config` or the run that `--resume` names.

    Raises:
        UsageError: an unknown setting or a bad value.
    """
    parser = command.Parser(
        prog="python -m ssl_core.finetune",
        description=__doc__,
        formatter_class=argparse.HelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="YAML file of any of the options below")
    add_options(parser, FinetuneSettings)
    for name in ("frozen", "unfrozen"):
        parser.add_argument(
            f"--{name}", dest="backbone", action="store_const", const=name,
            default=argparse.SUPPRESS, help=f"the same as --backbone {name}",
        )  # fmt: skip
    given = vars(parser.parse_args(arguments))
    config = given.pop("config")
    values = from_texts(FinetuneSettings, given)
    if config is not None:
        listed = {str(key).replace("-", "_"): value for key, value in read_yaml(config).items()}
        values = listed | values
    if values.get("resume"):
        values = resumed(FinetuneSettings, values, free=("resume", "keep", "cache"))
    return from_mapping(FinetuneSettings, values, "options")


def main(arguments: Sequence[str] | None = None) -> int:
    """Fine-tune; returns the exit code."""
    settings = parse(arguments)
    recipe = settings.task_recipe()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    folds = settings.folds()
    runs = [(fold, settings.read_data(recipe, fold)) for fold in folds]
    for _, data in runs:
        check(data, recipe)
    for line in runs[0][1].describe_skips():
        print(line)
    upstream = load_upstream(settings.checkpoint, settings.model, settings.seed)
    labels = runs[0][1].labels
    decode = greedy(labels)
    if settings.beam:
        decode = beam_search(labels, settings.beam, settings.words, settings.ngram)
    directory = _directory(settings)
    directory.lock()
    print(f"run directory {directory.path}", flush=True)
    found = []
    try:
        with _Stop() as stop:
            for number, (fold, data) in enumerate(runs):
                if number:
                    upstream = load_upstream(settings.checkpoint, settings.model, settings.seed)
                model = TaskModel.new(upstream, recipe, len(data.labels), settings.seed)
                place = directory
                if len(runs) > 1:
                    print(f"fold {fold} of {len(runs)}", flush=True)
                    place = RunDirectory(directory.path / f"fold-{fold}")
                    place.path.mkdir(exist_ok=True)
                found.append(finetune(settings, recipe, model, data, place, decode, stop))
    except Interrupted as stopped:
        raise Interrupted(f"{stopped}; go on with --resume {directory.path}") from None
    finally:
        directory.close()
    if len(runs) > 1:
        results.write_result(directory.path, _over_folds(found, recipe.metric))
        results.show_result(
            Console(), f"{settings.task}, all folds", _over_folds(found, recipe.metric)
        )
    print(directory.path)
    return 0


def _directory(settings: FinetuneSettings) -> RunDirectory:
    if settings.resume:
        return RunDirectory.reopen(Path(settings.resume).resolve())
    stamp = time.strftime("%Y%m%d-%H%M%S")
    output = settings.output or f"runs/{stamp}-{settings.task}-{settings.backbone}"
    return RunDirectory.create(Path(output).resolve(), settings.as_config())


class _Stop:
    """Whether the user wants to stop; a second Ctrl-C stops at once."""

    def __enter__(self) -> "_Stop":
        self.asked = False
        self._before = signal.signal(signal.SIGINT, self._stop)
        return self

    def _stop(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def __call__(self) -> bool:
        return self.asked


def finetune(
    settings: FinetuneSettings,
    recipe: TaskRecipe,
    model: TaskModel,
    data: TaskData,
    run: RunDirectory,
    decode: Decoder,
    stop: _Stop,
) -> dict[str, Any]:
    """Train, test the best epoch, and write everything into the run directory; the result.

    Raises:
        Interrupted: stopped by the user; the run can be resumed.
    """
    unfrozen = settings.backbone == "unfrozen"
    step = TaskStep(model, settings.task_plan(recipe), unfrozen=unfrozen, seed=settings.seed)
    limit = settings.cache_bytes
    loader = ClipLoader(data.root, data.labels, step, limit)
    cache = loader.cache
    print(
        f"{settings.task}: {len(data.train)} clips to train on, {len(data.valid)} to validate, "
        f"{len(data.test)} to test, {len(data.labels)} "
        f"{'symbols' if recipe.transcribes else 'classes'}; {settings.backbone} backbone "
        f"{settings.checkpoint}, {recipe.epochs} epochs of batches of {recipe.batch} "
        f"({step.plan.precision}, {step.plan.device})",
        flush=True,
    )
    readable = functools.partial(slots.readable, slots=slots.slot_names(Path(settings.data))) if (
        settings.task == "slots") else str  # fmt: skip
    try:
        start = time.monotonic()
        computed = loader.prepare((*data.train, *data.valid, *data.test), stopped=stop)
        if computed:
            print(
                f"{computed} clips went through the frozen "
                f"{'convolutions' if unfrozen else 'backbone'} once, "
                f"{format_seconds(time.monotonic() - start)}; kept in {cache.path}",
                flush=True,
            )
        lost = [clip.name for clip in data.test if clip.name in loader.bad]
        if data.trials and lost:
            raise DataError(f"{len(lost)} files of the trials cannot be used, such as {lost[0]}")
        if cache.problem and limit and step.stage != "waveform":
            print(f"some features are computed again in every epoch: {cache.problem}", flush=True)
        training = FineTuning(step, data, loader, run, seed=settings.seed, keep=settings.keep)
        training.run(stop)
        training.load_best()
        scored = score_clips(loader, data.test, recipe.batch, decode)
        result = _result(settings, recipe, training, data, scored, run)
        if settings.score_train == "yes":
            heard = score_clips(loader, data.train, recipe.batch, decode)
            result[f"train_{_name(recipe)}"] = heard.score(recipe.metric)
    finally:
        cache.close()
        run.close()
    for line in loader.describe_skips():
        print(line)
    if not data.trials:
        results.write_predictions(run.path, scored, readable)
    if not recipe.transcribes and not data.trials:
        results.plot_confusion(run.path, scored, data.labels)
    results.plot_learning(run.path, run.metrics(), recipe.metric)
    export(model, settings.task, data.labels, run.path / "model")
    results.write_result(run.path, result)
    console = Console()
    results.show_result(console, f"{settings.task}, test set", result)
    if not data.trials:
        results.show_errors(console, scored, readable)
    return result


def _result(
    settings: FinetuneSettings,
    recipe: TaskRecipe,
    training: FineTuning,
    data: TaskData,
    scored: Scored,
    run: RunDirectory,
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "task": settings.task,
        "checkpoint": settings.checkpoint,
        "backbone": settings.backbone,
        "best_epoch": training.best.get("epoch", 0),
        "test_clips": len(scored.clips),
    }
    if data.trials:
        rate, threshold, cosines = verify(scored, data.trials)
        result |= {"eer": rate, "threshold": threshold, "trials": len(cosines)}
        results.write_trials(run.path, data.trials, cosines)
    else:
        result["test_loss"] = scored.loss
        for metric in ("wer", "cer") if recipe.transcribes else ("accuracy",):
            result[metric] = scored.score(metric)
    result[f"valid_{_name(recipe)}"] = training.best.get("value", 0.0)
    result["clips_passed_over"] = sum(training.loader.skips.values())
    return result


def _name(recipe: TaskRecipe) -> str:
    """Of the score of clips; trials are not scored by clips."""
    return "accuracy" if recipe.metric == "eer" else recipe.metric


def _over_folds(found: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    values = torch.tensor([result[metric] for result in found], dtype=torch.float64)
    return {
        "folds": len(found),
        f"{metric}_mean": float(values.mean()),
        f"{metric}_deviation": float(values.std(correction=0)),
        **{f"fold_{number}": float(value) for number, value in enumerate(values, 1)},
    }


if __name__ == "__main__":
    command.run(main)
