"""Compares a cell of the paper's Tables 2 and 3 with a plain and a planned step."""

from collections.abc import Sequence
from typing import Any

from common.units import format_bytes
from ssl_core.planning.decision import Decision
from ssl_core.planning.device import DeviceProfile
from ssl_core.planning.ladder import describe
from ssl_core.planning.step_plan import Plan
from ssl_core.planning.work import Work

Rows = Sequence[dict[str, Any]]

COLUMNS = ("paper", "room", "plain step", "planned step")


def compare(
    profile: DeviceProfile,
    work: Work,
    plan: Plan,
    *,
    paper: str,
    seconds: float | None,
    need: int,
) -> tuple[dict[str, Any], Decision]:
    """Compute the columns that both tables share and the decision for the planned step.

    Args:
        profile: of the device.
        work: what is trained.
        plan: length, batch and precision of the cell.
        paper: outcome in the paper, "fits" or "oom".
        seconds: of a batch in the paper; None if it did not fit.
        need: bytes of a plain step above imports and CUDA context.

    Returns:
        The columns by name, sizes in bytes, and the decision.
    """
    plan, _ = profile.with_kernels(plan)
    decision = Decision(work, plan, profile.process_bytes, profile.clientapp)
    option = decision.chosen or decision.leanest
    row = {
        "paper": paper,
        "paper_seconds": seconds,
        "room": profile.training_bytes,
        "plain": "fits" if need <= profile.training_bytes else "oom",
        "plain_bytes": need,
        "planned": "fits" if decision.chosen else "oom",
        "planned_bytes": option.estimate.total - profile.clientapp,
        "plan": describe(option.plan, work.unit),
    }
    return row, decision


def columns(row: dict[str, Any]) -> tuple[str, ...]:
    """Format a row as the texts of `COLUMNS`."""
    seconds = row["paper_seconds"]
    wrong = "" if row["paper"] == row["plain"] else " [red]unlike the paper[/red]"
    return (
        "oom" if seconds is None else f"{seconds:.2f} s",
        format_bytes(row["room"]),
        f"{row['plain']}, {format_bytes(row['plain_bytes'])}{wrong}",
        f"{row['planned']}, {format_bytes(row['planned_bytes'])}",
    )


def agreement(rows: Rows) -> dict[str, Any]:
    """The rows, the number that agree with the paper, and the number whose planned step fits."""
    return {
        "cells": rows,
        "agree": sum(row["paper"] == row["plain"] for row in rows),
        "planned_fits": sum(row["planned"] == "fits" for row in rows),
    }


def agreement_lines(result: dict[str, Any]) -> list[str]:
    """The counts of `agreement` as lines of text."""
    count = len(result["cells"])
    return [
        f"a plain step agrees with the paper in {result['agree']} of {count} cells",
        f"a planned step fits in {result['planned_fits']} of {count} cells",
    ]
