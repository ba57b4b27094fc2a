"""The fastest and the leanest exact plan over lengths and batches: `benchmarks.step --grid`."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from matplotlib.figure import Figure

from benchmarks.contest import compare, ratio, rounded, write_batches
from benchmarks.workers import OURS, Job
from common.figures import save_figure
from common.progress import track
from common.units import format_length

PLANS: tuple[Literal["fastest", "leanest"], ...] = ("fastest", "leanest")
LENGTHS = (1.0, 5.0, 10.0, 15.0)
"""Seconds."""
BATCHES = (1, 2, 4, 8, 12)
LONG_STEP = 10.0
"""One step is enough if it takes longer than this many seconds."""


class Cell(NamedTuple):
    """Figures of a plan at a length and batch; None where the step failed."""

    plan: str
    length: float
    """Seconds."""
    batch: int
    seconds: float | None
    audio_seconds_per_second: float | None
    peak_above_imports_mib: float | None
    failure: str | None


def run_grid(job: Job, data: Path | None, seed: int, figure: Path) -> dict[str, Any]:
    """Measure both plans over lengths and batches; prints a table and draws the figure.

    Args:
        job: model, precision and threads.
        data: corpus in LibriSpeech's layout to cut crops from; None is noise.
        seed: of the crops.
        figure: PNG to draw.
    """
    cells = []
    sizes = list(itertools.product(PLANS, LENGTHS, BATCHES))
    for plan, length, batch in track(sizes, len(sizes), "grid", show=True):
        one = dataclasses.replace(job, plan=plan, length=length, batch=batch)
        batches = write_batches(one, 3, data, seed)
        worker = compare([one], batches, warm_up=1, enough=LONG_STEP, show=False)[OURS]
        seconds = worker.median()
        cells.append(
            Cell(
                plan,
                length,
                batch,
                rounded(seconds, 3),
                ratio(batch * length, seconds),
                rounded(worker.peak_above_imports()),
                worker.failure,
            )
        )
    print_table(cells)
    plot_grid(cells, figure)
    shared = {name: getattr(job, name) for name in ("model", "precision", "threads")}
    return {**shared, "cells": [cell._asdict() for cell in cells]}


def print_table(cells: Sequence[Cell]) -> None:
    """Print the grid in Markdown, a row for each length and batch."""
    columns = ("seconds", "audio s / s", "peak MiB")
    heads = [f"{plan}: {column}" for plan in PLANS for column in columns]
    print("| length | batch | " + " | ".join(heads) + " |")
    print("|--:" * (len(heads) + 2) + "|")
    by_size = {cell[:3]: cell[3:6] for cell in cells}
    for length, batch in itertools.product(LENGTHS, BATCHES):
        row = [value for plan in PLANS for value in by_size[plan, length, batch]]
        words = ["-" if value is None else f"{value:g}" for value in row]
        print(f"| {format_length(length)} | {batch} | " + " | ".join(words) + " |")


def plot_grid(cells: Sequence[Cell], path: Path) -> None:
    """Plot peak memory and throughput against batch, a colour for each length."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = (
        ("peak_above_imports_mib", "peak resident memory above imports (MiB)"),
        ("audio_seconds_per_second", "seconds of audio a second"),
    )
    styles = dict(zip(PLANS, ("-", "--"), strict=True))
    for axes, (name, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for (number, length), plan in itertools.product(enumerate(LENGTHS), PLANS):
            line = [c for c in cells if (c.plan, c.length) == (plan, length)]
            points = [(c.batch, getattr(c, name)) for c in line if c.failure is None]
            axes.plot(
                [batch for batch, _ in points],
                [value for _, value in points],
                styles[plan],
                color=f"C{number}",
                marker="o",
                markersize=3,
                label=f"{format_length(length)}, {plan}",
            )
        axes.set_title(title)
        axes.set_xlabel("crops in a batch")
        axes.set_xticks(BATCHES)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)
