"""The run directory: configuration, metrics, TensorBoard events and checkpoints of a run."""

import contextlib
import dataclasses
import functools
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from common import atomic, strict_json
from common.errors import DataError, UsageError
from common.lock import Locked, lock
from common.settings import flat
from partitions.corpus_record import CORPUS, NOTHING, CorpusRecord
from ssl_core.training.stored_settings import CONFIG, require_run, stored_settings

if TYPE_CHECKING:  # a device has no TensorBoard
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("shortwave.run")
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
_LOCK, _IDENTITY = ".lock", "identity"
_START = {CONFIG, CORPUS, "manifest.tsv", "status.json", "tensorboard", _LOCK, _IDENTITY}
"""What a run may write before its first update."""
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
    def create(cls, path: Path, config: str, record: CorpusRecord = NOTHING) -> "RunDirectory":
        """Create the directory of a new run.

        Args:
            path: new or empty directory, or that of a run that failed before its first update.
            config: YAML of all settings.
            record: of the run's corpus.

        Raises:
            UsageError: the directory already holds a run.
        """
        if path.exists() and not path.is_dir():
            raise UsageError(f"--output {path} is a file; give a directory")
        _remove_start(path)
        if path.exists() and any(path.iterdir()):
            raise UsageError(
                f"--output {path} is not empty: choose another, or go on with --resume {path}"
            )
        path.mkdir(parents=True, exist_ok=True)
        if record != NOTHING:
            record.write(path)
        atomic.write_text(path / CONFIG, config)  # last, as it marks a run
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
            self._lock = lock(self.path / _LOCK, LOCK_WAIT)
        except Locked:
            raise UsageError(
                f"{self.path}: another process still writes into this run; end it first"
            ) from None

    def identity(self) -> str:
        """The unique name of the run, created at its first use."""
        path = self.path / _IDENTITY
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


def open_run(
    settings: Any,
    name: str,
    free: Collection[str],
    record: CorpusRecord = NOTHING,
    places: Collection[str] = (),
) -> RunDirectory:
    """Open the run directory of `settings.resume`, or create a new one.

    Args:
        settings: have `output`, `resume` and `as_config()`.
        name: suffix of a new directory under `runs/`, after the time; used without `output`.
        free: names of settings that a resumed run may change.
        record: of the run's corpus, which must be that of the run to resume.
        places: names of settings that say where something is that `record` compares: a run with a
            record may change them, and keeps the new ones.

    Raises:
        UsageError: the directory is not empty, not a run, or a run with other settings or another
            corpus.
        DataError: the run's record of its corpus is damaged.
    """
    if settings.resume is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        path = settings.output or Path(f"runs/{stamp}-{name}")
        return RunDirectory.create(path.resolve(), settings.as_config(), record)
    run = RunDirectory.reopen(settings.resume.resolve())
    begun = CorpusRecord.read(run.path)
    before = stored_settings(type(settings), run.path)
    moved = {name: getattr(settings, name) for name in places if begun is not None}
    stored, now = flat(before), flat(settings)
    for name, value in now.items():
        plain = name.replace("-", "_")
        if plain in free or plain in moved or value == stored[name]:
            continue
        if plain in places and value and _same_place(value, stored[name]):
            continue
        hint = "; a run without a record of its corpus cannot move" if plain in places else ""
        raise UsageError(
            f"--resume {run.path}: {name} was {stored[name]!r} there and is {value!r} now{hint}"
        )
    options = " and ".join(f"--{name}" for name in places if name != "checkpoint")
    refusal = begun.refusal(record, options) if begun is not None else ""
    if refusal:
        raise UsageError(f"--resume {run.path}: {refusal}")
    _keep(run, begun, record)
    if any(value != getattr(before, name) for name, value in moved.items()):
        atomic.write_text(run.path / CONFIG, dataclasses.replace(before, **moved).as_config())
    return run


def _same_place(one: Any, other: Any) -> bool:
    return bool(other) and os.path.realpath(str(one)) == os.path.realpath(str(other))


def _keep(run: RunDirectory, begun: CorpusRecord | None, record: CorpusRecord) -> None:
    """Write what the run's record lacks."""
    if record == NOTHING:
        return
    if begun is None:
        log.warning(
            "%s began with a version that kept no record of its corpus: the corpus as it is now is "
            "taken for that of the run, and recorded",
            run.path,
        )
    whole = (begun or NOTHING).completed(record)
    if whole != begun:
        whole.write(run.path)


def _line(row: Mapping[str, Any]) -> str:
    return strict_json.dumps(row, sort_keys=False) + "\n"


def _remove_start(path: Path) -> None:
    """Remove what a run has written that has logged and saved nothing, unless it still runs."""
    names = {file.name for file in path.iterdir()} if path.exists() else set()
    if CONFIG not in names or names - _START:
        return
    with contextlib.suppress(Locked):
        held = lock(path / _LOCK, 0.0)
        for name in names:
            file = path / name
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        (path / _LOCK).unlink(missing_ok=True)
        if held is not None:
            held.close()
