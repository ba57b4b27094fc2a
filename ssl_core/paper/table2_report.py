"""The paper's Table 2 and Figure 2 beside what follows from shapes: rows, tables and figures."""

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from common.figures import save_figure
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
"""One device with memory of its own and one that shares it: the others are then predicted."""
LENGTHS, BATCHES = (1.0, 5.0, 10.0, 15.0), (1, 2, 4, 8, 12)
GROWTH = {4: 4, 8: 4, 12: 5}
"""By batch, how many times the memory of 1 s crops those of 15 s take (paper, section 5.1)."""


def table2_rows(progress: bool = False) -> Rows:
    """A row for each cell: what the paper saw, a plain step and a planned one; sizes in bytes.

    Mixed precision of the paper is fp16; a planned step is exact otherwise.
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
    """The rows, how many agree with the paper, and how many when two devices are calibrated."""
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
    """The counts for people."""
    calibrated = result["split"]
    counts = calibrated["agree"].items()
    return [
        *agreement_lines(result),
        f"calibrated on {' and '.join(calibrated['calibrated_on'])} only: "
        + ", ".join(f"{device} {count['agree']} of {count['cells']}" for device, count in counts),
    ]


def table2_table(rows: Rows) -> Table:
    """The rows for people."""
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


def plot_table2(rows: Rows, path: Path) -> None:
    """A panel for each device: the paper's outcomes, coloured by a plain step's part of the room.

    Blue fits, red does not; a cell whose colour and text disagree is framed.
    """
    figure = Figure(figsize=(13, 5), layout="constrained")
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
    """Memory in bytes and operations of a plain fp32 step of `base` on a GPU.

    Memory is that of the tensors and of the CUDA context, without what an allocator takes above
    them: with it 15 s x 12 would not fit the 32 GB of the paper's V100.
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
    """By batch, how many times the figure of 1 s crops that of 15 s is."""
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
    """The rows for people, with the growth from 1 s to 15 s."""
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


def plot_figure2(rows: Rows, path: Path) -> None:
    """Memory and operations against length, a line for each batch."""
    figure = Figure(figsize=(10, 4), layout="constrained")
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
