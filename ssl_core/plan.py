"""What fits a device: `python -m ssl_core.plan --device rpi4 --length 15s --batch 12`.

Nothing is allocated: figures follow from shapes.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common import command
from common.atomic import write_text
from common.errors import UsageError
from common.units import format_bytes, parse_length
from ssl_core.paper import table2
from ssl_core.paper import table2_report as paper_report
from ssl_core.paper import table3_report as task_report
from ssl_core.planning.advice import MATCHED, Request, advise, explain
from ssl_core.planning.advice import result as advice_result
from ssl_core.planning.device import AUTO, DeviceProfile
from ssl_core.planning.device_profiles import find_profile, known_profiles
from ssl_core.planning.this_machine import this_machine

CALIBRATED = ("rtx2080ti", "jetson-xavier-nx")
"""One device with memory of its own and one that shares it: the others are then predicted."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was asked for; returns the exit code."""
    parser = command.Parser(
        prog="python -m ssl_core.plan",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--device", help="plan for this device, such as rpi4; auto: this machine")
    what.add_argument("--list", action="store_true", help="devices and their memory")
    what.add_argument(
        "--table2",
        action="store_true",
        help="the paper's Table 2, a plain step and a planned one (the first time, some minutes)",
    )
    what.add_argument(
        "--figure2", action="store_true", help="memory and operations by length, as in Figure 2"
    )
    what.add_argument(
        "--table3",
        action="store_true",
        help="the paper's Table 3, fine-tuning tasks (the first time, some minutes)",
    )
    what.add_argument(
        "--figure3", action="store_true", help="memory over ten epochs of two tasks, as in Figure 3"
    )
    request = parser.add_argument_group("for --device, what is fixed; the rest is chosen")
    request.add_argument("--model", default="base", help="preset: base or tiny")
    request.add_argument("--set", default="", help="settings of it, as in model.layerdrop=0")
    request.add_argument("--length", type=command.argument(parse_length), help="of crops, as in 5s")
    request.add_argument(
        "--batch", type=command.argument(command.positive), help="crops in an update"
    )
    request.add_argument(
        "--task",
        default="",
        help=f"choose the length that matches this downstream task: {', '.join(MATCHED)}; with "
        "--frozen or --unfrozen, plan its fine-tuning",
    )
    for name in ("frozen", "unfrozen"):
        request.add_argument(
            f"--{name}", dest="backbone", action="store_const", const=name, default="",
            help=f"fine-tune --task with a backbone that is {name}",
        )  # fmt: skip
    request.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="of products; auto: 16 bits where the device multiplies in them",
    )
    request.add_argument(
        "--optimizer-state",
        choices=("auto", "fp32", "bf16", "int8"),
        default="fp32",
        help="of Adam's moments; auto: fewer bits (not exact) where fp32 does not fit",
    )
    request.add_argument(
        "--time-limit",
        type=command.argument(parse_length),
        help="of an update on the device, as in 60s or 5min",
    )
    request.add_argument(
        "--alone",
        action="store_true",
        help="not in a federation: no room for Flower's messages",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="with --figure3: fine-tune base here as well, some minutes for each line",
    )
    parser.add_argument("--devices", type=Path, help="YAML file with devices of your own")
    parser.add_argument("--output", type=Path, help="folder for the figure and its JSON")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    options = parser.parse_args(arguments)
    if options.measure and not options.figure3:
        raise UsageError("--measure goes with --figure3")
    if options.device:
        return plan_device(options)
    if options.list:
        profiles = [*known_profiles(options.devices).values(), this_machine()]
        name, table, lines = "devices", device_table(profiles), []
        result: dict[str, Any] = {"devices": [describe(profile) for profile in profiles]}
    elif options.table2:
        name, rows = "table2", paper_report.table2_rows(progress=not options.json)
        table, result = paper_report.table2_table(rows), table2_result(rows)
        lines = table2_lines(result)
    elif options.table3:
        name, rows = "table3", task_report.table3_rows(progress=not options.json)
        table, result = task_report.table3_table(rows), task_report.table3_result(rows)
        lines = task_report.table3_lines(result)
    elif options.figure3:
        name, rows = "figure3", task_report.figure3_rows(options.measure, not options.json)
        table, lines, result = task_report.figure3_table(rows), [], {"cells": rows}
    else:
        name, rows = "figure2", paper_report.figure2_rows()
        table, lines = paper_report.figure2_table(rows), []
        result = {
            "cells": rows,
            "memory_growth": paper_report.growth(rows, "bytes"),
            "operations_growth": paper_report.growth(rows, "operations"),
        }
    if options.output:
        write_text(options.output / f"{name}.json", json.dumps(result, indent=2) + "\n")
        if options.table2:
            paper_report.plot_table2(rows, options.output / "table2.png")
        elif options.figure3:
            task_report.plot_figure3(rows, options.output / "figure3.png")
        elif options.figure2:
            paper_report.plot_figure2(rows, options.output / "figure2.png")
    if options.json:
        print(json.dumps(result))
        return 0
    console = Console()
    console.print(table)
    for line in lines:
        console.print(line, highlight=False)
    if options.output:
        print(options.output)
    return 0


def plan_device(options: argparse.Namespace) -> int:
    """Choose for a device and print why; 1 when nothing fits."""
    request = Request(
        model=options.model,
        set=options.set,
        length=options.length,
        batch=options.batch,
        precision=options.precision,
        optimizer_state=options.optimizer_state,
        task=options.task,
        backbone=options.backbone,
        time_limit=options.time_limit,
        federated=not options.alone,
    )
    profile = find_profile(options.device, options.devices)
    with Console(stderr=True).status(
        "estimating, from the step itself on tensors without contents"
    ):
        advice = advise(profile, request)
    result = advice_result(advice)
    if options.output:
        write_text(options.output / "plan.json", json.dumps(result, indent=2) + "\n")
    if options.json:
        print(json.dumps(result))
        return 0 if advice.chosen else 1
    print(f"{profile.name}: {profile.description}")
    if advice.chosen:
        print(advice.chosen.estimate.describe())
    for line in explain(advice):
        print(line)
    return 0 if advice.chosen else 1


def describe(profile: DeviceProfile) -> dict[str, Any]:
    """A profile's figures; sizes in bytes."""
    return {
        "name": profile.name,
        "description": profile.description,
        "accelerator": profile.accelerator,
        "shared": profile.shared,
        "memory": profile.memory,
        "system": profile.system_bytes,
        "supernode": profile.supernode,
        "clientapp": profile.clientapp,
        "training": profile.training_bytes,
        "cores": profile.cores,
        "precisions": list(profile.precisions),
        "sources": dict(profile.sources),
    }


def device_table(profiles: Sequence[DeviceProfile]) -> Table:
    """Devices for people."""
    table = Table()
    heads = ("device", "computes on", "memory", "system", "SuperNode", "ClientApp", "for training")
    for head in (*heads, "cores", "precisions"):
        left = head in ("device", "computes on", "precisions")
        table.add_column(head, justify="left" if left else "right")
    for profile in profiles:
        table.add_row(
            "auto, this machine" if profile.name == AUTO else profile.name,
            "cuda, shared" if profile.shared else profile.accelerator,
            format_bytes(profile.memory),
            format_bytes(profile.system_bytes),
            format_bytes(profile.supernode),
            format_bytes(profile.clientapp),
            format_bytes(profile.training_bytes),
            str(profile.cores),
            ", ".join(profile.precisions),
        )
    return table


def table2_result(rows: paper_report.Rows) -> dict[str, Any]:
    """The rows, how many agree with the paper, and how many when two devices are calibrated."""
    found, predicted = table2.split(CALIBRATED)
    return {
        "cells": rows,
        "agree": sum(row["paper"] == row["plain"] for row in rows),
        "planned_fits": sum(row["planned"] == "fits" for row in rows),
        "split": {
            "calibrated_on": list(CALIBRATED),
            "allocator": found.allocator,
            "share": found.share,
            "agree": {device: count._asdict() for device, count in predicted.items()},
        },
    }


def table2_lines(result: dict[str, Any]) -> list[str]:
    """The counts for people."""
    split = result["split"]
    counts = ", ".join(f"{d} {c['agree']} of {c['cells']}" for d, c in split["agree"].items())
    return [
        f"a plain step agrees with the paper in {result['agree']} of {len(result['cells'])} cells",
        f"a planned step fits in {result['planned_fits']} of {len(result['cells'])} cells",
        f"calibrated on {' and '.join(split['calibrated_on'])} only: {counts}",
    ]


if __name__ == "__main__":
    command.run(main)
