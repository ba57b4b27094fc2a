"""Plan training for a device: `python -m ssl_core.plan --device rpi4 --length 15s --batch 12`.

Estimates follow from shapes; no tensor is allocated.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import PositiveInt
from rich.console import Console

from common import command, strict_json
from common.atomic import write_text
from common.errors import UsageError
from common.options import settings_parser
from common.settings import parse
from common.tables import console_for
from common.units import Seconds
from ssl_core.downstream.task_work import task_work
from ssl_core.paper import planned_cell, table2_report, table3_report
from ssl_core.paper.device_seconds import update_seconds
from ssl_core.planning.advice import BATCHES, Request, advise, candidate_lengths
from ssl_core.planning.advice_report import advice_result, explain
from ssl_core.planning.device_profiles import find_profile, known_profiles
from ssl_core.planning.device_report import (
    describe_device,
    device_lines,
    device_table,
    table_notes,
)
from ssl_core.planning.largest_batch import largest_batch
from ssl_core.planning.this_machine import this_machine
from ssl_core.training.model_settings import ModelSettings
from ssl_core.training.pretraining_recipe import RECIPES
from ssl_core.training.pretraining_work import PretrainingWork
from ssl_core.wav2vec2.config import preset

SHORT = {"--frozen": "--backbone=frozen", "--unfrozen": "--backbone=unfrozen"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanSettings(ModelSettings):
    """What to show. For a device, settings that are not given are chosen."""

    device: str = ""
    """Plan for this device, such as rpi4; auto for this machine."""
    list: bool = False
    """List devices and their memory."""
    table2: bool = False
    """Show the paper's Table 2 beside a plain and a planned step (minutes at the first time)."""
    figure2: bool = False
    """Show memory and operations by length, as in the paper's Figure 2."""
    table3: bool = False
    """Show the paper's Table 3, fine-tuning of tasks (minutes at the first time)."""
    figure3: bool = False
    """Show memory over ten epochs of two tasks, as in the paper's Figure 3."""
    length: Seconds | None = None
    """Length of crops or clips, as in 5s."""
    batch: PositiveInt | None = None
    """Crops or clips in a batch; for a GPU with its own memory, by default the most crops of the
    longest length whose fastest plan fits."""
    task: str = ""
    """Downstream task to pretrain for, which limits the length; with --frozen or --unfrozen, the
    task to fine-tune."""
    backbone: Literal["", "frozen", "unfrozen"] = ""
    """Fine-tune --task with a frozen or unfrozen backbone (also as --frozen, --unfrozen)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of matrix products; auto: 16 bits if the device supports them."""
    optimizer_state: Literal["auto", "fp32", "bf16", "int8"] = "fp32"
    """Precision of the optimizer state; auto: fewer bits (not exact) if fp32 does not fit."""
    time_limit: Seconds | None = None
    """Longest time of an update on the device, as in 60s or 5min."""
    alone: bool = False
    """Train without a federation: leave no memory for Flower's messages."""
    measure: bool = False
    """With --figure3: also measure on this machine, with base; minutes for each line."""
    devices: Path | None = None
    """YAML file with your own device profiles."""
    output: Path | None = None
    """Folder for the JSON and the figure."""
    json: bool = False
    """Print JSON only."""

    def validate(self) -> None:
        """Check that exactly one thing is to be shown; raises `UsageError`."""
        kinds = (self.device, self.list, self.table2, self.figure2, self.table3, self.figure3)
        if sum(map(bool, kinds)) != 1:
            raise UsageError(
                "give one of --device, --list, --table2, --figure2, --table3 and --figure3"
            )
        if self.measure and not self.figure3:
            raise UsageError("--measure goes with --figure3")
        if self.backbone and not self.task:
            raise UsageError(f"--{self.backbone} is for fine-tuning: say which --task")


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan for a device or show figures; returns the exit code."""
    parser = settings_parser(
        PlanSettings, prog="python -m ssl_core.plan", description=__doc__, short=SHORT
    )
    settings, _ = parse(PlanSettings, parser, arguments)
    return plan_device(settings) if settings.device else show_figures(settings)


def show_figures(settings: PlanSettings) -> int:
    """Print the list of devices, a table or a figure's numbers; returns the exit code."""
    progress, lines = not settings.json, []
    result: dict[str, Any]
    if settings.list:
        profiles = [*known_profiles(settings.devices).values(), this_machine()]
        name, table = "devices", device_table(profiles)
        result = {"devices": [describe_device(profile) for profile in profiles]}
        lines = table_notes(profiles)
    elif settings.table2:
        name, rows = "table2", table2_report.table2_rows(progress)
        table, result = table2_report.table2_table(rows), table2_report.table2_result(rows)
        lines = table2_report.table2_lines(result)
    elif settings.table3:
        name, rows = "table3", table3_report.table3_rows(progress)
        table, result = table3_report.table3_table(rows), planned_cell.agreement(rows)
        lines = table3_report.table3_lines(result)
    elif settings.figure3:
        name, rows = "figure3", table3_report.figure3_rows(settings.measure, progress)
        table, result = table3_report.figure3_table(rows), {"cells": rows}
    else:
        name, rows = "figure2", table2_report.figure2_rows()
        table, result = table2_report.figure2_table(rows), table2_report.figure2_result(rows)
    if settings.output:
        write_text(settings.output / f"{name}.json", strict_json.dumps(result, indent=2) + "\n")
        plots = {
            "table2": table2_report.plot_table2,
            "figure2": table2_report.plot_figure2,
            "figure3": table3_report.plot_figure3,
        }
        if name in plots:
            plots[name](rows, settings.output / f"{name}.png")
    if settings.json:
        print(strict_json.dumps(result))
        return 0
    console = console_for(table)
    console.print(table)
    for line in lines:
        console.print(line, highlight=False)
    if settings.output:
        print(settings.output)
    return 0


def request_of(settings: PlanSettings) -> Request:
    """Build the request for advice.

    Raises:
        UsageError: no such task.
    """
    shared: dict[str, Any] = {
        "precision": settings.precision,
        "optimizer_state": settings.optimizer_state,
        "time_limit": settings.time_limit,
        "federated": not settings.alone,
        "seconds": update_seconds,
    }
    batches = (settings.batch,) if settings.batch else ()
    tiny = preset("tiny") if settings.model != "tiny" else None
    if settings.backbone:
        unfrozen = settings.backbone == "unfrozen"
        task = task_work(settings.task, settings.architecture, unfrozen=unfrozen, cached=True)
        return Request(
            work=task,
            lengths=(settings.length or task.length,),
            batches=batches or (task.recipe.batch,),
            smaller=dataclasses.replace(task, architecture=tiny) if tiny else None,
            **shared,
        )
    smaller = PretrainingWork(architecture=tiny, recipe=RECIPES["tiny"]) if tiny else None
    return Request(
        work=PretrainingWork(architecture=settings.architecture, recipe=settings.recipe),
        lengths=candidate_lengths(settings.length, settings.task),
        batches=batches or BATCHES,
        smaller=smaller,
        **shared,
    )


def plan_device(settings: PlanSettings) -> int:
    """Choose a plan for a device and print it; returns 1 if nothing fits."""
    profile, request = find_profile(settings.device, settings.devices), request_of(settings)
    with Console(stderr=True).status("estimating memory by running the step without data"):
        if profile.discrete and settings.batch is None and not settings.backbone:
            largest = largest_batch(profile, request)
            batches = [largest, *(batch for batch in BATCHES if batch < largest)]
            request = dataclasses.replace(request, batches=batches if largest else BATCHES)
        advice = advise(profile, request)
    result = advice_result(advice) | {
        "model": settings.model,
        "task": settings.task,
        "backbone": settings.backbone,
        "profile": describe_device(profile),
    }
    if settings.output:
        write_text(settings.output / "plan.json", strict_json.dumps(result, indent=2) + "\n")
    if settings.json:
        print(strict_json.dumps(result))
        return 0 if advice.chosen else 1
    for line in device_lines(profile):
        print(line)
    if advice.chosen:
        print(advice.chosen.estimate.describe())
    for line in explain(advice):
        print(line)
    return 0 if advice.chosen else 1


if __name__ == "__main__":
    command.run(main)
