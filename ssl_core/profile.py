"""Measure what the planner predicts: `python -m ssl_core.profile --lengths 1s 5s --batches 1 4`.

For each combination, a separate process takes two updates on noise. The table compares its peak
resident memory with the estimate, and gives seconds and operations (torch's flop counter). With
--device cuda it takes twelve, and compares what torch allocates and reserves of the GPU's memory.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

from jsonargparse.typing import PositiveInt

from common import command, strict_json
from common.atomic import write_text
from common.options import settings_parser
from common.progress import track
from common.settings import parse
from common.tables import console_for
from common.units import Seconds
from ssl_core.planning.comparison import (
    allocated_lines,
    compare,
    comparison_table,
    plot_comparison,
)
from ssl_core.planning.decision import PlanName, as_planned
from ssl_core.planning.step_plan import Plan, Precision, StepOptions
from ssl_core.training.model_settings import ModelSettings
from ssl_core.training.pretraining_work import PretrainingWork
from ssl_core.training.torch_device import choose_device


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileSettings(ModelSettings):
    """What to measure."""

    lengths: tuple[Seconds, ...] = (Seconds(1), Seconds(5), Seconds(10), Seconds(15))
    """Lengths of crops."""
    batches: tuple[PositiveInt, ...] = (PositiveInt(1), PositiveInt(2), PositiveInt(4))
    """Batch sizes in crops."""
    precisions: tuple[Precision, ...] = ("fp32",)
    """Precisions of matrix products."""
    plans: tuple[PlanName, ...] = ("leanest",)
    """Plans: that of the options --plan, or the fastest or leanest of the planner's ladder."""
    plan: StepOptions = StepOptions()
    """How a step trades time for memory; values given here override the ladder's."""
    device: str = "cpu"
    """Torch device: cpu, cuda, cuda:1; auto is CUDA if available."""
    threads: PositiveInt = PositiveInt(1)
    """CPU threads."""
    output: Path | None = None
    """Folder for profile.json and profile.png."""
    json: bool = False
    """Print JSON only."""


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
    device = choose_device(settings.device)
    cells = []
    for precision, name, length, batch in itertools.product(
        settings.precisions, settings.plans, settings.lengths, settings.batches
    ):
        plan = Plan(
            length=length,
            batch=batch,
            precision=precision,
            threads=settings.threads,
            device=device,
        )
        plan = dataclasses.replace(as_planned(name, work, plan), **changed)
        work.validate(plan)
        cells.append((name, plan))
    started = time.strftime("%Y-%m-%d %H:%M")
    rows = [
        compare(work, name, plan)
        for name, plan in track(cells, len(cells), "profile", not settings.json)
    ]
    result = {"model": settings.model, "date": started, "cells": rows}
    if settings.output:
        settings.output.mkdir(parents=True, exist_ok=True)
        write_text(settings.output / "profile.json", strict_json.dumps(result, indent=2) + "\n")
        plot_comparison(rows, settings.output / "profile.png")
    if settings.json:
        print(strict_json.dumps(result))
        return 0
    table = comparison_table(rows)
    console_for(table).print(table)
    for line in allocated_lines(rows):
        print(line)
    if settings.output:
        print(settings.output)
    return 0


if __name__ == "__main__":
    command.run(main)
