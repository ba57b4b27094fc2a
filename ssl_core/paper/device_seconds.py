"""Estimates the seconds of a step on a real device from the paper's measurements (Table 2).

A plain step takes `overhead + operations / rate` seconds, within a few per cent in the median and
28 % in the worst of the 89 cells that ran. A planned step is this times its slowdown relative to
the fastest plan. This project's step is faster than a plain one; the gain was not measured on those
devices and is not included.
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
    """Speed of a device at plain steps."""

    overhead: float
    """Fixed seconds of every step."""
    operations: float
    """Floating point operations a second beyond the overhead."""


@functools.cache
def paper_rate(device: str, precision: str) -> Rate | None:
    """Fit a rate to a device's cells of Table 2 by least squares of relative errors.

    Args:
        device: name in the table.
        precision: `fp32` or `mixed`.

    Returns:
        The rate; None if the paper has no such cells.
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
    """Estimate the seconds of an update on a device.

    For a task, operations are those of the step that keeps everything. An LSTM takes longer than
    its operations suggest, since it runs in many small steps.

    Args:
        profile: of the device; `timed_as` names a device of Table 2.
        work: what is trained.
        plan: how a step is taken.
        slowdown: time relative to the fastest plan.

    Returns:
        Seconds; None if the paper measured no such device, or no such step: a head alone on cached
        features.

    Raises:
        UsageError: `timed_as` is not a device of the table.
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
    """Estimate the seconds of a step with a number of operations."""
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
