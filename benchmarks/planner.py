"""The planner's estimates beside measurements: `python -m benchmarks.planner --data DIR`.

It has four parts: `--estimates` measures the peak of `UPDATES` updates of each of `CELLS`, in a
process of its own, and compares it with the estimate; `--tasks` does so for each of `TASK_CELLS`,
fine-tuning at the batch and length of the paper's Table 3; `--caps` plans each length and batch of
the paper's Table 2 for the memory that a board leaves for training, runs two updates of `base` on
real speech in a memory cgroup of that size, imports included, and then searches for the smallest
cap at which 15 s x 12 survives; `--table2` counts how many of the paper's 140 cells a plain step
agrees with, and how many a planned step fits.

The last line is one JSON object with `cells`, `under`, `worst_over`, `median_over`,
`killed_under_cap`, `table2_agree` and the like. The figures of `--tasks` are named `task_cells`,
... unless they are the only ones.
"""

import dataclasses
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from jsonargparse.typing import PositiveInt
from rich.console import Console

from benchmarks.planner_cells import CELLS, TASK_CELLS
from benchmarks.planner_report import Row, plot, print_caps, print_peaks
from benchmarks.speech_batches import SpeechBatches
from common import command, strict_json
from common.errors import ShortwaveError, UsageError
from common.options import settings_parser
from common.progress import track
from common.settings import parse
from ssl_core.downstream.task_work import task_work
from ssl_core.paper import table2_report as paper_report
from ssl_core.paper.planned_cell import agreement
from ssl_core.planning.decision import Decision
from ssl_core.planning.device_profiles import find_profile
from ssl_core.planning.estimate import estimate
from ssl_core.planning.ladder import describe, ladder
from ssl_core.planning.measure import measure
from ssl_core.planning.memory_cgroup import NoCgroup, capped
from ssl_core.planning.step_plan import Plan
from ssl_core.planning.work import Work
from ssl_core.training.pretraining_recipe import RECIPES
from ssl_core.training.pretraining_work import PretrainingWork
from ssl_core.wav2vec2.config import preset

MIB = 2**20
UPDATES = 3
"""The peak grows by a per cent or two after the second."""
LENGTHS, BATCHES = paper_report.LENGTHS, paper_report.BATCHES
BOARDS = (("8 GB", ("rpi4", "jetson-xavier-nx")), ("4 GB", ("rpi4-4gb",)))
"""Of several boards with the same memory, the one that leaves the least for training is the cap."""
FIGURE = Path(__file__).parent / "figures" / "planner.png"
CORES = PositiveInt(len(os.sched_getaffinity(0)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannerSettings:
    """Which parts to take; without any of the four, all."""

    data: Path | None = None
    """Corpus in LibriSpeech's layout for the caps, which are skipped without it."""
    threads: PositiveInt = CORES
    """CPU threads of a step."""
    table2: bool = False
    """Take the agreement with Table 2."""
    estimates: bool = False
    """Take the estimates of pretraining."""
    caps: bool = False
    """Take the runs under a cap."""
    tasks: bool = False
    """Take the estimates of downstream tasks."""
    figure: Path = FIGURE
    """PNG of the estimates to draw."""

    def takes(self, part: str) -> bool:
        """Whether to take a part, named as its option."""
        chosen = (self.table2, self.estimates, self.caps, self.tasks)
        return not any(chosen) or bool(getattr(self, part))


def pretraining(model: str) -> PretrainingWork:
    """Pretraining as a preset says."""
    return PretrainingWork(architecture=preset(model), recipe=RECIPES[model])


def compare_peak(work: Work, plan: Plan) -> Row:
    """Measured and estimated peak of an update, in bytes."""
    found = measure(work, plan, updates=UPDATES)
    predicted = estimate(work, plan, found.imports).total
    return {
        "length": plan.length, "batch": plan.batch, "precision": plan.precision,
        "plan": describe(plan, work.unit), "predicted": predicted, "measured": found.peak,
        "imports": found.imports, "over": predicted / found.peak - 1, "seconds": found.seconds,
    }  # fmt: skip


def run_estimates(threads: int, show: bool) -> list[Row]:
    """Measured and estimated peaks of pretraining, in bytes; `show` shows progress."""
    rows = []
    for cell in track(CELLS, len(CELLS), "estimates", show):
        work = pretraining(cell.model)
        plan = Plan(length=cell.length, batch=cell.batch, precision=cell.precision, threads=threads)
        plan = ladder(plan, work)[cell.rung].plan
        rows.append({"model": cell.model} | compare_peak(work, plan))
    return rows


def run_tasks(threads: int, show: bool) -> list[Row]:
    """Measured and estimated peaks of fine-tuning `base`, in bytes; `show` shows progress."""
    rows = []
    for cell in track(TASK_CELLS, len(TASK_CELLS), "tasks", show):
        unfrozen = cell.backbone == "unfrozen"
        work = task_work(cell.task, preset("base"), unfrozen=unfrozen, cached=cell.cached)
        plan = Plan(
            length=work.recipe.length,
            batch=cell.batch or work.recipe.batch,
            micro_batch=cell.micro_batch,
            precision=cell.precision,
            threads=threads,
        )
        named = {"task": cell.task, "backbone": cell.backbone, "cached": cell.cached}
        rows.append(named | compare_peak(work, plan))
    return rows


def run_caps(data: Path, threads: int, show: bool) -> list[Row]:
    """A row for each cell and board; `killed` where the cap was not enough.

    Args:
        data: corpus in LibriSpeech's layout.
        threads: CPU threads of a step.
        show: whether to show progress.
    """
    cells = [
        (memory, min(find_profile(board).training_bytes for board in boards), length, batch)
        for memory, boards in BOARDS
        for batch in BATCHES
        for length in LENGTHS
    ]
    rows = []
    for memory, cap, length, batch in track(cells, len(cells), "caps", show):
        plan = Plan(length=length, batch=batch, threads=threads)
        row: Row = {"board": memory, "cap": cap, "length": length, "batch": batch}
        try:
            option = Decision(pretraining("base"), plan, cap).require()
        except UsageError as error:
            rows.append(row | {"plan": "", "killed": True, "failure": str(error)})
            continue
        row |= {"plan": describe(option.plan), "predicted": option.estimate.total}
        rows.append(row | run_under(cap, option.plan, data))
    return rows


def run_under(cap: int, plan: Plan, data: Path) -> Row:
    """Take two updates of `base` under a hard cap.

    Args:
        cap: bytes.
        plan: how a step is taken.
        data: corpus in LibriSpeech's layout.
    """
    with capped(cap) as group:
        try:
            found = measure(
                pretraining("base"),
                plan,
                cgroup=str(group.folder),
                batches=SpeechBatches(data.absolute(), plan),
            )
        except ShortwaveError as error:
            return {"killed": True, "failure": str(error)}
    return {"killed": False, "peak": found.peak, "seconds": found.seconds}


def smallest_cap(data: Path, threads: int) -> int:
    """Bytes of the smallest cap at which two updates of 15 s x 12 survive, to 32 MiB."""
    plan = Plan(length=15.0, batch=12, threads=threads)
    leanest = Decision(pretraining("base"), plan, available=0).leanest
    plan = leanest.plan
    high = -(-leanest.estimate.total // (32 * MIB)) * 32 * MIB
    while run_under(high, plan, data)["killed"]:
        high += 128 * MIB
    while not run_under(high - 128 * MIB, plan, data)["killed"]:
        high -= 128 * MIB
    low = high - 128 * MIB
    while high - low > 32 * MIB:
        middle = (high + low) // 2
        low, high = (middle, high) if run_under(middle, plan, data)["killed"] else (low, middle)
    return high


def compare(rows: Sequence[Row], prefix: str = "") -> Row:
    """How predictions compare with measurements; empty if there are no rows."""
    over = [row["over"] for row in rows]
    if not over:
        return {}
    figures = {
        "cells": len(over),
        "under": sum(value < 0 for value in over),
        "worst_over": max(over),
        "median_over": statistics.median(over),
        "least_over": min(over),
    }
    return {prefix + name: value for name, value in figures.items()}


def summary(estimates: Sequence[Row], caps: Sequence[Row] | None) -> Row:
    """The figures of estimates and caps; `caps` is None if they were skipped."""
    result = compare(estimates)
    if caps is not None:
        result["capped_cells"] = len(caps)
        result["killed_under_cap"] = sum(row["killed"] for row in caps)
        result["caps"] = {row["board"]: row["cap"] for row in caps}
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = settings_parser(
        PlannerSettings, prog="python -m benchmarks.planner", description=__doc__
    )
    settings, _ = parse(PlannerSettings, parser, arguments)
    console, show = Console(stderr=True), True
    estimates: list[Row] = []
    tasks: list[Row] = []
    caps: list[Row] | None = None
    result: Row = {}
    if settings.takes("estimates"):
        estimates = run_estimates(settings.threads, show)
        plot(estimates, settings.figure)
        print_peaks(console, estimates)
    if settings.takes("tasks"):
        tasks = run_tasks(settings.threads, show)
        print_peaks(console, tasks)
    if settings.takes("caps") and settings.data is None:
        console.print("caps: skipped, they need --data")
    elif settings.takes("caps") and settings.data is not None:
        try:
            with capped(2**30):
                pass
            caps = run_caps(settings.data, settings.threads, show)
            result["smallest_cap_15s_x_12"] = smallest_cap(settings.data, settings.threads)
            print_caps(console, caps)
        except NoCgroup as error:
            console.print(f"caps: skipped: {error}")
    result |= summary(estimates, caps)
    result |= compare(tasks, "" if not estimates else "task_")
    if settings.takes("table2"):
        rows = paper_report.table2_rows(progress=show)
        found = agreement(rows)
        result["table2_cells"] = len(rows)
        result["table2_agree"] = found["agree"]
        result["table2_planned_fits"] = found["planned_fits"]
    print(strict_json.dumps(result))
    return 0


if __name__ == "__main__":
    command.run(main)
