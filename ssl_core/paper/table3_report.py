"""Reports the paper's Table 3 and Figure 3 beside predictions: rows, tables and figures."""

import os
from pathlib import Path
from typing import Any

from rich.table import Table

from common.figures import new_figure, plots, save_figure
from common.progress import track
from common.units import format_bytes, format_length, format_seconds
from ssl_core.downstream.task_work import task_work
from ssl_core.paper.device_seconds import update_seconds
from ssl_core.paper.planned_cell import COLUMNS, Rows, agreement_lines, columns, compare
from ssl_core.paper.table3 import paper_task_cells, task_need
from ssl_core.planning.device_profiles import known_profiles
from ssl_core.planning.estimate import estimate
from ssl_core.planning.measure import measure
from ssl_core.planning.step_plan import Plan
from ssl_core.wav2vec2.config import preset

FIGURE_TASKS = ("kws12", "emotion")
"""The tasks of the paper's Figure 3 (KWS and ER)."""
EPOCHS, EPOCH_UPDATES = 10, 2
"""Epochs of the figure, and updates of one; few, as every update takes the same memory."""


def table3_rows(progress: bool = False) -> Rows:
    """Compare each cell with a plain and a planned step; sizes in bytes.

    All cells are in fp32, and a frozen backbone runs in every update, as in the paper.
    """
    profiles, rows = known_profiles(), []
    cells = paper_task_cells()
    for cell in track(cells, len(cells), "plan", progress):
        profile, work = profiles[cell.device], cell.work
        plan = Plan(length=cell.length, batch=cell.batch, device=profile.accelerator)
        compared, decision = compare(
            profile,
            work,
            plan,
            paper=cell.outcome,
            seconds=cell.seconds,
            need=task_need(cell, profile.accelerator),
        )
        option = decision.chosen or decision.leanest
        rows.append({
            "task": cell.task,
            "device": cell.device,
            "backbone": cell.backbone,
            "length": cell.length,
            "batch": cell.batch,
            **compared,
            "estimated_seconds": update_seconds(profile, work, option.plan, option.slowdown),
        })  # fmt: skip
    return rows


def table3_lines(result: dict[str, Any]) -> list[str]:
    """The counts as lines of text."""
    note = "seconds of the planned step are estimated from the paper's Table 2"
    return [*agreement_lines(result), note]


def table3_table(rows: Rows) -> Table:
    """The rows as a table."""
    table = Table()
    for head in ("task", "clips", "device", "backbone", *COLUMNS, "estimated"):
        table.add_column(head, justify="left" if head in ("task", "device") else "right")
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        seconds = row["estimated_seconds"]
        table.add_row(
            row["task"],
            f"{row['batch']} x {format_length(row['length'])}",
            row["device"],
            row["backbone"],
            *columns(row),
            "" if seconds is None else format_seconds(seconds),
            end_section=after is not None and after["task"] != row["task"],
        )
    return table


def figure3_rows(measured: bool, progress: bool = False) -> Rows:
    """Predict, and optionally measure on this machine, a step's memory for each task and backbone.

    Memory is in bytes; `rest` is memory between updates, `peak` the most during one. A measurement
    is of `EPOCHS` epochs of `EPOCH_UPDATES` updates on noise, with `base` in fp32, in a separate
    process.
    """
    rows = []
    cells = [(task, unfrozen) for task in FIGURE_TASKS for unfrozen in (False, True)]
    for task, unfrozen in track(cells, len(cells), "footprints", progress):
        work = task_work(task, preset("base"), unfrozen=unfrozen)
        plan = Plan(length=work.length, batch=work.recipe.batch, threads=os.cpu_count() or 1)
        found = None
        if measured:
            found = measure(work, plan, updates=EPOCHS * EPOCH_UPDATES, sample=0.1)
        need = estimate(work, plan, *([found.imports] if found else []))
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
    """The rows as a table."""
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


@plots
def plot_figure3(rows: Rows, path: Path) -> None:
    """Plot memory over ten epochs, a panel for each task: predicted peaks, measured footprints."""
    figure = new_figure(10, 3.8)
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
