"""The planner against reality: `python -m benchmarks.planner --data DIR`.

Four parts, and one JSON object with `cells`, `under`, `worst_over`, `median_over`,
`killed_under_cap`, `table2_agree` and the like as the last line:

- estimates: `UPDATES` of each of `CELLS` in a process of its own, its peak against the estimate;
- caps: each distinct length and batch of the paper's Table 2, planned for what a board leaves for
  training, is run for two updates of base on real speech in a memory cgroup of that size, imports
  included; then the smallest cap at which 15 s x 12 survives is looked for;
- table2: agreement of the plain step with the paper's 140 cells, and whether planned steps fit;
- tasks: as estimates, of each of `TASK_CELLS`, fine-tuning at the batch and length of the paper's
  Table 3; alone its figures are called `cells`, `under`, ..., beside others `task_cells`, ...
"""

import argparse
import dataclasses
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from ssl_core.training.overrides import resolve

from common import command
from common.errors import ShortwaveError
from common.figures import save_figure
from common.progress import track
from common.units import format_bytes, format_length
from ssl_core.downstream.task_work import task_work
from ssl_core.paper import table2_report as paper_report
from ssl_core.planning.device_profiles import find_profile
from ssl_core.planning.estimate import RUNTIME, estimate
from ssl_core.planning.ladder import choose, describe, ladder, leanest
from ssl_core.planning.measure import measure
from ssl_core.planning.memory_cgroup import NoCgroup, capped
from ssl_core.planning.step_plan import Plan

MIB = 2**20
UPDATES = 3
"""The peak grows by a per cent or two after the second."""
LENGTHS, BATCHES = paper_report.LENGTHS, paper_report.BATCHES
BOARDS = (("8 GB", ("rpi4", "jetson-xavier-nx")), ("4 GB", ("rpi4-4gb",)))
"""Where several boards have as much memory, the cap is that of the one with the least left."""
FIGURE = Path(__file__).parent / "figures" / "planner.png"
CELLS: tuple[tuple[str, float, int, str, int], ...] = (
    # model, length, batch, precision, rung of the planner's ladder from the fastest; chosen before
    # anything was measured, every rung and both ends of the sizes among them
    ("base", 1.0, 1, "fp32", 0), ("base", 1.0, 12, "fp32", 1), ("base", 1.0, 4, "bf16", 0),
    ("base", 1.0, 8, "fp32", -1), ("base", 1.0, 2, "bf16", -2), ("base", 5.0, 1, "fp32", 1),
    ("base", 5.0, 2, "fp32", 0), ("base", 5.0, 4, "fp32", 0), ("base", 5.0, 4, "bf16", 0),
    ("base", 5.0, 4, "fp32", 2), ("base", 5.0, 8, "fp32", 3), ("base", 5.0, 8, "bf16", 1),
    ("base", 5.0, 12, "fp32", -1), ("base", 5.0, 12, "bf16", -2), ("base", 5.0, 4, "fp32", 4),
    ("base", 10.0, 1, "fp32", 0), ("base", 10.0, 2, "bf16", 0), ("base", 10.0, 4, "fp32", 1),
    ("base", 10.0, 8, "fp32", 4), ("base", 10.0, 4, "bf16", -1), ("base", 10.0, 2, "fp32", -3),
    ("base", 15.0, 1, "fp32", 1), ("base", 15.0, 2, "fp32", 2), ("base", 15.0, 4, "bf16", 1),
    ("base", 15.0, 8, "bf16", -1), ("base", 15.0, 4, "fp32", -3), ("base", 15.0, 2, "bf16", 0),
    ("tiny", 1.0, 1, "fp32", 0), ("tiny", 1.0, 8, "fp32", 1), ("tiny", 1.0, 12, "bf16", 0),
    ("tiny", 1.0, 4, "fp32", -1), ("tiny", 2.0, 4, "bf16", 2), ("tiny", 5.0, 1, "bf16", 1),
    ("tiny", 5.0, 4, "fp32", 0), ("tiny", 5.0, 8, "fp32", 2), ("tiny", 5.0, 12, "bf16", 3),
    ("tiny", 5.0, 12, "fp32", -2), ("tiny", 10.0, 2, "fp32", 1), ("tiny", 10.0, 4, "bf16", 0),
    ("tiny", 10.0, 8, "fp32", 3), ("tiny", 10.0, 12, "fp32", 0), ("tiny", 15.0, 1, "bf16", -1),
    ("tiny", 15.0, 4, "fp32", 1), ("tiny", 15.0, 8, "bf16", 4), ("tiny", 15.0, 12, "fp32", -3),
    ("tiny", 15.0, 12, "bf16", 1),
)  # fmt: skip
TASK_CELLS: tuple[tuple[str, str, str, int, int, bool], ...] = (
    # task, backbone, precision, batch (0: the paper's), micro-batch, whether features were computed
    # before; in bf16, which is slow where a processor does not multiply in it, small batches
    ("kws12", "frozen", "fp32", 0, 0, False), ("kws12", "unfrozen", "fp32", 0, 0, False),
    ("slots", "frozen", "fp32", 0, 0, False), ("slots", "unfrozen", "fp32", 0, 0, False),
    ("emotion", "frozen", "fp32", 0, 0, False), ("emotion", "unfrozen", "fp32", 0, 0, False),
    ("speaker", "frozen", "fp32", 0, 0, False), ("speaker", "unfrozen", "fp32", 0, 0, False),
    ("asr", "frozen", "fp32", 0, 0, False), ("asr", "unfrozen", "fp32", 0, 0, False),
    ("kws12", "frozen", "fp32", 0, 0, True), ("asr", "frozen", "fp32", 0, 0, True),
    ("kws12", "frozen", "bf16", 8, 0, False), ("kws12", "unfrozen", "bf16", 8, 0, False),
    ("kws12", "unfrozen", "fp32", 0, 4, False), ("slots", "frozen", "fp32", 0, 1, False),
    ("asr", "unfrozen", "fp32", 0, 1, False),
)  # fmt: skip

Row = dict[str, Any]


def run_estimates(threads: int, show: bool) -> list[Row]:
    """Measured and estimated peaks, bytes."""
    rows = []
    for model, length, batch, precision, rung in track(CELLS, len(CELLS), "estimates", show):
        config, recipe = resolve(model, "")
        plan = Plan(length=length, batch=batch, precision=precision, threads=threads)  # type: ignore[arg-type]
        plan = ladder(plan, recipe)[rung][1]
        found = measure(model, "", dataclasses.asdict(plan), updates=UPDATES)
        predicted = estimate(config, recipe, plan, found.imports).total
        rows.append(
            {
                "model": model, "length": length, "batch": batch, "precision": precision,
                "plan": describe(plan), "predicted": predicted, "measured": found.peak,
                "imports": found.imports, "over": predicted / found.peak - 1,
            }
        )  # fmt: skip
    return rows


def run_tasks(threads: int, show: bool) -> list[Row]:
    """Measured and estimated peaks of fine-tuning `base`, bytes."""
    rows = []
    config, _ = resolve("base", "")
    for task, backbone, precision, batch, size, cached in track(
        TASK_CELLS, len(TASK_CELLS), "tasks", show
    ):
        unfrozen = backbone == "unfrozen"
        work = task_work(task, unfrozen=unfrozen, cached=cached)
        plan = Plan(
            length=work.recipe.length, batch=batch or work.recipe.batch, micro_batch=size,
            precision=precision, threads=threads,  # type: ignore[arg-type]
        )  # fmt: skip
        found = measure(
            "base", "", dataclasses.asdict(plan), updates=UPDATES, task=task, unfrozen=unfrozen,
            cached=cached,
        )  # fmt: skip
        predicted = estimate(config, work, plan, found.imports).total
        rows.append(
            {
                "task": task, "backbone": backbone, "precision": precision, "cached": cached,
                "length": plan.length, "batch": plan.batch, "plan": describe(plan, "clips"),
                "predicted": predicted, "measured": found.peak, "imports": found.imports,
                "over": predicted / found.peak - 1, "seconds": found.seconds,
            }
        )  # fmt: skip
    return rows


def run_caps(data: Path, threads: int, show: bool) -> list[Row]:
    """A row for each cell and board; `killed` where the cap was not enough."""
    config, recipe = resolve("base", "")
    cells = [
        (memory, min(find_profile(board).training_bytes for board in boards), length, batch)
        for memory, boards in BOARDS
        for batch in BATCHES
        for length in LENGTHS
    ]
    rows = []
    for memory, cap, length, batch in track(cells, len(cells), "caps", show):
        plan = Plan(length=length, batch=batch, threads=threads)
        decision = choose(config, recipe, plan, cap, RUNTIME)
        row = {"board": memory, "cap": cap, "length": length, "batch": batch}
        if decision.chosen is None:
            rows.append(row | {"plan": "", "killed": True, "failure": decision.explain()})
            continue
        option = decision.chosen
        row |= {"plan": describe(option.plan), "predicted": option.estimate.total}
        rows.append(row | run_under(cap, option.plan, data))
    return rows


def run_under(cap: int, plan: Plan, data: Path) -> Row:
    """Two updates of base under a hard cap."""
    with capped(cap) as group:
        try:
            found = measure(
                "base", "", dataclasses.asdict(plan), cgroup=str(group.folder), data=str(data)
            )
        except ShortwaveError as error:
            return {"killed": True, "failure": str(error)}
    return {"killed": False, "peak": found.peak, "seconds": found.seconds}


def smallest_cap(data: Path, threads: int) -> int:
    """Bytes of the smallest cap at which two updates of 15 s x 12 survive, to 32 MiB."""
    config, recipe = resolve("base", "")
    plan = leanest(config, recipe, Plan(length=15.0, batch=12, threads=threads))
    high = -(-estimate(config, recipe, plan).total // (32 * MIB)) * 32 * MIB
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
    """How predictions compare with measurements; nothing of no rows."""
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
    """The figures that the parts come down to; None for a part that did not run."""
    result = compare(estimates)
    if caps is not None:
        result["capped_cells"] = len(caps)
        result["killed_under_cap"] = sum(row["killed"] for row in caps)
        result["caps"] = {row["board"]: row["cap"] for row in caps}
    return result


def plot(rows: Sequence[Row], path: Path) -> None:
    """Predicted over measured peak, a point for each cell."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for model, mark in (("base", "o"), ("tiny", "s")):
        for precision, colour in (("fp32", "C0"), ("bf16", "C1")):
            own = [r for r in rows if (r["model"], r["precision"]) == (model, precision)]
            axes.semilogx(
                [r["measured"] / 2**30 for r in own],
                [100 * r["over"] for r in own],
                mark, color=colour, markersize=4, label=f"{model}, {precision}",
            )  # fmt: skip
    axes.axhline(0, color="0.3", linewidth=1)
    axes.axhline(10, color="0.6", linewidth=1, linestyle=":")
    axes.set_xlabel("measured peak of the process (GiB)")
    axes.set_ylabel("predicted above measured (%)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = command.Parser(
        prog="python -m benchmarks.planner",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="corpus for the caps; without it they are left")
    parser.add_argument(
        "--threads", type=command.argument(command.positive), default=len(os.sched_getaffinity(0)),
        help="CPU threads of a step",
    )  # fmt: skip
    parser.add_argument("--table2", action="store_true", help="that part alone")
    parser.add_argument("--estimates", action="store_true", help="that part alone")
    parser.add_argument("--caps", action="store_true", help="that part alone")
    parser.add_argument("--tasks", action="store_true", help="that part alone")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="PNG of the estimates to draw")
    options = parser.parse_args(arguments)
    every = not (options.table2 or options.estimates or options.caps or options.tasks)
    console, show = Console(stderr=True), True
    estimates: list[Row] = []
    caps: list[Row] | None = None
    result: Row = {}
    if every or options.estimates:
        estimates = run_estimates(options.threads, show)
        plot(estimates, options.figure)
        for row in estimates:
            console.print(
                f"{row['model']} {format_length(row['length'])} x {row['batch']} "
                f"{row['precision']}: {format_bytes(row['measured'])}, predicted "
                f"{row['over']:+.1%} ({row['plan']})",
                highlight=False,
            )
    tasks: list[Row] = []
    if every or options.tasks:
        tasks = run_tasks(options.threads, show)
        for row in tasks:
            cached = ", features cached" if row["cached"] else ""
            console.print(
                f"{row['task']} {row['backbone']}{cached}, {format_length(row['length'])} x "
                f"{row['batch']} {row['precision']}: {format_bytes(row['measured'])}, predicted "
                f"{row['over']:+.1%} ({row['plan']})",
                highlight=False,
            )
    if (every or options.caps) and options.data is None:
        console.print("caps: skipped, they need --data")
    elif every or options.caps:
        try:
            with capped(2**30):
                pass
            caps = run_caps(options.data, options.threads, show)
            result["smallest_cap_15s_x_12"] = smallest_cap(options.data, options.threads)
            for row in caps:
                end = row.get("failure") or f"{format_bytes(row['peak'])}, {row['seconds']:.1f} s"
                console.print(
                    f"{row['board']} ({format_bytes(row['cap'])}): {format_length(row['length'])} "
                    f"x {row['batch']}: {end} ({row['plan']})",
                    highlight=False,
                )
        except NoCgroup as error:
            console.print(f"caps: skipped: {error}")
    result |= summary(estimates, caps)
    result |= compare(tasks, "" if not estimates else "task_")
    if every or options.table2:
        rows = paper_report.table2_rows(progress=show)
        result["table2_cells"] = len(rows)
        result["table2_agree"] = sum(row["paper"] == row["plain"] for row in rows)
        result["table2_planned_fits"] = sum(row["planned"] == "fits" for row in rows)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    command.run(main)
