"""Limits the memory of processes with a Linux memory cgroup, version 1 or 2."""

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
"""Names of the limit and peak usage files, by mount point of version 1 and version 2."""


class NoCgroup(ShortwaveError):
    """Memory cgroups cannot be created here, or not by this user."""


class Cap:
    """A memory cgroup; a process joins it by writing its id to `folder/cgroup.procs`."""

    def __init__(self, folder: Path, peak: str) -> None:
        self.folder, self._peak = folder, peak

    def peak_bytes(self) -> int:
        """Peak memory in bytes so far, including file cache that the kernel may drop."""
        return int((self.folder / self._peak).read_text())


@contextlib.contextmanager
def capped(limit: int) -> Iterator[Cap]:
    """Create a cgroup with `limit` bytes of memory and no swap, and remove it afterwards.

    Raises:
        NoCgroup: cgroups are not available, or this user may not create them.
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
        f"cannot create a memory cgroup of {format_bytes(limit)}: this needs Linux with the "
        "memory controller mounted at /sys/fs/cgroup, and root"
    )


def _remove(folder: Path) -> None:
    """Remove a cgroup; retries, since processes leave it a moment after they end."""
    for _ in range(50):
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.1)
