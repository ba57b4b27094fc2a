"""Releases the pages of program files that an idle process has in memory."""

import contextlib
import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

_DONTNEED = 4  # MADV_DONTNEED, linux/mman.h
_REGION = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+\s*(/.*)?")


def release_program_pages(smaps: Path = Path("/proc/self/smaps")) -> int:
    """Unmap the pages of libraries that are equal to their files; returns their bytes.

    Importing PyTorch touches some 200 MB of its libraries, most of them once. The kernel would take
    them back when memory is short; released, they do not count as this process's memory before. The
    next access maps them again, from the page cache if they are still there. Pages that the process
    has changed stay, such as relocated tables.
    """
    released = 0
    with contextlib.suppress(OSError, AttributeError):
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for start, size, resident in _unchanged(smaps.read_text(encoding="utf-8")):
            if madvise(start, size, _DONTNEED) == 0:
                released += resident
    return released


def _unchanged(text: str) -> Iterator[tuple[int, int, int]]:
    """Address, size and resident bytes of regions of files that were neither written nor can be."""
    region: tuple[int, int] | None = None
    resident = 0
    for line in text.splitlines():
        match = _REGION.match(line)
        if match:
            start, end = int(match[1], 16), int(match[2], 16)
            region = (start, end - start) if match[4] and match[3] in ("r-xp", "r--p") else None
            continue
        name, _, rest = line.partition(":")
        if name == "Rss":
            resident = int(rest.split()[0]) * 1024
        elif name == "Anonymous" and region is not None and rest.split()[0] == "0":
            yield *region, resident
