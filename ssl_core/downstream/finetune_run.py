"""A central run of fine-tuning: train, test the best epoch, write results and model."""

import functools
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from common.errors import DataError
from common.stop import Stop
from common.units import format_seconds
from ssl_core.downstream import results
from ssl_core.downstream.clip_loader import ClipLoader
from ssl_core.downstream.clips import TaskData
from ssl_core.downstream.corpora import slots
from ssl_core.downstream.decoding import Decoder
from ssl_core.downstream.export import export
from ssl_core.downstream.finetune_settings import FinetuneSettings
from ssl_core.downstream.finetuning import FineTuning
from ssl_core.downstream.frozen_part import FrozenPart
from ssl_core.downstream.scoring import Scored, score_clips, verify
from ssl_core.downstream.task_model import TaskModel
from ssl_core.downstream.task_recipe import TaskRecipe
from ssl_core.downstream.task_step import TaskStep
from ssl_core.training.run_directory import RunDirectory


def finetune(
    settings: FinetuneSettings,
    model: TaskModel,
    data: TaskData,
    run: RunDirectory,
    decode: Decoder,
    stop: Stop,
) -> dict[str, Any]:
    """Train, test the best epoch, and write the results into the run directory.

    Args:
        settings: of the run.
        model: backbone and head.
        data: clips to train, validate and test on.
        run: directory of the run, or of one fold of it.
        decode: from logits to texts.
        stop: whether the user wants to stop.

    Returns:
        Scores by name, as in `result.json`.

    Raises:
        Interrupted: the user stopped; the run can be resumed.
    """
    recipe, unfrozen = settings.recipe, settings.backbone == "unfrozen"
    step = TaskStep(model, settings.step_plan(), unfrozen=unfrozen, seed=settings.seed)
    frozen = FrozenPart(step)
    loader = ClipLoader(data.root, data.labels, recipe, frozen, settings.cache)
    print(
        f"{settings.task}: {len(data.train)} clips to train on, {len(data.valid)} to validate, "
        f"{len(data.test)} to test, {len(data.labels)} "
        f"{'symbols' if recipe.transcribes else 'classes'}; {settings.backbone} backbone "
        f"{settings.checkpoint}, {recipe.epochs} epochs of batches of {recipe.batch} "
        f"({step.plan.precision}, {step.plan.device})",
        flush=True,
    )
    try:
        _compute_features(settings, loader, data, stop)
        training = FineTuning(step, data, loader, run, seed=settings.seed, keep=settings.keep)
        training.run(stop)
        training.load_best()
        scored = score_clips(step, loader, data.test, recipe.batch, decode)
        result = _result(settings, training, data, scored, run)
        if settings.score_train:
            heard = score_clips(step, loader, data.train, recipe.batch, decode)
            result[f"train_{_name(recipe)}"] = heard.score(recipe.metric)
    finally:
        loader.cache.close()
        run.close()
    for line in loader.describe_skips():
        print(line)
    _report(settings, model, data, run, scored, result)
    return result


def _compute_features(
    settings: FinetuneSettings, loader: ClipLoader, data: TaskData, stop: Stop
) -> None:
    """Compute missing features of the cache; print how many, and whether the cache has room."""
    start = time.monotonic()
    computed = loader.prepare((*data.train, *data.valid, *data.test), stopped=stop)
    if computed:
        part = "convolutions" if settings.backbone == "unfrozen" else "backbone"
        print(
            f"{computed} clips went through the frozen {part} once, "
            f"{format_seconds(time.monotonic() - start)}; kept in {loader.cache.path}",
            flush=True,
        )
    lost = [clip.name for clip in data.test if clip.name in loader.bad]
    if data.trials and lost:
        raise DataError(f"{len(lost)} files of the trials cannot be used, such as {lost[0]}")
    if loader.cache.problem and settings.cache and loader.frozen.makes_features:
        problem = loader.cache.problem
        print(f"some features are computed again in every epoch: {problem}", flush=True)


def _report(
    settings: FinetuneSettings,
    model: TaskModel,
    data: TaskData,
    run: RunDirectory,
    scored: Scored,
    result: dict[str, Any],
) -> None:
    """Write predictions, figures, model and scores; print the scores and some errors."""
    recipe, console = settings.recipe, Console()
    readable: results.Readable = str
    if settings.task == "slots":
        readable = functools.partial(slots.readable, slots=slots.slot_names(settings.corpus()))
    if not data.trials:
        results.write_predictions(run.path, scored, readable)
        if not recipe.transcribes:
            results.plot_confusion(run.path, scored, data.labels)
    results.plot_learning(run.path, run.metrics(), recipe.metric)
    export(model, settings.task, data.labels, run.path / "model")
    results.write_result(run.path, result)
    results.show_result(console, f"{settings.task}, test set", result)
    if not data.trials:
        results.show_errors(console, scored, readable)


def _result(
    settings: FinetuneSettings,
    training: FineTuning,
    data: TaskData,
    scored: Scored,
    run: RunDirectory,
) -> dict[str, Any]:
    recipe = settings.recipe
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
    result["clips_skipped"] = sum(training.loader.skips.values())
    return result


def _name(recipe: TaskRecipe) -> str:
    """Name of the metric of single clips; accuracy for `eer`, which needs trials."""
    return "accuracy" if recipe.metric == "eer" else recipe.metric


def over_folds(found: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """Mean and standard deviation of a metric over folds, and its value in each fold."""
    values = torch.tensor([result[metric] for result in found], dtype=torch.float64)
    return {
        "folds": len(found),
        f"{metric}_mean": float(values.mean()),
        f"{metric}_deviation": float(values.std(correction=0)),
        **{f"fold_{number}": float(value) for number, value in enumerate(values, 1)},
    }
