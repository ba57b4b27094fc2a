"""The paper's Table 2 from shapes: which cells a plain step fits on four devices.

A cell fits where `plain_step` on the device's accelerator takes no more than the device's
`training_bytes`. Two constants are calibrated on the table, all else is counted or measured:

- `parts.ALLOCATOR`, what allocators take above tensors. It acts on all four devices.
- `tensor-fraction` in `device_profiles.yaml`, the same for all Jetson boards: what the step's
  tensors get of a memory that CPU and GPU share. In the paper the 16 GB board behaves as if it had
  less than twice what the 8 GB one has, which no system of a fixed size explains.

`split` calibrates on some of the devices and counts agreement on each of them and of the others.
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
"""In the order of the table."""
_MOST = 0.6
"""Largest `ALLOCATOR` considered."""


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
    """A batch, where it fits."""


class Calibration(NamedTuple):
    """Constants, and how far from wrong the worst cell they were calibrated on is."""

    allocator: float
    fraction: float | None
    """None where none of the devices shares its memory with a GPU."""
    margin: float
    """Least natural logarithm of room over need (fits) or need over room (oom); below zero, a cell
    is wrong."""


class Agreement(NamedTuple):
    """Cells of a device that come out as in the paper."""

    agree: int
    cells: int


@functools.cache
def paper_cells() -> tuple[Cell, ...]:
    """The 140 entries of the table, from `table2.csv`."""
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
    """Bytes of a plain step of `base`, above imports and CUDA context."""
    config = preset("base")
    precision = cell.precision
    return plain_step(
        config, cell.length, cell.batch, precision, accelerator, allocator=allocator
    ).total


def outcome(
    cell: Cell, profile: DeviceProfile, allocator: float = ALLOCATOR, fraction: float | None = None
) -> Literal["fits", "oom"]:
    """Whether a plain step fits a device; `fraction` replaces the profile's."""
    room = profile.training_bytes
    if profile.tensor_fraction is not None and fraction is not None:
        room = int(fraction * profile.memory)
    return "fits" if need(cell, profile.accelerator, allocator) <= room else "oom"


def agreement(allocator: float = ALLOCATOR, fraction: float | None = None) -> dict[str, Agreement]:
    """Cells in which a plain step comes out as in the paper, by device."""
    profiles, counts = known_profiles(), {}
    for device in DEVICES:
        cells = _cells(device)
        right = [outcome(c, profiles[device], allocator, fraction) == c.outcome for c in cells]
        counts[device] = Agreement(sum(right), len(cells))
    return counts


def calibrate(devices: Collection[str]) -> Calibration:
    """The constants that keep the worst cell of these devices as far from wrong as they can.

    For every allocator figure the best fraction follows: it lies, in logarithms, half way between
    the largest cell that fits and the smallest that does not, over all boards that share memory.

    Raises:
        UsageError: a device that is not in the table.
    """
    if not devices or not set(devices) <= set(DEVICES):
        raise UsageError(f"calibrate on some of {', '.join(DEVICES)}, not {', '.join(devices)}")
    profiles = known_profiles()
    best = Calibration(0.0, None, -math.inf)
    for step in range(round(_MOST * 200) + 1):
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
    """Calibrate on these devices; agreement by device, on the others with what they give.

    Raises:
        UsageError: not devices of the table, or none that shares its memory, without which nothing
            can be said of those that do.
    """
    found = calibrate(devices)
    if found.fraction is None:
        raise UsageError("calibrate on at least one of jetson-xavier-nx and jetson-xavier-agx")
    return found, agreement(found.allocator, found.fraction)


def _cells(device: str) -> Sequence[Cell]:
    return [cell for cell in paper_cells() if cell.device == device]


def _bounds(profile: DeviceProfile, allocator: float) -> tuple[int, int]:
    """The largest need of a cell that fits, and the smallest of one that does not."""
    needs: Mapping[str, list[int]] = {"fits": [], "oom": []}
    for cell in _cells(profile.name):
        needs[cell.outcome].append(need(cell, profile.accelerator, allocator))
    return max(needs["fits"]), min(needs["oom"])
