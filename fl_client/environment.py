"""Environment variables for Flower and Ray: no telemetry, no proxy to oneself, memory returned.

`eval "$(python -m fl_client.environment)"` sets them in a shell, for `flower-superlink` and `flwr`.
In Python, set them before importing either.
"""

import contextlib
import ctypes
import os
import platform
import shlex
from collections.abc import Mapping

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


LOOPBACK = ("127.0.0.1", "localhost", "::1")
_NO_PROXY = ("no_proxy", "NO_PROXY")
"""Both are read, by different libraries; of two values Python takes the first."""


def be_quiet() -> None:
    """Set each variable of `QUIET` that the user has not set, and exempt this machine from proxies.

    A SuperNode and its ClientApps exchange weights and updates on 127.0.0.1 in clear text, which an
    HTTP proxy must never see.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.update(without_proxies(os.environ))


def without_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables by which programs reach this machine directly, whatever proxy is set.

    Args:
        environment: hosts that it already exempts stay exempt.
    """
    given = [environment.get(name, "") for name in _NO_PROXY]
    hosts = [host.strip() for text in given for host in text.split(",") if host.strip()]
    exempt = ["*"] if "*" in hosts else dict.fromkeys([*hosts, *LOOPBACK])
    return dict.fromkeys(_NO_PROXY, ",".join(exempt))


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
    for name, value in (QUIET | LEAN | without_proxies(os.environ)).items():
        print(f"export {name}={shlex.quote(value)}")
