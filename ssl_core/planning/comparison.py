"""Measured peaks of memory beside the estimates, as a table and a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from common.errors import ShortwaveError
from common.figures import new_figure, plots, save_figure
from common.units import format_bytes, format_length
from ssl_core.planning.estimate import estimate
from ssl_core.planning.measure import measure
from ssl_core.planning.operation_count import count_operations
from ssl_core.planning.step_plan import Plan
from ssl_core.planning.work import Work


def compare(work: Work, name: str, plan: Plan) -> dict[str, Any]:
    """Measure a plan and compare with its estimate.

    Args:
        work: what is trained.
        name: name of the plan.
        plan: how a step is taken.

    Returns:
        A row of results; memory in bytes, `measured` None if the process failed. On a GPU both
        peaks are of reserved memory with the CUDA context, and `predicted_allocated` and
        `measured_allocated` of tensors and workspaces.
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
    expected = estimate(work, plan, found.imports)
    predicted = expected.total
    if found.allocated:
        row["predicted_allocated"] = expected.allocated
        row["measured_allocated"] = found.allocated
        row["over_allocated"] = expected.allocated / found.allocated - 1
    return row | {
        "predicted": predicted,
        "measured": found.peak,
        "over": predicted / found.peak - 1,
        "seconds": found.seconds,
    }


def allocated_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For plans on a GPU: allocated memory, predicted and measured, a line for each."""
    return [
        f"{row['plan']}, {row['batch']} x {format_length(row['length'])}: allocated "
        f"{format_bytes(row['predicted_allocated'])} predicted, "
        f"{format_bytes(row['measured_allocated'])} measured ({row['over_allocated']:+.1%}); "
        "the table has what torch reserves, and the CUDA context"
        for row in rows
        if "measured_allocated" in row
    ]


def comparison_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as a table; TFLOP are of an update."""
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for head in ("plan", "length", "batch", "precision", "predicted", "measured", "over"):
        result.add_column(head, justify="right")
    result.add_column("TFLOP", justify="right")
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


@plots
def plot_comparison(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot predicted against measured peaks, a point for each row."""
    figure = new_figure(5, 4.5)
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
