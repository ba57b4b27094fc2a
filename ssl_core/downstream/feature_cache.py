"""What a frozen part of a model makes of a clip, kept on disk: computed once, whatever the epochs.

An SQLite file for each backbone and stage: a process may be killed at any time, and several may
read and write. When all files together reach the limit, those of backbones that were not used for
longest go; when that is not enough, what does not fit is computed again in every epoch.
"""

import hashlib
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from partitions.cache import cache_folder
from partitions.manifest import Piece

LIMIT = 32 * 2**30
"""Bytes of all files together: 30 h of hidden states of `base` in fp32, or 2800 h of means."""

_TABLE = "create table if not exists clips (key blob primary key, data blob)"
_BATCH = 500
Floats = npt.NDArray[np.float32]


def clip_key(root: Path, piece: Piece) -> bytes:
    """Of a piece's audio: its path, the file's size and time of change, and what of it is taken."""
    try:
        status = (root / piece.path).stat()
        version = f"{status.st_size} {status.st_mtime_ns}"
    except OSError:
        version = "missing"
    text = f"{root.resolve()}\n{piece.path}\n{version} {piece.start} {piece.samples}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:16]


class FeatureCache:
    """The clips of one backbone at one stage."""

    def __init__(
        self, identity: str, width: int, limit: int = LIMIT, folder: Path | None = None
    ) -> None:
        """Open or make the file.

        Args:
            identity: of the backbone and stage; letters, digits and `-`.
            width: numbers in a frame.
            limit: bytes of all files in the folder; 0 keeps nothing.
            folder: where files are; None is `features` in the user's cache.
        """
        self.width, self.limit = width, limit
        self.folder = folder or cache_folder() / "features"
        self.path = self.folder / f"{identity}.sqlite"
        self.problem = ""
        """Why nothing more is kept; empty while there is room."""
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        if not limit:
            self.problem = "the cache is switched off"
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._open()
        except sqlite3.DatabaseError:
            self._forget(self.path)  # broken, and it can be made again
            try:
                self._open()
            except sqlite3.Error as error:
                self._give_up(error)
        except OSError as error:
            self._give_up(error)

    def _open(self) -> None:
        connection = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
        connection.execute("pragma journal_mode=wal")
        connection.execute("pragma synchronous=normal")
        connection.execute(_TABLE)
        connection.execute("select count(*) from clips").fetchone()
        connection.commit()
        os.utime(self.path)
        self._connection = connection

    def _give_up(self, error: Exception) -> None:
        self.problem = f"{self.path}: {error}"

    def close(self) -> None:
        """Close the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def missing(self, keys: Iterable[bytes]) -> set[bytes]:
        """Those of the keys that are not kept."""
        wanted = set(keys)
        return wanted - set(self._found(sorted(wanted), "key"))

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Floats]:
        """Frames of the clips that are kept, `[frame, feature]` each."""
        return {
            key: np.frombuffer(data, np.float32).reshape(-1, self.width)
            for key, data in self._found(keys, "key, data")
        }

    def _found(self, keys: Sequence[bytes], columns: str) -> Iterator[tuple[bytes, ...]]:
        for first in range(0, len(keys), _BATCH):
            some = keys[first : first + _BATCH]
            marks = ",".join("?" * len(some))
            if self._connection is None:
                return
            with self._lock:
                query = f"select {columns} from clips where key in ({marks})"
                rows = self._connection.execute(query, some).fetchall()
            yield from (row if len(row) > 1 else row[0] for row in rows)

    def put(self, clips: Sequence[tuple[bytes, Floats]]) -> None:
        """Keep clips, all or none of them; `problem` says so when there is no room."""
        if self.problem or self._connection is None:
            return
        size = sum(frames.nbytes for _, frames in clips)
        if self._used() + size > self.limit:
            self._make_room(size)
            if self._used() + size > self.limit:
                self.problem = f"{self.folder} has reached its limit of {self.limit >> 20} MiB"
                return
        rows = [(key, np.ascontiguousarray(frames, np.float32).data) for key, frames in clips]
        try:
            with self._lock, self._connection:
                self._connection.executemany("insert or replace into clips values (?, ?)", rows)
        except sqlite3.Error as error:
            self._give_up(error)

    def _used(self) -> int:
        total = 0
        for path in self.folder.glob("*.sqlite*"):
            try:
                total += path.stat().st_size
            except OSError:  # another process has just removed it
                continue
        return total

    def _make_room(self, size: int) -> None:
        others = [path for path in self.folder.glob("*.sqlite") if path != self.path]
        for path in sorted(others, key=lambda path: path.stat().st_mtime):
            if self._used() + size <= self.limit:
                return
            self._forget(path)

    @staticmethod
    def _forget(path: Path) -> None:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
