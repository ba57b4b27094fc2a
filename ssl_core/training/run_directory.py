"""The run directory: configuration, metrics, TensorBoard events and checkpoints of a run."""

import functools
import logging
import math
import os
import time
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from common import atomic, strict_json
from common.errors import DataError, UsageError
from common.lock import Locked, lock
from common.settings import flat
from ssl_core.training.stored_settings import CONFIG, require_run, stored_settings

if TYPE_CHECKING:  # a device has no TensorBoard
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("shortwave.run")
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
LOCK_WAIT = 60.0
"""Seconds to wait for another process to release a run's lock: a server that was killed may leave a
child behind."""


@functools.cache
def _has_board() -> bool:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        log.warning("no TensorBoard events: it is missing (the extra `reports` has it)")
        return False
    return True


class RunDirectory:
    """A run on disk, with everything needed to resume it."""

    def __init__(self, path: Path) -> None:
        """Open an existing run directory; `create` makes a new one."""
        self.path = path
        self.checkpoints = path / CHECKPOINTS
        self._board: SummaryWriter | None = None
        self._lock: IO[str] | None = None

    @classmethod
    def create(cls, path: Path, config: str) -> "RunDirectory":
        """Create the directory of a new run.

        Args:
            path: new or empty directory.
            config: YAML of all settings.

        Raises:
            UsageError: the directory already holds a run.
        """
        if path.exists() and not path.is_dir():
            raise UsageError(f"--output {path} is a file; give a directory")
        if path.exists() and any(path.iterdir()):
            raise UsageError(
                f"--output {path} is not empty: choose another, or go on with --resume {path}"
            )
        path.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path / CONFIG, config)
        return cls(path)

    @classmethod
    def reopen(cls, path: Path) -> "RunDirectory":
        """Open a run to resume it.

        Raises:
            UsageError: there is no run in this directory.
        """
        require_run(path)
        return cls(path)

    def lock(self) -> None:
        """Lock the run against other processes while this process lives.

        Raises:
            UsageError: another process holds the lock.
        """
        try:
            self._lock = lock(self.path / ".lock", LOCK_WAIT)
        except Locked:
            raise UsageError(
                f"{self.path}: another process still writes into this run; end it first"
            ) from None

    def identity(self) -> str:
        """The unique name of the run, created at its first use."""
        path = self.path / "identity"
        if not path.exists():
            atomic.write_text(path, uuid.uuid4().hex + "\n")
        return path.read_text(encoding="utf-8").strip()

    def rewind(self, step: int) -> None:
        """Remove metrics of `step` and later, which a resumed run writes again."""
        path = self.path / METRICS
        if path.exists():
            rows = [row for row in self.metrics() if row["step"] < step]
            atomic.write_text(path, "".join(_line(row) for row in rows))
        self._board = self._open_board(purge_step=step)

    def _open_board(self, **options: Any) -> "SummaryWriter | None":
        """TensorBoard's writer; None if TensorBoard is not installed."""
        if not _has_board():
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.path / "tensorboard"), **options)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line of metrics, and the same numbers to TensorBoard.

        A number that is not finite is null in the file, and absent from TensorBoard.
        """
        with open(self.path / METRICS, "a", encoding="utf-8") as stream:
            stream.write(_line({"step": step, **values}))
            stream.flush()
            os.fsync(stream.fileno())
        if self._board is None:
            self._board = self._open_board()
        if self._board is None:
            return
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._board.add_scalar(name, value, step)
        self._board.flush()

    def metrics(self) -> list[dict[str, Any]]:
        """Read all complete lines of metrics, oldest first; a number that was not finite is None.

        Raises:
            DataError: a line is not JSON, apart from a truncated last line.
        """
        path = self.path / METRICS
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = []
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                rows.append(strict_json.loads(line))
            except ValueError:
                if number == len(lines):
                    break
                raise DataError(f"{path}, line {number}: not JSON") from None
        return rows

    def close(self) -> None:
        """Close the TensorBoard file and release the lock."""
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def open_run(settings: Any, name: str, free: Collection[str]) -> RunDirectory:
    """Open the run directory of `settings.resume`, or create a new one.

    Args:
        settings: have `output`, `resume` and `as_config()`.
        name: suffix of a new directory under `runs/`, after the time; used without `output`.
        free: names of settings that a resumed run may change.

    Raises:
        UsageError: the directory is not empty, not a run, or a run with other settings.
    """
    if settings.resume is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        path = settings.output or Path(f"runs/{stamp}-{name}")
        return RunDirectory.create(path.resolve(), settings.as_config())
    run = RunDirectory.reopen(settings.resume.resolve())
    stored, now = flat(stored_settings(type(settings), run.path)), flat(settings)
    for name, value in now.items():
        if name.replace("-", "_") not in free and value != stored[name]:
            raise UsageError(
                f"--resume {run.path}: {name} was {stored[name]!r} there and is {value!r} now"
            )
    return run


def _line(row: Mapping[str, Any]) -> str:
    return strict_json.dumps(row, sort_keys=False) + "\n"
