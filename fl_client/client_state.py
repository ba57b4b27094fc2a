"""What a client keeps on disk between rounds, each of which runs in a new process.

Each run and client has a folder of files named by round: `weights-00003.safetensors`, the global
weights as received, to which the next round's difference is added; `residual-00003.safetensors`,
the encoding error of that round's update; `optimizer-00003.safetensors`, the optimizer state if the
run keeps it; and `personal-00003.safetensors`, the personal part of a task's model. `split.json`
has how the client divided its data when the run began, for its data may change. Each file is
written under a temporary name and renamed, so a client that is killed finds the round before. The
position in the data follows from the global update number and is not stored.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.atomic import replacing, write_text
from common.errors import DataError, ShortwaveError

if TYPE_CHECKING:  # a device describes itself without PyTorch
    from torch import Tensor

    from ssl_core.training.tensor_file import TensorFile

log = logging.getLogger("shortwave.client")
OPTIMIZER = "optimizer"
"""Kind of the files with the optimizer state."""
_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")


class StateLost(ShortwaveError):
    """The server relies on state that this client no longer has."""


class ClientState:
    """The files of one client in one run."""

    def __init__(self, root: Path, run: str, key: int) -> None:
        """Name the folder, which the first `save` creates.

        Args:
            root: folder of all runs and clients.
            run: identity of the run, from the server.
            key: the client's number.

        Raises:
            StateLost: the run's identity is not a valid name.
        """
        if not _NAME.fullmatch(run) or run.startswith("."):
            raise StateLost(f"'{run[:40]}' is not the name of a run")
        self.folder = root / run / str(key)
        for path in self.folder.glob("moments-*.safetensors"):  # the name in version 0.1
            path.rename(path.with_name(path.name.replace("moments", OPTIMIZER, 1)))

    def _path(self, kind: str, number: int) -> Path:
        return self.folder / f"{kind}-{number:05d}.safetensors"

    def load(self, kind: str, number: int) -> "TensorFile":
        """Tensors of a round by name, each `[...]`, read on access.

        Args:
            kind: `weights`, `residual`, `optimizer` or `personal`.
            number: round, from 0.

        Raises:
            StateLost: the file is missing or broken.
        """
        from ssl_core.training.tensor_file import TensorFile

        path = self._path(kind, number)
        try:
            return TensorFile(path)
        except (OSError, DataError) as error:
            raise StateLost(f"{kind} of round {number + 1} cannot be read: {error}") from None

    def save(
        self, kind: str, number: int, tensors: "Mapping[str, Tensor]", needed: int = -1
    ) -> None:
        """Write tensors of a round; of earlier rounds only the last and `needed` are kept.

        Args:
            kind: as in `load`.
            number: round, from 0.
            tensors: by name, each `[...]`.
            needed: an earlier round to keep; -1 for none.

        Raises:
            OSError: the disk is full, for example; earlier files stay as they were.
        """
        from ssl_core.training.tensor_file import write_tensors

        self.folder.mkdir(parents=True, exist_ok=True)
        # No fsync: a file cut short by a power loss is detected, and the server resends everything.
        with replacing(self._path(kind, number), sync=False) as path:
            write_tensors(path, tensors)
        for old in self.rounds(kind)[:-2]:
            if old != needed:
                self._path(kind, old).unlink(missing_ok=True)

    def begun(self, name: str, now: Sequence[str]) -> tuple[str, ...]:
        """Names of a part of the client's data as they were when the run began.

        Args:
            name: of the part, such as `held out`.
            now: names that are stored if the client has taken no round yet.

        Raises:
            DataError: the stored names are damaged.
        """
        path = self.folder / "split.json"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if name in stored:
                return tuple(map(str, stored[name]))
        except FileNotFoundError:
            stored = {}
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"{path} cannot be read ({error}): put it back, or delete {self.folder} to begin "
                "anew with the data as they are"
            ) from None
        try:
            write_text(path, json.dumps(stored | {name: list(now)}) + "\n")
        except OSError as error:
            log.warning("%s cannot be written (%s): a change would not be noticed", path, error)
        return tuple(now)

    def rounds(self, kind: str) -> list[int]:
        """Rounds with a file of this kind, in order."""
        found = self.folder.glob(f"{kind}-*.safetensors")
        return sorted(int(path.stem.rpartition("-")[2]) for path in found)
