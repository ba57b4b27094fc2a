"""Limits set by a device's owner: training waits while one is exceeded."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from common.units import format_bytes

log = logging.getLogger("shortwave.client")
_THERMAL = Path("/sys/class/thermal")
PAUSE = 5.0
"""Seconds between two checks while training waits."""


class Limits(NamedTuple):
    """Limits for training; 0 is no limit."""

    temperature: float = 0.0
    """Degrees Celsius of the hottest thermal zone."""
    load: float = 0.0
    """Load average over a minute, training included."""
    memory: int = 0
    """Bytes that must stay available to others."""

    @classmethod
    def of_node(cls, node: Mapping[str, Any]) -> "Limits":
        """Read the limits from Flower's node config."""
        return cls(
            float(node.get("pause-temperature", 0.0)),
            float(node.get("pause-load", 0.0)),
            int(node.get("pause-memory", 0)),
        )

    def passed(self, thermal: Path = _THERMAL) -> str:
        """Describes a limit that is exceeded now; empty if none is."""
        if self.temperature:
            degrees = temperature(thermal)
            if degrees is not None and degrees > self.temperature:
                return f"{degrees:.0f} degrees, the limit is {self.temperature:g}"
        if self.load and os.getloadavg()[0] > self.load:
            return f"load {os.getloadavg()[0]:.1f}, the limit is {self.load:g}"
        if self.memory:
            available = psutil.virtual_memory().available
            if available < self.memory:
                return (
                    f"{format_bytes(available)} of memory available, "
                    f"{format_bytes(self.memory)} must be"
                )
        return ""

    def wait(self, sleep: Callable[[float], None] = time.sleep, thermal: Path = _THERMAL) -> float:
        """Wait until no limit is exceeded; returns the seconds waited."""
        started, told = time.monotonic(), False
        while reason := self.passed(thermal):
            if not told:
                log.warning("paused: %s", reason)
                told = True
            sleep(PAUSE)
        if told:
            log.warning("going on after %.0f s", time.monotonic() - started)
        return time.monotonic() - started if told else 0.0


def temperature(thermal: Path = _THERMAL) -> float | None:
    """Degrees Celsius of the hottest thermal zone; None if the system reports none."""
    found = []
    for path in thermal.glob("thermal_zone*/temp"):
        try:
            found.append(int(path.read_text()) / 1000)
        except (OSError, ValueError):
            continue  # a zone that is off
    return max(found, default=None)


NO_LIMITS = Limits()
