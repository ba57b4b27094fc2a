"""Environment variables for Flower and Ray: no telemetry, and freed memory returned.

`eval "$(python -m fl_client.environment)"` sets them in a shell, for `flower-superlink` and `flwr`.
In Python, set them before importing either.
"""

import contextlib
import ctypes
import os
import platform

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Telemetry, update checks, dependency downloads on the device, Ray's usage statistics."""
LEAN = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_ARENA_MAX": "2"}
"""For glibc: return the memory of a message's pieces when they are freed. Otherwise glibc keeps as
much as the whole message for other threads and later pieces."""
_NUMBERS = {"MALLOC_MMAP_THRESHOLD_": -3, "MALLOC_ARENA_MAX": -8}
"""Numbers of these options for `mallopt` (glibc's malloc.h)."""


def be_quiet() -> None:
    """Set each variable of `QUIET` that the user has not set."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def be_lean() -> None:
    """Return freed memory, here and in child processes, unless the user has set these options."""
    for name, value in LEAN.items():
        if name in os.environ:
            continue
        os.environ[name] = value
        if platform.libc_ver()[0] == "glibc":
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).mallopt(_NUMBERS[name], int(value))


if __name__ == "__main__":
    for name, value in (QUIET | LEAN).items():
        print(f"export {name}={value}")
