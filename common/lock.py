"""Locks a file against other processes on this machine, for as long as this process runs."""

import time
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_PAUSE = 0.5


class Locked(Exception):
    """Another process holds the lock."""


def lock(path: Path, wait: float) -> IO[str] | None:
    """Lock a file, which is made if needed, until the returned stream is closed.

    Child processes made by `fork` hold the lock too.

    Args:
        path: file to lock.
        wait: seconds to wait for another process.

    Returns:
        None if the system or file system has no locks.

    Raises:
        Locked: another process holds it.
    """
    if fcntl is None:
        return None
    stream = open(path, "a", encoding="utf-8")  # noqa: SIM115, held until close
    end = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return stream
        except BlockingIOError:
            if time.monotonic() < end:
                time.sleep(_PAUSE)
                continue
            stream.close()
            raise Locked from None
        except OSError:
            return stream
