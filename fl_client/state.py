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
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from partitions.atomic import replacing
from partitions.errors import ShortwaveError

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

    def load(self, kind: str, number: int) -> "Stored":
        """Tensors of a round, read when they are asked for.

        Raises:
            StateLost: they are not there, or broken.
        """
        path = self._path(kind, number)
        try:
            return Stored(path)
        except (OSError, SafetensorError) as error:
            raise StateLost(f"{kind} of round {number + 1} cannot be read: {error}") from None

    def save(self, kind: str, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors of a round, and remove all rounds before the last one.

        Raises:
            OSError: such as a full disk; what was there stays.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._path(kind, number)) as path:
            save_file(dict(tensors), path)
        for old in self.rounds(kind)[:-2]:
            self._path(kind, old).unlink(missing_ok=True)

    def rounds(self, kind: str) -> list[int]:
        """Rounds of which there are tensors, in order."""
        found = self.folder.glob(f"{kind}-*.safetensors")
        return sorted(int(path.stem.rpartition("-")[2]) for path in found)


class Stored(Mapping[str, Tensor]):
    """Tensors in a file, mapped into memory and not read before they are asked for."""

    def __init__(self, path: Path) -> None:
        """Open a file of safetensors."""
        self._file = safe_open(path, framework="pt")
        self._names = tuple(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor."""
        if name not in self._names:
            raise KeyError(name)
        value: Tensor = self._file.get_tensor(name)
        return value

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self._names)

    def __len__(self) -> int:
        """How many tensors."""
        return len(self._names)
