"""Devices and their memory, as text, as a table and as JSON."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from common.units import format_bytes
from ssl_core.planning.device import AUTO, DeviceProfile


def describe_device(profile: DeviceProfile) -> dict[str, Any]:
    """The figures of a profile for JSON; sizes in bytes."""
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
        "precisions": [*profile.precisions],
        "software": profile.software,
        "sources": dict(profile.sources),
    }


def device_lines(profile: DeviceProfile) -> list[str]:
    """A profile as lines of text: description, parts of the memory, and software."""
    parts = {
        "system": profile.system_bytes,
        "SuperNode": profile.supernode,
        "ClientApp": profile.clientapp,
        "for training": profile.training_bytes,
    }
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
    lines = [
        f"{profile.name}: {profile.description}",
        f"computes on {_computes_on(profile)}: {', '.join(profile.precisions)}; "
        f"{profile.cores} CPU cores",
        f"memory {format_bytes(profile.memory)}: {listed}",
    ]
    return [*lines, f"software: {profile.software}"] if profile.software else lines


def device_table(profiles: Sequence[DeviceProfile]) -> Table:
    """A table of devices in at most 80 columns; longer names are folded, not cut."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for head in ("device", "computes on", "memory", "for training", "precisions"):
        right = head in ("memory", "for training")
        table.add_column(head, justify="right" if right else "left", overflow="fold")
    for profile in profiles:
        table.add_row(
            profile.name,
            _computes_on(profile),
            format_bytes(profile.memory),
            format_bytes(profile.training_bytes),
            ", ".join(profile.precisions),
        )
    return table


def table_notes(profiles: Sequence[DeviceProfile]) -> list[str]:
    """Lines to print below `device_table`."""
    limited = [profile.name for profile in profiles if profile.software]
    lines = [f"{AUTO} is this machine; --device NAME shows more of a device"]
    if limited:
        lines.append(f"limits of software, see --device NAME: {', '.join(limited)}")
    return lines


def _computes_on(profile: DeviceProfile) -> str:
    return "cuda, shared" if profile.shared else profile.accelerator
