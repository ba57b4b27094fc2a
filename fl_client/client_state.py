"""What a client keeps on disk between rounds: a new process takes every one of them.

A folder for each run and client holds files named by round, `weights-00003.safetensors`: the global
weights as they were received, to which the next round's difference is added, and
`residual-00003.safetensors`, what the encoding of that round's update left out, and
`moments-00003.safetensors`, the optimiser's state where it is kept. Each is written under another
name and renamed; a client that is killed finds the round before. Where a client is in its data
follows from the global update number, so that is kept nowhere.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from common.atomic import replacing
from common.errors import DataError, ShortwaveError
from ssl_core.training.tensor_file import TensorFile, write_tensors

_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")


class StateLost(ShortwaveError):
    """The server counts on what this client no longer has."""


def default_folder() -> Path:
    """Where clients keep their state when they are not told."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "shortwave"


class ClientState:
    """The files of one client in one run."""

    def __init__(self, root: Path, run: str, key: int) -> None:
        """`run`: identity of the run, as the server gives it; `key`: the client's number."""
        if not _NAME.fullmatch(run) or run.startswith("."):
            raise StateLost(f"'{run[:40]}' is not the name of a run")
        self.folder = root / run / str(key)

    def _path(self, kind: str, number: int) -> Path:
        return self.folder / f"{kind}-{number:05d}.safetensors"

    def load(self, kind: str, number: int) -> TensorFile:
        """Tensors of a round, read when they are asked for.

        Raises:
            StateLost: they are not there, or broken.
        """
        path = self._path(kind, number)
        try:
            return TensorFile(path)
        except (OSError, DataError) as error:
            raise StateLost(f"{kind} of round {number + 1} cannot be read: {error}") from None

    def save(self, kind: str, number: int, tensors: Mapping[str, Tensor], needed: int = -1) -> None:
        """Write tensors of a round; of earlier ones only the last and round `needed` stay.

        Raises:
            OSError: such as a full disk; what was there stays.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        # Cut short by a loss of power, it is found to be broken, and the server sends all again.
        with replacing(self._path(kind, number), sync=False) as path:
            write_tensors(path, tensors)
        for old in self.rounds(kind)[:-2]:
            if old != needed:
                self._path(kind, old).unlink(missing_ok=True)

    def rounds(self, kind: str) -> list[int]:
        """Rounds of which there are tensors, in order."""
        found = self.folder.glob(f"{kind}-*.safetensors")
        return sorted(int(path.stem.rpartition("-")[2]) for path in found)
