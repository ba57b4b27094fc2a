"""Prints and draws what `benchmarks.planner` measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from common.figures import save_figure
from common.units import format_bytes, format_length

Row = dict[str, Any]
"""Figures of a cell by name; memory in bytes."""


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot the predicted above the measured peak, a point for each cell."""
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


def print_peaks(console: Console, rows: Sequence[Row]) -> None:
    """Print a line for each row of `run_estimates` or `run_tasks`."""
    for row in rows:
        name = row["model"] if "model" in row else f"{row['task']} {row['backbone']},"
        cached = " features cached," if row.get("cached") else ""
        console.print(
            f"{name}{cached} {format_length(row['length'])} x {row['batch']} {row['precision']}: "
            f"{format_bytes(row['measured'])}, predicted {row['over']:+.1%} ({row['plan']})",
            highlight=False,
        )


def print_caps(console: Console, rows: Sequence[Row]) -> None:
    """Print a line for each row of `run_caps`."""
    for row in rows:
        end = row.get("failure") or f"{format_bytes(row['peak'])}, {row['seconds']:.1f} s"
        console.print(
            f"{row['board']} ({format_bytes(row['cap'])}): {format_length(row['length'])} "
            f"x {row['batch']}: {end} ({row['plan']})",
            highlight=False,
        )
