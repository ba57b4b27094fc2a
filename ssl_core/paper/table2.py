"""Predicts the paper's Table 2 from shapes: which cells a plain step fits on four devices.

A cell fits if `plain_step` on the device's accelerator needs at most the device's
`training_bytes`. Two constants are calibrated on the table, all else is counted or measured:

- `parts.ALLOCATOR`, the overhead of allocators, for all four devices.
- `tensor-fraction` in `device_profiles.yaml`, the same for all Jetson boards: the fraction of
  shared memory available to the step's tensors. In the paper the 16 GB board behaves as if it had
  less than twice the memory of the 8 GB board, which a system of fixed size cannot explain.

`split` calibrates on some devices and counts the agreement on all of them.
"""

import csv
import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from typing import Literal, NamedTuple

from common.errors import UsageError
from ssl_core.paper.plain_step import PlainPrecision, plain_step
from ssl_core.planning.device import DeviceProfile
from ssl_core.planning.device_profiles import known_profiles
from ssl_core.planning.parts import ALLOCATOR
from ssl_core.wav2vec2.config import preset

DEVICES = ("rtx2080ti", "rpi4", "jetson-xavier-nx", "jetson-xavier-agx")
"""Devices in the order of the table."""
_LARGEST_ALLOCATOR = 0.6
"""Largest value tried for `ALLOCATOR`."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One entry of the table."""

    device: str
    length: float
    """Seconds in a crop."""
    batch: int
    precision: PlainPrecision
    outcome: Literal["fits", "oom"]
    seconds: float | None
    """Seconds of a batch; None if it does not fit."""


class Calibration(NamedTuple):
    """Calibrated constants, and the margin of their worst cell."""

    allocator: float
    fraction: float | None
    """Tensor fraction; None if no device shares its memory with a GPU."""
    margin: float
    """Least natural logarithm of room/need (fits) or need/room (oom); below 0, a cell is wrong."""


class Agreement(NamedTuple):
    """Number of a device's cells that agree with the paper."""

    agree: int
    cells: int


@functools.cache
def paper_cells() -> tuple[Cell, ...]:
    """Read the 140 entries of the table from `table2.csv`."""
    text = (resources.files(__package__) / "table2.csv").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return tuple(
        Cell(
            device=row["device"],
            length=float(row["length_s"]),
            batch=int(row["batch"]),
            precision="mixed" if row["precision"] == "mixed" else "fp32",
            outcome="oom" if row["outcome"] == "oom" else "fits",
            seconds=float(row["seconds_per_batch"]) if row["seconds_per_batch"] else None,
        )
        for row in csv.DictReader(lines)
    )


@functools.cache
def need(cell: Cell, accelerator: Literal["cpu", "cuda"], allocator: float = ALLOCATOR) -> int:
    """Bytes of a plain step of `base` above imports and CUDA context.

    Args:
        cell: length, batch and precision.
        accelerator: of the device.
        allocator: overhead of allocators, see `ALLOCATOR`.
    """
    config = preset("base")
    precision = cell.precision
    return plain_step(
        config, cell.length, cell.batch, precision, accelerator, allocator=allocator
    ).total


def outcome(
    cell: Cell, profile: DeviceProfile, allocator: float = ALLOCATOR, fraction: float | None = None
) -> Literal["fits", "oom"]:
    """Predict whether a plain step fits a device.

    Args:
        cell: length, batch and precision.
        profile: of the device.
        allocator: overhead of allocators, see `ALLOCATOR`.
        fraction: tensor fraction that replaces the profile's; None keeps it.
    """
    room = profile.training_bytes
    if profile.tensor_fraction is not None and fraction is not None:
        room = int(fraction * profile.memory)
    return "fits" if need(cell, profile.accelerator, allocator) <= room else "oom"


def agreement(allocator: float = ALLOCATOR, fraction: float | None = None) -> dict[str, Agreement]:
    """Count for each device the cells in which a plain step agrees with the paper."""
    profiles, counts = known_profiles(), {}
    for device in DEVICES:
        cells = _cells(device)
        right = [outcome(c, profiles[device], allocator, fraction) == c.outcome for c in cells]
        counts[device] = Agreement(sum(right), len(cells))
    return counts


def calibrate(devices: Collection[str]) -> Calibration:
    """Find the constants that maximise the margin of the worst cell of these devices.

    The best tensor fraction follows from the allocator overhead: in logarithms, it lies half way
    between the largest cell that fits and the smallest that does not, over all Jetson boards.

    Raises:
        UsageError: a device is not in the table.
    """
    if not devices or not set(devices) <= set(DEVICES):
        raise UsageError(f"calibrate on some of {', '.join(DEVICES)}, not {', '.join(devices)}")
    profiles = known_profiles()
    best = Calibration(0.0, None, -math.inf)
    for step in range(round(_LARGEST_ALLOCATOR * 200) + 1):
        allocator = step / 200
        lowest, highest, margin = 0.0, math.inf, math.inf
        for device in devices:
            profile = profiles[device]
            largest, smallest = _bounds(profile, allocator)
            if profile.tensor_fraction is not None:
                lowest = max(lowest, largest / profile.memory)
                highest = min(highest, smallest / profile.memory)
            else:
                room = profile.training_bytes
                margin = min(margin, math.log(room / largest), math.log(smallest / room))
        fraction = None
        if lowest:
            fraction = math.sqrt(lowest * highest)
            margin = min(margin, math.log(highest / lowest) / 2)
        if margin > best.margin:
            best = Calibration(allocator, fraction, margin)
    return best


def split(devices: Collection[str]) -> tuple[Calibration, dict[str, Agreement]]:
    """Calibrate on these devices and count agreement on every device.

    Raises:
        UsageError: a device is not in the table, or no device has shared memory, without which
            the tensor fraction is unknown.
    """
    found = calibrate(devices)
    if found.fraction is None:
        raise UsageError("calibrate on at least one of jetson-xavier-nx and jetson-xavier-agx")
    return found, agreement(found.allocator, found.fraction)


def _cells(device: str) -> Sequence[Cell]:
    return [cell for cell in paper_cells() if cell.device == device]


def _bounds(profile: DeviceProfile, allocator: float) -> tuple[int, int]:
    """Bytes of the largest cell that fits in the paper, and of the smallest that does not."""
    needs: Mapping[str, list[int]] = {"fits": [], "oom": []}
    for cell in _cells(profile.name):
        needs[cell.outcome].append(need(cell, profile.accelerator, allocator))
    return max(needs["fits"]), min(needs["oom"])
