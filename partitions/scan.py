"""Content and length of every file of a corpus, read once and then found in the cache."""

import contextlib
import hashlib
import os
import stat
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from common.cache_folder import cache_folder
from common.errors import DataError
from common.progress import track
from partitions.audio import samples_of
from partitions.columns import Columns, Names, chunks, compact, kept
from partitions.file_contents import FileContents
from partitions.fingerprints import Stamp, fingerprints, outlasts
from partitions.librispeech import Listing, Recordings
from partitions.skips import Skips, describe_skips

Stamps = npt.NDArray[np.uint64]
"""`[file, value]`: each file as its file system describes it; zeros if there is none."""

_FORMAT = 1
"""Raise it when fingerprints or lengths are taken otherwise."""
_REASONS = ("", "missing", "unreadable", "empty")
_READERS = 4
_TOGETHER = 1024
"""Files that a thread takes at once."""
_QUICK = 5e-5
"""Seconds that a file takes at most whose header is in the page cache."""
_REMEMBERED = 2**14
"""Files whose fingerprints are taken, and remembered, at once."""
_MASK = 2**64 - 1
_NO_CONTENT = "00" * 16

Item = TypeVar("Item")


def stamps_of(listing: Listing) -> Stamps:
    """What the file system says of the files of a corpus."""
    start = f"{listing.root}{os.sep}"

    def look(paths: list[str]) -> "array[int]":
        rows = array("Q")
        for path in paths:
            try:
                found = os.stat(start + path)
            except (OSError, ValueError):
                rows.extend(_NONE)
                continue
            times = found.st_mtime_ns & _MASK, found.st_ctime_ns & _MASK
            there = stat.S_ISREG(found.st_mode)
            rows.extend((found.st_dev, found.st_ino, found.st_size, *times) if there else _NONE)
        return rows

    found = array("Q")
    for rows in _in_groups(listing.files, look):
        found += rows
    return _table(found)


def _rows(stamps: Iterable[Stamp | None]) -> "array[int]":
    rows = array("Q")
    for stamp in stamps:
        rows.extend(_NONE if stamp is None else [value & _MASK for value in stamp])
    return rows


def _stamp(row: list[int]) -> Stamp | None:
    device, inode, size, *times = row
    if not any(row):
        return None
    return Stamp(device, inode, size, *(time - 2**64 if time >> 63 else time for time in times))


def _table(rows: "array[int]") -> Stamps:
    return np.frombuffer(rows, np.uint64).reshape(-1, len(_NONE))


_NONE = Stamp(0, 0, 0, 0, 0)
"""Of a file that is not there."""


def contents_of(listing: Listing, stamps: Stamps, progress: bool) -> tuple[FileContents, bool]:
    """Fingerprints of all files, and whether no file changed after `stamps` were taken.

    Args:
        listing: the files.
        stamps: from `stamps_of`.
        progress: show a progress bar on stderr if that is a terminal.
    """
    files = listing.files
    digest = hashlib.blake2b(f"{_FORMAT}\n".encode(), digest_size=16)
    for each in (files.text, files.ends, stamps):
        digest.update(each.tobytes())
    place = cache_folder() / "scans" / f"{digest.hexdigest()}.columns"
    with contextlib.suppress(DataError):
        return FileContents(Columns.open(place)), True
    now = time.time_ns()
    contents, known = bytearray(), bytearray()
    steady = True
    groups = (list(files.within(part)) for part in chunks(len(files), _REMEMBERED))
    for paths in track(groups, len(files), "Reading files", progress, len):
        before = stamps[len(known) : len(known) + len(paths)]
        looked = dict(zip(paths, map(_stamp, before.tolist()), strict=True))
        found = fingerprints(listing.root, paths, stamps=looked).values()
        read = _table(_rows(each.stamp for each in found))
        contents += bytes.fromhex("".join(each.content or _NO_CONTENT for each in found))
        known += bytes(bool(each.content) for each in found)
        readable = np.frombuffer(known[-len(paths) :], np.bool_)
        steady &= np.array_equal(read[readable], before[readable])
    made = FileContents.of(files, bytes(contents), bytes(known))
    if steady and all(known) and outlasts(listing.root, files, stamps[:, 0], stamps[:, 4], now):
        made = made.named()
        return FileContents(kept(made.columns, place)), True
    return made, steady


def recordings_of(listing: Listing, progress: bool) -> Recordings:
    """Lengths of all usable files by their headers; others are counted in `skips`.

    Args:
        listing: the files.
        progress: show a progress bar on stderr if that is a terminal.

    Raises:
        DataError: no usable audio.
    """
    root = listing.root

    def look(paths: list[str]) -> list[int | str]:
        return [samples_of(f"{root}{os.sep}{path}") for path in paths]

    lengths, reasons = array("q"), bytearray()
    bar = track(
        _in_groups(listing.files, look), len(listing.files), "Reading headers", progress, len
    )
    for group in bar:
        for found in group:
            lengths.append(0 if isinstance(found, str) else found)
            reasons.append(_REASONS.index(found) if isinstance(found, str) else 0)
    return _usable(listing, np.frombuffer(lengths, np.int64), bytes(reasons))


def _usable(listing: Listing, lengths: npt.NDArray[np.int64], reasons: bytes) -> Recordings:
    """The usable files and their speakers."""
    skips = Skips(dict(listing.skips), dict(listing.skipped_examples))
    speakers: dict[str, int] = {}
    owners, paths = array("q"), []
    for path, reason in zip(listing.files, reasons, strict=True):
        if reason:
            skips.add(_REASONS[reason], path)
            continue
        speaker = path.split("/", 2)[1]
        owners.append(speakers.setdefault(speaker, len(speakers)))
        paths.append(path)
    if not paths:
        told = "; ".join(describe_skips(skips.counts, skips.examples))
        raise DataError(f"no usable audio in {listing.root}: {told}; download the subset again")
    return Recordings(
        listing.root,
        Names.of(paths),
        tuple(speakers),
        compact(np.frombuffer(owners, np.int64)),
        compact(lengths[np.frombuffer(reasons, np.uint8) == 0]),
        skips.counts,
        skips.examples,
    )


def _in_groups(paths: Names, work: Callable[[list[str]], Item]) -> Iterator[Item]:
    """What becomes of groups of paths, in order; several threads where the disk is waited for.

    Without waiting, threads would only wait for each other.
    """

    def made(group: slice) -> Item:
        return work(list(paths.within(group)))

    groups = chunks(len(paths), _TOGETHER)
    for group in groups:
        began = time.perf_counter()
        first = made(group)
        waits = time.perf_counter() - began > _QUICK * (group.stop - group.start)
        yield first
        if waits:
            break
    pool = ThreadPoolExecutor(_READERS)
    try:
        yield from pool.map(made, groups)
    finally:
        pool.shutdown(cancel_futures=True)  # at once at Ctrl-C
