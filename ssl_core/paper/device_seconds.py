"""Seconds a step takes on a real device: an estimate from what the paper measured (Table 2).

A plain step's seconds were found to follow `overhead + operations / rate`, within a few per cent
in the median and 28 % in the worst of the 89 cells that ran. How a planned step differs from the
fastest is multiplied in. That this project's step is faster than a plain one is not counted: the
gain was not measured on those devices.
"""

import functools
from typing import NamedTuple

import numpy as np

from common.errors import UsageError
from ssl_core.downstream.task_work import TaskWork
from ssl_core.paper.plain_step import plain_operations
from ssl_core.paper.table2 import DEVICES, paper_cells
from ssl_core.planning.device import DeviceProfile
from ssl_core.planning.operation_count import count_operations
from ssl_core.planning.step_plan import Plan
from ssl_core.planning.work import Work
from ssl_core.wav2vec2.config import preset


class Rate(NamedTuple):
    """How fast a device takes plain steps."""

    overhead: float
    """Seconds a step, however small."""
    operations: float
    """Floating point operations a second above that."""


@functools.cache
def paper_rate(device: str, precision: str) -> Rate | None:
    """The rate that fits a device's cells of Table 2 best (least squares of relative errors).

    Args:
        device: of the table.
        precision: `fp32` or `mixed`.

    Returns:
        The rate; None where the paper has no such cells.
    """
    cells = [
        (cell.seconds, plain_operations(preset("base"), cell.length, cell.batch))
        for cell in paper_cells()
        if cell.device == device and cell.precision == precision and cell.seconds
    ]
    if not cells:
        return None
    relative = np.array([[1 / seconds, operations / seconds] for seconds, operations in cells])
    (overhead, slope), *_ = np.linalg.lstsq(relative, np.ones(len(cells)), rcond=None)
    return Rate(float(overhead), float(1 / slope))


def update_seconds(
    profile: DeviceProfile, work: Work, plan: Plan, slowdown: float = 1.0
) -> float | None:
    """Seconds an update takes on a device, estimated; None where the paper says nothing of it.

    Of a task, operations are those of the step that keeps everything; an LSTM, which takes many
    small steps, takes longer than they say. None for a head alone, on features computed before: the
    paper has no such step.

    Args:
        profile: `timed_as` names the device of Table 2 that it is like.
        work: what is trained.
        plan: of the step.
        slowdown: of the plan relative to the fastest.

    Raises:
        UsageError: `timed_as` is no device of the table.
    """
    if isinstance(work, TaskWork):
        if work.cached and not work.unfrozen:
            return None
        operations = _task_operations(work, plan.length, plan.batch)
    else:
        operations = plain_operations(work.architecture, plan.length, plan.batch)
    seconds = _seconds(profile, plan, operations)
    return None if seconds is None else plan.accumulation * slowdown * seconds


@functools.lru_cache(maxsize=64)
def _task_operations(work: TaskWork, length: float, batch: int) -> int:
    return count_operations(work, Plan(length=length, batch=batch, keep_attention=True))


def _seconds(profile: DeviceProfile, plan: Plan, operations: int) -> float | None:
    """Of a step of so many operations."""
    if not profile.timed_as:
        return None
    if profile.timed_as not in DEVICES:
        raise UsageError(
            f"device '{profile.name}': timed_as '{profile.timed_as}' is not a device of the "
            f"paper's Table 2: {', '.join(DEVICES)}"
        )
    rate = paper_rate(profile.timed_as, "fp32" if plan.precision == "fp32" else "mixed")
    if rate is None:
        return None
    return (rate.overhead + operations / rate.operations) / profile.times_faster
