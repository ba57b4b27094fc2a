"""Atomic replacement of files and directories: write to a temporary name, flush, then rename."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def sync_path(path: Path) -> None:
    """Flush a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically.

    Raises:
        OSError: the disk is full or the directory cannot be written; the old file is kept.
    """
    with replacing(path) as partial, open(partial, "w", encoding="utf-8") as stream:
        stream.write(text)


@contextlib.contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yield an empty temporary file beside `path`; rename it to `path` on success, else delete it.

    Without `sync` the file survives a crash of the process, but a power loss may truncate it.

    Raises:
        OSError: the disk is full or the directory cannot be written; the old file is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    try:
        yield Path(name)
        if sync:
            sync_path(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    if sync:
        sync_path(path.parent)


@contextlib.contextmanager
def directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary directory; rename it to `path` on success, else delete it.

    An existing directory is replaced only once the new one is complete.

    Raises:
        OSError: the disk is full or the parent cannot be written; the old directory is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
    try:
        os.chmod(partial, 0o755)
        yield partial
        for file in partial.rglob("*"):
            sync_path(file)
        sync_path(partial)
        if path.exists():
            old = partial.with_suffix(".old")
            os.rename(path, old)
            os.rename(partial, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_path(path.parent)
