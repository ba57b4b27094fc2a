"""Measure what the planner predicts: `python -m ssl_core.profile --lengths 1s 5s --batches 1 4`.

For each combination, a separate process takes two updates on noise. The table compares its peak
resident memory with the estimate, and gives seconds and operations (torch's flop counter).
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import PositiveInt
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from common import command
from common.atomic import write_text
from common.errors import ShortwaveError
from common.figures import save_figure
from common.options import settings_parser
from common.progress import track
from common.settings import parse
from common.units import Seconds, format_bytes, format_length
from ssl_core.planning.decision import Decision
from ssl_core.planning.estimate import estimate
from ssl_core.planning.measure import measure
from ssl_core.planning.operation_count import count_operations
from ssl_core.planning.step_plan import Plan, StepOptions
from ssl_core.planning.work import Work
from ssl_core.training.pretraining_recipe import RECIPES, Recipe
from ssl_core.training.pretraining_work import PretrainingWork
from ssl_core.wav2vec2.config import ModelConfig, preset

PlanName = Literal["default", "fastest", "leanest"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """What to measure."""

    model: str = "base"
    """Preset of architecture and recipe: base or tiny."""
    architecture: ModelConfig = ModelConfig()
    """Architecture; by default the preset's."""
    recipe: Recipe = Recipe()
    """Pretraining recipe; by default the preset's."""
    lengths: tuple[Seconds, ...] = (Seconds(1), Seconds(5), Seconds(10), Seconds(15))
    """Lengths of crops."""
    batches: tuple[PositiveInt, ...] = (PositiveInt(1), PositiveInt(2), PositiveInt(4))
    """Batch sizes in crops."""
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32",)
    """Precisions of matrix products."""
    plans: tuple[PlanName, ...] = ("leanest",)
    """Plans: that of the options --plan, or the fastest or leanest of the planner's ladder."""
    plan: StepOptions = StepOptions()
    """How a step trades time for memory; values given here override the ladder's."""
    threads: PositiveInt = PositiveInt(1)
    """CPU threads."""
    output: Path | None = None
    """Folder for profile.json and profile.png."""
    json: bool = False
    """Print JSON only."""

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Architecture and recipe of the preset; raises `UsageError` for an unknown one."""
        name = str(given.get("model", cls.model))
        return {"architecture": preset(name), "recipe": RECIPES[name]}


def as_planned(name: PlanName, work: Work, plan: Plan) -> Plan:
    """Return a plan unchanged, or the fastest or leanest of the planner's ladder for it.

    Args:
        name: which plan.
        work: what is trained.
        plan: length, batch, precision and threads.
    """
    if name == "default":
        return plan
    decision = Decision(work, plan, available=0)
    return decision.fastest.plan if name == "fastest" else decision.leanest.plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and compare; returns the exit code."""
    parser = settings_parser(
        ProfileSettings, prog="python -m ssl_core.profile", description=__doc__
    )
    settings, _ = parse(ProfileSettings, parser, arguments)
    work = PretrainingWork(architecture=settings.architecture, recipe=settings.recipe)
    default = StepOptions()
    changed = {
        name: value
        for name, value in vars(settings.plan).items()
        if value != getattr(default, name)
    }
    cells = []
    for precision, name, length, batch in itertools.product(
        settings.precisions, settings.plans, settings.lengths, settings.batches
    ):
        plan = Plan(length=length, batch=batch, precision=precision, threads=settings.threads)
        plan = dataclasses.replace(as_planned(name, work, plan), **changed)
        work.validate(plan)
        cells.append((name, plan))
    started = time.strftime("%Y-%m-%d %H:%M")
    rows = [
        profile(work, name, plan)
        for name, plan in track(cells, len(cells), "profile", not settings.json)
    ]
    result = {"model": settings.model, "date": started, "cells": rows}
    if settings.output:
        settings.output.mkdir(parents=True, exist_ok=True)
        write_text(settings.output / "profile.json", json.dumps(result, indent=2) + "\n")
        plot(rows, settings.output / "profile.png")
    if settings.json:
        print(json.dumps(result))
        return 0
    Console().print(table(rows))
    if settings.output:
        print(settings.output)
    return 0


def profile(work: Work, name: str, plan: Plan) -> dict[str, Any]:
    """Measure a plan and compare with its estimate.

    Args:
        work: what is trained.
        name: name of the plan.
        plan: how a step is taken.

    Returns:
        A row of results; memory in bytes, `measured` None if the process failed.
    """
    row: dict[str, Any] = {
        "plan": name,
        "length": plan.length,
        "batch": plan.batch,
        "precision": plan.precision,
        "operations": count_operations(work, plan),
    }
    try:
        found = measure(work, plan)
    except ShortwaveError as error:
        predicted = estimate(work, plan).total
        return row | {"predicted": predicted, "measured": None, "failure": str(error)}
    predicted = estimate(work, plan, found.imports).total
    return row | {
        "predicted": predicted,
        "measured": found.peak,
        "over": predicted / found.peak - 1,
        "seconds": found.seconds,
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as a table."""
    result = Table()
    for head in ("plan", "length", "batch", "precision", "predicted", "measured", "over"):
        result.add_column(head, justify="right")
    result.add_column("TFLOP an update", justify="right")
    result.add_column("seconds", justify="right")
    for row in rows:
        measured = row["measured"] is not None
        result.add_row(
            row["plan"],
            format_length(row["length"]),
            str(row["batch"]),
            row["precision"],
            format_bytes(row["predicted"]),
            format_bytes(row["measured"]) if measured else row["failure"],
            f"{row['over']:+.1%}" if measured else "",
            f"{row['operations'] / 1e12:.3f}",
            f"{row['seconds']:.2f}" if measured else "",
        )
    return result


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot predicted against measured peaks, a point for each row."""
    figure = Figure(figsize=(5, 4.5), layout="constrained")
    axes = figure.subplots()
    points = [(r["measured"] / 2**30, r["predicted"] / 2**30) for r in rows if r["measured"]]
    axes.plot([x for x, _ in points], [y for _, y in points], "o", markersize=4, label="cells")
    most = max((y for _, y in points), default=1.0)
    axes.plot([0, most], [0, most], color="0.5", linewidth=1, label="as measured")
    axes.plot(
        [0, most], [0, 1.1 * most], color="0.5", linewidth=1, linestyle=":", label="10 % over"
    )
    axes.set_xlabel("measured peak (GiB)")
    axes.set_ylabel("predicted peak (GiB)")
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, path)


if __name__ == "__main__":
    command.run(main)
