"""A small disk that can be filled, for faults by a full disk; needs root."""

import contextlib
import errno
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common.errors import UsageError


@contextlib.contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[Path]:
    """Mount a tmpfs, which can be filled, while in use.

    Args:
        path: where to mount it.
        megabytes: its size in MiB.

    Raises:
        UsageError: this user may not mount.
    """
    path.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}M", "tmpfs", str(path)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        raise UsageError("the disk faults mount a tmpfs: run as root, or skip them (--faults)")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], capture_output=True, check=False)


def can_mount() -> bool:
    """Whether the disk faults can be injected here."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder, "disk"), 1):
                return True
        except (UsageError, OSError):
            return False


def fill(disk: Path, leave: int) -> Path:
    """Fill a disk except for `leave` bytes; returns the file to delete."""
    path = disk / "filler"
    block = bytes(2**16)
    with path.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(block)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        stream.truncate(max(0, stream.tell() - leave))
    return path
