"""The paper's Table 3 and Figure 3 beside what follows from shapes: rows, tables and figures."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from common.errors import UsageError
from common.figures import save_figure
from common.progress import track
from common.units import format_bytes, format_length, format_seconds
from ssl_core.downstream.task_work import task_work
from ssl_core.paper.device_seconds import task_seconds
from ssl_core.paper.table3 import paper_task_cells, task_need
from ssl_core.planning.device_profiles import known_profiles
from ssl_core.planning.estimate import estimate
from ssl_core.planning.ladder import choose, describe, fitting
from ssl_core.planning.measure import measure
from ssl_core.planning.step_plan import Plan
from ssl_core.wav2vec2.config import preset

Rows = Sequence[dict[str, Any]]

FIGURE_TASKS = ("kws12", "emotion")
"""KWS and ER, the paper's Figure 3."""
EPOCHS, EPOCH_UPDATES = 10, 2
"""Of the figure; an epoch is cut short: every update takes the same memory."""


def table3_rows(progress: bool = False) -> Rows:
    """A row for each cell: what the paper saw, a plain step and a planned one; sizes in bytes.

    All in fp32, and a frozen backbone runs in every update, as in the paper.
    """
    profiles, rows, config = known_profiles(), [], preset("base")
    cells = paper_task_cells()
    for cell in track(cells, len(cells), "plan", progress):
        profile, work = profiles[cell.device], cell.work
        plan = Plan(length=cell.length, batch=cell.batch, device=profile.accelerator)
        room = profile.process_bytes
        try:
            option, planned = fitting(config, work, plan, room, profile.clientapp), "fits"
        except UsageError:
            option, planned = choose(config, work, plan, room, profile.clientapp).leanest, "oom"
        need = task_need(cell, profile.accelerator)
        rows.append({
            "task": cell.task,
            "device": cell.device,
            "backbone": cell.backbone,
            "length": cell.length,
            "batch": cell.batch,
            "paper": cell.outcome,
            "paper_seconds": cell.seconds,
            "room": profile.training_bytes,
            "plain": "fits" if need <= profile.training_bytes else "oom",
            "plain_bytes": need,
            "planned": planned,
            "planned_bytes": option.estimate.total - profile.clientapp,
            "plan": describe(option.plan, "clips"),
            "estimated_seconds": task_seconds(profile, config, work, option.plan, option.slowdown),
        })  # fmt: skip
    return rows


def table3_result(rows: Rows) -> dict[str, Any]:
    """The rows, and how many agree with the paper."""
    return {
        "cells": rows,
        "agree": sum(row["paper"] == row["plain"] for row in rows),
        "planned_fits": sum(row["planned"] == "fits" for row in rows),
    }


def table3_lines(result: dict[str, Any]) -> list[str]:
    """The counts for people."""
    count = len(result["cells"])
    return [
        f"a plain step agrees with the paper in {result['agree']} of {count} cells",
        f"a planned step fits in {result['planned_fits']} of {count} cells",
        "seconds of the planned step are estimated from the paper's Table 2",
    ]


def table3_table(rows: Rows) -> Table:
    """The rows for people."""
    table = Table()
    heads = ("task", "clips", "device", "backbone", "paper", "room", "plain step", "planned step")
    for head in (*heads, "estimated"):
        table.add_column(head, justify="left" if head in heads[::2][:2] else "right")
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        seconds, guess = row["paper_seconds"], row["estimated_seconds"]
        wrong = "" if row["paper"] == row["plain"] else " [red]not as in the paper[/red]"
        table.add_row(
            row["task"],
            f"{row['batch']} x {format_length(row['length'])}",
            row["device"],
            row["backbone"],
            "oom" if seconds is None else f"{seconds:.2f} s",
            format_bytes(row["room"]),
            f"{row['plain']}, {format_bytes(row['plain_bytes'])}{wrong}",
            f"{row['planned']}, {format_bytes(row['planned_bytes'])}",
            "" if guess is None else format_seconds(guess),
            end_section=after is not None and after["task"] != row["task"],
        )
    return table


def figure3_rows(measured: bool, progress: bool = False) -> Rows:
    """A row for each task and backbone: the step's memory, and where wanted what it was here.

    Memory is in bytes; `rest` is what stays between updates, `peak` the most in one. Measured
    footprints are of `EPOCHS` epochs of `EPOCH_UPDATES` updates on noise, of `base` in fp32, in a
    process of its own.
    """
    config, rows = preset("base"), []
    cells = [(task, unfrozen) for task in FIGURE_TASKS for unfrozen in (False, True)]
    for task, unfrozen in track(cells, len(cells), "footprints", progress):
        work = task_work(task, unfrozen=unfrozen)
        plan = Plan(length=work.length, batch=work.recipe.batch, threads=os.cpu_count() or 1)
        found = None
        if measured:
            found = measure(
                "base", "", dataclasses.asdict(plan), task=task, unfrozen=unfrozen,
                updates=EPOCHS * EPOCH_UPDATES, sample=0.1,
            )  # fmt: skip
        need = estimate(config, work, plan, *([found.imports] if found else []))
        staying = ("imports", "parameters", "optimizer state")
        rows.append({
            "task": task,
            "backbone": "unfrozen" if unfrozen else "frozen",
            "length": plan.length,
            "batch": plan.batch,
            "peak": need.total,
            "rest": sum(need.parts.get(name, 0) for name in staying),
            "measured": found.peak if found else None,
            "seconds": found.footprint[-1][0] if found else None,
            "footprint": found.footprint if found else [],
        })  # fmt: skip
    return rows


def figure3_table(rows: Rows) -> Table:
    """The rows for people."""
    table = Table()
    for head in ("task", "clips", "backbone", "between updates", "peak", "measured", "ten epochs"):
        table.add_column(head, justify="left" if head in ("task", "backbone") else "right")
    for row in rows:
        measured = row["measured"]
        table.add_row(
            row["task"],
            f"{row['batch']} x {format_length(row['length'])}",
            row["backbone"],
            format_bytes(row["rest"]),
            format_bytes(row["peak"]),
            "" if measured is None else format_bytes(measured),
            "" if measured is None else format_seconds(row["seconds"]),
        )
    return table


def plot_figure3(rows: Rows, path: Path) -> None:
    """Memory over ten epochs, a panel for each task: predicted peaks, and measured footprints."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(FIGURE_TASKS)), FIGURE_TASKS, strict=True):
        for number, row in enumerate([row for row in rows if row["task"] == task]):
            colour = f"C{number}"
            end = row["seconds"] or EPOCHS
            label = f"{row['backbone']}, predicted"
            axes.plot([0, end], [row["peak"] / 2**30] * 2, "--", color=colour, label=label)
            if row["footprint"]:
                times = [seconds for seconds, _ in row["footprint"]]
                sizes = [size / 2**30 for _, size in row["footprint"]]
                label = f"{row['backbone']}, measured"
                axes.plot(times, sizes, color=colour, linewidth=1, label=label)
            else:
                axes.axhline(row["rest"] / 2**30, color=colour, linewidth=1, linestyle=":")
        own = next(row for row in rows if row["task"] == task)
        axes.set_title(f"{task}, {own['batch']} x {format_length(own['length'])}")
        axes.set_xlabel("seconds" if own["footprint"] else "epochs")
        axes.set_ylabel("memory of the process (GiB)")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(figure, path)
