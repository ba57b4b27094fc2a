"""Measure what the planner predicts: `python -m ssl_core.profile --lengths 1s 5s --batches 1 4`.

Every cell is two updates on noise in a process of its own: its peak resident memory beside the
estimate, seconds, and operations counted by torch's flop counter.
"""

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from common import command
from common.atomic import write_text
from common.errors import ShortwaveError
from common.figures import save_figure
from common.progress import track
from common.units import format_bytes, format_length, parse_length
from ssl_core.planning.estimate import estimate
from ssl_core.planning.ladder import fastest, leanest
from ssl_core.planning.measure import measure
from ssl_core.planning.operation_count import count_operations
from ssl_core.planning.step_plan import Plan
from ssl_core.training.overrides import change_plan, resolve
from ssl_core.training.pretraining_recipe import Recipe
from ssl_core.wav2vec2.config import ModelConfig

PLANS = ("default", "fastest", "leanest")


def as_planned(name: str, model: tuple[ModelConfig, Recipe], plan: Plan) -> Plan:
    """The plan as it is, or one end of the planner's ladder for it; `name` is one of `PLANS`."""
    config, recipe = model
    if name == "default":
        return plan
    return fastest(plan, recipe) if name == "fastest" else leanest(config, recipe, plan)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and compare; returns the exit code."""
    parser = command.Parser(
        prog="python -m ssl_core.profile",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    length, positive = command.argument(parse_length), command.argument(command.positive)
    parser.add_argument("--model", default="base", help="preset: base or tiny")
    parser.add_argument(
        "--lengths", type=length, nargs="+", default=[1.0, 5.0, 10.0, 15.0], help="of crops"
    )
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 2, 4], help="crops")
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32"], help="of products"
    )
    parser.add_argument(
        "--plans", nargs="+", choices=PLANS, default=["leanest"], help="ways to take a step"
    )
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads")
    parser.add_argument("--set", default="", help="single settings, such as model.layerdrop=0")
    parser.add_argument("--output", type=Path, help="folder for profile.json and profile.png")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    options = parser.parse_args(arguments)
    model = resolve(options.model, options.set)
    cells = []
    for precision, name, seconds, batch in itertools.product(
        options.precisions, options.plans, options.lengths, options.batches
    ):
        plan = Plan(length=seconds, batch=batch, precision=precision, threads=options.threads)
        plan = change_plan(as_planned(name, model, plan), options.set)
        plan.validate_for(*model)
        cells.append((name, plan))
    started = time.strftime("%Y-%m-%d %H:%M")
    rows = [
        profile(options.model, options.set, name, plan)
        for name, plan in track(cells, len(cells), "profile", not options.json)
    ]
    result = {"model": options.model, "date": started, "cells": rows}
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        write_text(options.output / "profile.json", json.dumps(result, indent=2) + "\n")
        plot(rows, options.output / "profile.png")
    if options.json:
        print(json.dumps(result))
        return 0
    Console().print(table(rows))
    if options.output:
        print(options.output)
    return 0


def profile(model: str, settings: str, name: str, plan: Plan) -> dict[str, Any]:
    """Measure one cell and compare; memory in bytes, `measured` None where the process failed."""
    config, recipe = resolve(model, settings)
    row: dict[str, Any] = {
        "plan": name,
        "length": plan.length,
        "batch": plan.batch,
        "precision": plan.precision,
        "operations": count_operations(config, recipe, plan),
    }
    try:
        found = measure(model, settings, dataclasses.asdict(plan))
    except ShortwaveError as error:
        predicted = estimate(config, recipe, plan).total
        return row | {"predicted": predicted, "measured": None, "failure": str(error)}
    predicted = estimate(config, recipe, plan, found.imports).total
    return row | {
        "predicted": predicted,
        "measured": found.peak,
        "over": predicted / found.peak - 1,
        "seconds": found.seconds,
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The comparison for people."""
    result = Table()
    for head in ("plan", "length", "batch", "precision", "predicted", "measured", "over"):
        result.add_column(head, justify="right")
    result.add_column("TFLOP an update", justify="right")
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


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Predicted against measured peak, a point for each cell."""
    figure = Figure(figsize=(5, 4.5), layout="constrained")
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


if __name__ == "__main__":
    command.run(main)
