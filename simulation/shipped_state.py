"""The files that a client keeps between rounds, sent to a worker on another machine and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from common.atomic import replacing

Files = dict[str, npt.NDArray[np.uint8]]
"""Content `[byte]` of each file by its path below the folder of all clients' state."""


class StateChange(NamedTuple):
    """What an answer has changed."""

    written: Files
    kept: frozenset[str]
    """Paths of all files that there are now."""


def read_state(folder: Path, key: int) -> Files:
    """The files of client number `key`, from the `folder` of all clients' state."""
    return {
        str(path.relative_to(folder)): np.fromfile(path, np.uint8)
        for path in sorted(folder.glob(f"*/{key}/*"))
        if path.is_file() and not path.name.startswith(".")
    }


def unpack_state(files: Mapping[str, npt.NDArray[np.uint8]], folder: Path) -> None:
    """Write files, each of content `[byte]`, below an empty folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content.tofile(path)


def changed_state(
    before: Mapping[str, npt.NDArray[np.uint8]], folder: Path, key: int
) -> StateChange:
    """What has changed of the files that `unpack_state` wrote.

    Args:
        before: the files written, each of content `[byte]`.
        folder: where they were written.
        key: the client's number.
    """
    after = read_state(folder, key)
    written = {
        name: content
        for name, content in after.items()
        if name not in before or not np.array_equal(content, before[name])
    }
    return StateChange(written, frozenset(after))


def apply_change(change: StateChange, folder: Path, key: int) -> None:
    """Bring the files of client number `key` in `folder` up to date; each is replaced whole.

    Args:
        change: of the client's files.
        folder: of all clients' state.
        key: the client's number.

    Raises:
        OSError: the disk is full, for example.
    """
    for name, content in change.written.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder / name, sync=False) as path:
            content.tofile(path)
    for name in read_state(folder, key).keys() - change.kept:
        (folder / name).unlink(missing_ok=True)
