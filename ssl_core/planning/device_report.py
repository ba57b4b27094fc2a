"""Devices and their memory, as a table and as JSON."""

from collections.abc import Sequence
from typing import Any

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
        "sources": dict(profile.sources),
    }


def device_table(profiles: Sequence[DeviceProfile]) -> Table:
    """A table of devices and their memory."""
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
