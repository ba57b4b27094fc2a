"""Fingerprints of files by their content: the same in another place, under another name or time.

Of FLAC that states the MD5 of its decoded audio, the fingerprint takes the header and the file's
size, which tells of a file cut short; of anything else, all bytes. So that not every start reads
every file, fingerprints are remembered by device, inode, size and times. No program can set the
time of change (ctime), so other audio of the same size and modification time is noticed. File
systems on which that does not hold, such as FAT or a mounted object store, are read at each start.
"""

import contextlib
import hashlib
import os
import sqlite3
import stat
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.cache_folder import cache_folder
from common.progress import track
from partitions.columns import Column, Names
from partitions.file_system import KEEP_CHANGE_TIMES, file_system

SETTLED = 60.0
"""Seconds since a file's last change before its fingerprint is remembered. Within the resolution of
its times (2 s at worst), or what two clocks differ by, a second change would not show."""

_STREAMINFO = slice(8, 42)
_MD5 = slice(26, 42)
_SIZE = 16
_BLOCK = 2**20
_READERS = 4
_TOGETHER = 256
"""Files that a thread takes at once."""
_WRITTEN = 20_000
"""Fingerprints written at once: each time waits for the disk."""
_INSERT = "insert or replace into files values (?, ?, ?)"
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class Stamp(NamedTuple):
    """A file as its file system describes it."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int


class Fingerprint(NamedTuple):
    """A file's content, and the file in which it was found."""

    content: str
    """32 hexadecimal digits; empty if the file is missing or cannot be read."""
    stamp: Stamp | None
    """None if the file changed while it was read, or cannot be read."""


UNREADABLE = Fingerprint("", None)


def fingerprints(
    root: Path,
    paths: Iterable[str],
    progress: bool = False,
    stamps: Mapping[str, Stamp | None] | None = None,
) -> dict[str, Fingerprint]:
    """Fingerprints of files by path, in the order of `paths`.

    Args:
        root: corpus root.
        paths: relative to it.
        progress: show a progress bar on stderr if that is a terminal and files must be read.
        stamps: from `stamp_of`, where they have just been taken.
    """

    def look(group: Sequence[str]) -> list[Stamp | None]:
        return [stamp_of(root, path) if stamps is None else stamps[path] for path in group]

    found = dict.fromkeys(paths, UNREADABLE)
    unknown: list[str] = []
    with contextlib.closing(_Memory(root)) as memory, _readers() as pool:
        everything = _groups(list(found))
        for group, looked in zip(everything, pool.map(look, everything), strict=True):
            there = {path: each for path, each in zip(group, looked, strict=True) if each}
            known = memory.find(there)
            found.update(known)
            unknown += [path for path in there if path not in known]
        unread = _groups(unknown)
        read = pool.map(lambda group: [_read(root, path) for path in group], unread)
        bar = track(read, len(unknown), "Reading files", progress and bool(unknown), len)
        for group, made in zip(unread, bar, strict=True):
            new = dict(zip(group, made, strict=True))
            found.update(new)
            memory.keep(new)
        memory.flush()
    return found


@contextlib.contextmanager
def _readers() -> Iterator[ThreadPoolExecutor]:
    """Threads that stop at once at Ctrl-C."""
    pool = ThreadPoolExecutor(_READERS)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def stamp_of(root: Path, path: str) -> Stamp | None:
    """What the file system says of a regular file of a corpus; None if there is none."""
    try:
        status = os.stat(f"{root}{os.sep}{path}")
    except (OSError, ValueError):
        return None
    return _stamp(status) if stat.S_ISREG(status.st_mode) else None  # a pipe would be waited for


def outlasts(root: Path, paths: Names, devices: Column, changed: Column, now: int) -> bool:
    """Whether any change of these files since they were read would show.

    Args:
        root: corpus root.
        paths: of the files, relative to it.
        devices: of each, as in its `Stamp`, `[file]`.
        changed: of each, as in its `Stamp`, `[file]`.
        now: time before they were read, in nanoseconds since 1970.
    """
    if now - int(changed.max()) < SETTLED * 1e9:
        return False
    firsts = np.unique(devices, return_index=True)[1]
    kinds = {file_system(os.path.join(root, paths[int(first)])) for first in firsts}
    return kinds <= KEEP_CHANGE_TIMES


def is_unchanged(root: Path, path: str, fingerprint: Fingerprint) -> bool:
    """Whether a file of a corpus is still the one whose fingerprint was taken."""
    return fingerprint.stamp is not None and stamp_of(root, path) == fingerprint.stamp


def contents(found: Mapping[str, Fingerprint]) -> dict[str, str]:
    """Only the contents, by path."""
    return {path: each.content for path, each in found.items()}


def _stamp(status: os.stat_result) -> Stamp:
    times = status.st_mtime_ns, status.st_ctime_ns
    return Stamp(status.st_dev, status.st_ino, status.st_size, *times)


def _groups(paths: Sequence[str]) -> list[Sequence[str]]:
    return [paths[first : first + _TOGETHER] for first in range(0, len(paths), _TOGETHER)]


def _read(root: Path, path: str) -> Fingerprint:
    try:
        descriptor = os.open(f"{root}{os.sep}{path}", os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            before = os.fstat(descriptor)
            head = os.read(descriptor, _STREAMINFO.stop)
            if head[:8] in _FLAC and any(head[_MD5]):
                digest = hashlib.blake2b(head[_STREAMINFO], digest_size=_SIZE, person=b"flac")
                digest.update(struct.pack(">q", before.st_size))
            else:
                digest = hashlib.blake2b(head, digest_size=_SIZE)
                while block := os.read(descriptor, _BLOCK):
                    digest.update(block)
            after = os.fstat(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        return UNREADABLE
    same = _stamp(before) == _stamp(after)
    return Fingerprint(digest.hexdigest(), _stamp(after) if same else None)


_FLAC = tuple(b"fLaC" + first + b"\0\0\x22" for first in (b"\0", b"\x80"))
"""How a file begins whose first block is STREAMINFO, which may be the last block too."""


class _Memory:
    """Fingerprints of earlier starts, one row an inode; without it every file is read again."""

    def __init__(self, root: Path) -> None:
        self.root, self.now = root, time.time_ns()
        self.trusted: dict[int, bool] = {}
        """Whether the times of change of a device are its own."""
        self.path = cache_folder() / "fingerprints.sqlite"
        self.lost = False
        """Whether the file cannot be used."""
        self.waiting: list[tuple[bytes, bytes, bytes]] = []
        self.connection: sqlite3.Connection | None = None

    def _open(self, create: bool) -> sqlite3.Connection | None:
        """The database; None if it cannot be used, or does not exist and is not to be created."""
        if self.connection is None and not self.lost and (create or self.path.exists()):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.connection = sqlite3.connect(self.path, timeout=10)
                self.connection.execute(
                    "create table if not exists files "
                    "(file blob primary key, stamp blob, content blob) without rowid"
                )
            except (OSError, sqlite3.Error) as error:
                self._lose(error)
        return self.connection

    def _lose(self, error: Exception) -> None:
        """Go on without it; a damaged file is deleted, for the next start to make another."""
        self.close()
        self.lost = True
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
            with contextlib.suppress(OSError):
                for path in (self.path, Path(f"{self.path}-journal")):
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def _lasts(self, path: str, stamp: Stamp) -> bool:
        """Whether a later change of this file would show."""
        if self.now - stamp.changed < SETTLED * 1e9:
            return False
        if stamp.device not in self.trusted:
            kind = file_system(os.path.join(self.root, path))
            self.trusted[stamp.device] = kind in KEEP_CHANGE_TIMES
        return self.trusted[stamp.device]

    def find(self, stamps: Mapping[str, Stamp]) -> dict[str, Fingerprint]:
        """Fingerprints of the files that have not changed since they were read, by path."""
        lasting = {path: stamp for path, stamp in stamps.items() if self._lasts(path, stamp)}
        files = [_file(stamp) for stamp in lasting.values()]
        connection = self._open(create=False) if files else None
        if connection is None:
            return {}
        query = f"select * from files where file in ({','.join('?' * len(files))})"
        try:
            rows = connection.execute(query, files).fetchall()
        except sqlite3.Error as error:
            self._lose(error)
            return {}
        known = {file: (stamp, content) for file, stamp, content in rows}
        return {
            path: Fingerprint(known[_file(stamp)][1].hex(), stamp)
            for path, stamp in lasting.items()
            if known.get(_file(stamp), (b"",))[0] == _version(stamp)
        }

    def keep(self, made: Mapping[str, Fingerprint]) -> None:
        """Remember fingerprints, some thousands of files at a time; `flush` those that wait."""
        self.waiting += [
            (_file(each.stamp), _version(each.stamp), bytes.fromhex(each.content))
            for path, each in made.items()
            if each.stamp is not None and self._lasts(path, each.stamp)
        ]
        if len(self.waiting) >= _WRITTEN:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        connection = self._open(create=True) if self.waiting else None
        if connection is not None:
            try:
                with connection:
                    connection.executemany(_INSERT, sorted(self.waiting))
            except sqlite3.Error as error:
                self._lose(error)
        self.waiting = []


def _file(stamp: Stamp) -> bytes:
    return struct.pack(">QQ", stamp.device, stamp.inode)


def _version(stamp: Stamp) -> bytes:
    return struct.pack(">qqq", stamp.size, stamp.modified, stamp.changed)
