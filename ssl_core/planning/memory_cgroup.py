"""A hard memory limit for processes started here: a memory cgroup of Linux, version 1 or 2."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from common.errors import ShortwaveError
from common.units import format_bytes

_FILES = {
    Path("/sys/fs/cgroup/memory"): ("memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    Path("/sys/fs/cgroup"): ("memory.max", "memory.peak"),
}
"""Limit and largest usage, by where version 1 and version 2 are mounted."""


class NoCgroup(ShortwaveError):
    """Memory cgroups cannot be made here, or not by this user."""


class Cap:
    """A cgroup; processes whose number is written to `folder/cgroup.procs` share its limit."""

    def __init__(self, folder: Path, peak: str) -> None:
        self.folder, self._peak = folder, peak

    def peak_bytes(self) -> int:
        """Most memory so far, files that the kernel may drop included."""
        return int((self.folder / self._peak).read_text())


@contextlib.contextmanager
def capped(limit: int) -> Iterator[Cap]:
    """A cgroup with `limit` bytes of memory and no swap, removed afterwards.

    Raises:
        NoCgroup: cgroups are not there, or not this user's to make.
    """
    for root, (maximum, peak) in _FILES.items():
        folder = root / f"shortwave-{os.getpid()}-{time.monotonic_ns()}"
        if not (root / "cgroup.procs").exists():
            continue
        try:
            folder.mkdir()
        except OSError:
            continue
        if not (folder / maximum).exists():  # version 2 without the memory controller
            folder.rmdir()
            continue
        try:
            (folder / maximum).write_text(str(limit))
            for name in ("memory.memsw.limit_in_bytes", "memory.swap.max"):
                if (folder / name).exists():
                    (folder / name).write_text("0" if name.endswith("max") else str(limit))
            yield Cap(folder, peak)
        finally:
            _remove(folder)
        return
    raise NoCgroup(
        f"no memory cgroup of {format_bytes(limit)} can be made here: it takes Linux with the "
        "memory controller mounted at /sys/fs/cgroup, and root"
    )


def _remove(folder: Path) -> None:
    """Processes leave a cgroup a moment after they end."""
    for _ in range(50):
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.1)
