"""Disk cache of the features of clips from the frozen part of a model.

There is one SQLite file per backbone and stage: several processes may use it, and any may be killed
at any time. When the files together reach the limit, the least recently used other files are
deleted; if that is not enough, clips that do not fit are computed again in every epoch.
"""

import contextlib
import hashlib
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.cache_folder import cache_folder
from partitions.manifest import Piece

LIMIT = 32 * 2**30
"""Bytes of all files together: 30 h of hidden states of `base` in fp32, or 2800 h of means."""

_TABLE = "create table if not exists clips (key blob primary key, data blob)"
_BATCH = 500
_BROKEN = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
Floats = npt.NDArray[np.float32]


def clip_key(content: str, piece: Piece) -> bytes:
    """Digest of what features are made from: a file's content, and which samples are taken.

    Args:
        content: fingerprint of the file; if empty, the file cannot be read.
        piece: of the file.
    """
    text = f"{content or piece.path} {piece.start} {piece.samples}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:16]


class FeatureCache:
    """Features of clips from one backbone at one stage."""

    def __init__(
        self, identity: str, width: int, limit: int = LIMIT, folder: Path | None = None
    ) -> None:
        """Open or create the file.

        Args:
            identity: of backbone and stage, in letters, digits and `-`; names the file.
            width: features per frame.
            limit: bytes of all files in the folder; 0 switches the cache off.
            folder: of all files; None for `features` in the user's cache folder.
        """
        self.width, self.limit = width, limit
        self.folder = folder or cache_folder() / "features"
        self.path = self.folder / f"{identity}.sqlite"
        self.problem = ""
        """Why no more clips are stored; empty while there is room."""
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        if not limit:
            self.problem = "the cache is switched off"
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._open()
        except (OSError, sqlite3.Error) as error:
            self._recover(error)

    def _open(self) -> None:
        connection = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
        try:
            connection.execute("pragma journal_mode=wal")
            connection.execute("pragma synchronous=normal")
            connection.execute(_TABLE)
            connection.execute("select count(*) from clips").fetchone()
            connection.commit()
            os.utime(self.path)
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    def _recover(self, error: Exception) -> None:
        """Recreate a corrupt file; after other errors, such as a full disk, stop storing."""
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _BROKEN:
            self._disconnect()
            try:
                self._forget(self.path)
                return self._open()
            except (OSError, sqlite3.Error) as another:
                error = another
        self.problem = f"{self.path}: {error}"

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def close(self) -> None:
        """Close the file; nothing is found or stored afterwards."""
        with self._lock:
            self._disconnect()

    def missing(self, keys: Iterable[bytes]) -> set[bytes]:
        """The keys that are not in the cache."""
        wanted = set(keys)
        return wanted - set(self._found(sorted(wanted), "key"))

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Floats]:
        """Features of the cached clips by key, `[frame, feature]` each."""
        return {
            key: np.frombuffer(data, np.float32).reshape(-1, self.width)
            for key, data in self._found(keys, "key, data")
        }

    def _found(self, keys: Sequence[bytes], columns: str) -> Iterator[tuple[bytes, ...]]:
        for first in range(0, len(keys), _BATCH):
            some = keys[first : first + _BATCH]
            marks = ",".join("?" * len(some))
            query = f"select {columns} from clips where key in ({marks})"
            with self._lock:
                if self._connection is None:
                    return
                try:
                    rows = self._connection.execute(query, some).fetchall()
                except sqlite3.Error as error:
                    return self._recover(error)
            yield from (row if len(row) > 1 else row[0] for row in rows)

    def put(self, clips: Sequence[tuple[bytes, Floats]]) -> None:
        """Store keys and `[frame, feature]` of clips, all or none; without room, sets `problem`."""
        size = sum(frames.nbytes for _, frames in clips)
        rows = [(key, np.ascontiguousarray(frames, np.float32).data) for key, frames in clips]
        with self._lock:
            if self.problem or self._connection is None:
                return
            try:
                if not self._make_room(size):
                    self.problem = f"{self.folder} has reached its limit of {self.limit >> 20} MiB"
                    return
                with self._connection:
                    self._connection.executemany("insert or replace into clips values (?, ?)", rows)
            except (OSError, sqlite3.Error) as error:
                self._recover(error)

    def _make_room(self, size: int) -> bool:
        """Delete other files until `size` bytes fit; if they cannot, delete none, return False."""
        files = _files(self.folder)
        own = sum(used for path, (used, _) in files.items() if _database(path) == self.path)
        used = sum(used for used, _ in files.values())
        if own + size > self.limit:
            return False
        others = {_database(path) for path in files} - {self.path}
        for path in sorted(others, key=lambda path: files.get(path, (0, 0.0))[1]):
            if used + size <= self.limit:
                break
            self._forget(path)
            used -= sum(files[part][0] for part in files if _database(part) == path)
        return used + size <= self.limit

    @staticmethod
    def _forget(path: Path) -> None:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)


def _database(path: Path) -> Path:
    """Database of a file, which may be its `-wal` or `-shm`."""
    return path.with_name(path.name.removesuffix("-wal").removesuffix("-shm"))


def _files(folder: Path) -> dict[Path, tuple[int, float]]:
    """Bytes and modification time of all cache files; other processes may delete some meanwhile."""
    found = {}
    for path in folder.glob("*.sqlite*"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            found[path] = (status.st_size, status.st_mtime)
    return found
