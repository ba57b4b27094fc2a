"""Reports the paper's Table 2 and Figure 2 beside predictions: rows, tables and figures."""

import math
from pathlib import Path
from typing import Any

from rich.table import Table

from common.figures import new_figure, plots, save_figure
from common.progress import track
from common.units import format_bytes, format_length
from ssl_core.paper.plain_step import plain_operations, plain_step
from ssl_core.paper.planned_cell import COLUMNS, Rows, agreement, agreement_lines, columns, compare
from ssl_core.paper.table2 import DEVICES, need, paper_cells, split
from ssl_core.planning.device_profiles import known_profiles
from ssl_core.planning.step_plan import Plan
from ssl_core.training.pretraining_recipe import RECIPES
from ssl_core.training.pretraining_work import PretrainingWork
from ssl_core.wav2vec2.config import preset

CALIBRATED = ("rtx2080ti", "jetson-xavier-nx")
"""Devices to calibrate on, one discrete GPU and one Jetson; the others are then predicted."""
LENGTHS, BATCHES = (1.0, 5.0, 10.0, 15.0), (1, 2, 4, 8, 12)
GROWTH = {4: 4, 8: 4, 12: 5}
"""Memory for 15 s crops relative to 1 s crops, by batch (paper, section 5.1)."""


def table2_rows(progress: bool = False) -> Rows:
    """Compare each cell with a plain and a planned step; sizes in bytes.

    The paper's mixed precision is taken as fp16; apart from that a planned step is exact.
    """
    profiles, rows = known_profiles(), []
    base = PretrainingWork(architecture=preset("base"), recipe=RECIPES["base"])
    cells = paper_cells()
    for cell in track(cells, len(cells), "plan", progress):
        profile = profiles[cell.device]
        plan = Plan(
            length=cell.length,
            batch=cell.batch,
            precision="fp16" if cell.precision == "mixed" else "fp32",
            device=profile.accelerator,
        )
        compared, _ = compare(
            profile,
            base,
            plan,
            paper=cell.outcome,
            seconds=cell.seconds,
            need=need(cell, profile.accelerator),
        )
        rows.append({
            "device": cell.device,
            "length": cell.length,
            "batch": cell.batch,
            "precision": cell.precision,
            **compared,
        })  # fmt: skip
    return rows


def table2_result(rows: Rows) -> dict[str, Any]:
    """The rows, and agreement with the paper, also when calibrated on `CALIBRATED` only."""
    found, predicted = split(CALIBRATED)
    return agreement(rows) | {
        "split": {
            "calibrated_on": list(CALIBRATED),
            "allocator": found.allocator,
            "fraction": found.fraction,
            "agree": {device: count._asdict() for device, count in predicted.items()},
        },
    }


def table2_lines(result: dict[str, Any]) -> list[str]:
    """The counts as lines of text."""
    calibrated = result["split"]
    counts = calibrated["agree"].items()
    return [
        *agreement_lines(result),
        f"calibrated on {' and '.join(calibrated['calibrated_on'])} only: "
        + ", ".join(f"{device} {count['agree']} of {count['cells']}" for device, count in counts),
    ]


def table2_table(rows: Rows) -> Table:
    """The rows as a table."""
    table = Table()
    for head in ("device", "length", "batch", "precision", *COLUMNS):
        table.add_column(head, justify="left" if head == "device" else "right")
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(
            row["device"],
            format_length(row["length"]),
            str(row["batch"]),
            row["precision"],
            *columns(row),
            end_section=after is not None and after["device"] != row["device"],
        )
    return table


@plots
def plot_table2(rows: Rows, path: Path) -> None:
    """Plot a panel for each device: the paper's outcomes, coloured by a plain step's need / room.

    Blue fits, red does not; a cell that disagrees with the paper is framed.
    """
    figure = new_figure(13, 5)
    panels = figure.subplots(2, 2).flat
    for axes, device in zip(panels, DEVICES, strict=True):
        own = [row for row in rows if row["device"] == device]
        columns = sorted({(row["batch"], row["precision"]) for row in own})
        values = [[0.0] * len(columns) for _ in LENGTHS]
        for row in own:
            x, y = columns.index((row["batch"], row["precision"])), LENGTHS.index(row["length"])
            value = values[y][x] = math.log2(row["plain_bytes"] / row["room"])
            text = "OOM" if row["paper_seconds"] is None else f"{row['paper_seconds']:.2f}"
            framed = {"edgecolor": "black", "facecolor": "none"}
            agree = row["paper"] == row["plain"]
            axes.text(
                x,
                y,
                text,
                ha="center",
                va="center",
                fontsize=8,
                color="white" if abs(value) > 1.2 else "black",
                bbox=None if agree else framed,
            )
        image = axes.imshow(values, cmap="RdBu_r", vmin=-2, vmax=2, aspect="auto")
        axes.set_title(f"{device}, {format_bytes(own[0]['room'])} for training")
        axes.set_yticks(range(len(LENGTHS)), [format_length(length) for length in LENGTHS])
        axes.set_xticks(
            range(len(columns)), [f"{batch}\n{name}" for batch, name in columns], fontsize=8
        )
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.8, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4"])
    bar.set_label("plain step: estimated memory / room")
    figure.suptitle("Table 2 of the paper: seconds a batch, by batch, precision and length")
    save_figure(figure, path)


def figure2_rows() -> Rows:
    """Compute memory (bytes) and operations of plain fp32 steps of `base` on a GPU.

    Memory is that of the tensors and the CUDA context, without the allocator's overhead: with it
    15 s x 12 would not fit the 32 GB of the paper's V100.
    """
    config, context = preset("base"), known_profiles()["rtx2080ti"].clientapp
    return [
        {
            "length": length,
            "batch": batch,
            "bytes": plain_step(
                config, length, batch, "fp32", "cuda", runtime=context, allocator=0
            ).total,
            "operations": plain_operations(config, length, batch),
        }
        for batch in BATCHES
        for length in LENGTHS
    ]


def growth(rows: Rows, name: str) -> dict[int, float]:
    """The value of column `name` for 15 s crops relative to 1 s crops, by batch."""
    found = {(row["length"], row["batch"]): row[name] for row in rows}
    return {batch: found[LENGTHS[-1], batch] / found[LENGTHS[0], batch] for batch in BATCHES}


def figure2_result(rows: Rows) -> dict[str, Any]:
    """The rows, and the growth of memory and operations from 1 s to 15 s."""
    return {
        "cells": rows,
        "memory_growth": growth(rows, "bytes"),
        "operations_growth": growth(rows, "operations"),
    }


def figure2_table(rows: Rows) -> Table:
    """The rows as a table, with the growth from 1 s to 15 s."""
    table = Table()
    for head in ("batch", *(format_length(length) for length in LENGTHS), "growth", "paper"):
        table.add_column(head, justify="right")
    memory, operations = growth(rows, "bytes"), growth(rows, "operations")
    for batch in BATCHES:
        own = [row for row in rows if row["batch"] == batch]
        paper = f"{GROWTH[batch]}" if batch in GROWTH else ""
        table.add_row(
            str(batch),
            *(format_bytes(row["bytes"]) for row in own),
            f"{memory[batch]:.1f}",
            paper,
        )
        table.add_row(
            "",
            *(f"{row['operations'] / 1e12:.2f} TFLOP" for row in own),
            f"{operations[batch]:.1f}",
            "15",
            end_section=True,
        )
    return table


@plots
def plot_figure2(rows: Rows, path: Path) -> None:
    """Plot memory and operations against crop length, a line for each batch."""
    figure = new_figure(10, 4)
    panels = (("bytes", 2**30, "memory (GiB)"), ("operations", 1e12, "operations (TFLOP)"))
    for axes, (name, unit, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for batch in BATCHES:
            points = [(row["length"], row[name] / unit) for row in rows if row["batch"] == batch]
            axes.plot(*zip(*points, strict=True), marker="o", label=f"batch {batch}")
        axes.set_xlabel("length of a crop (s)")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(figure, path)
