"""Labelled clips: what a downstream task trains and is tested on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from partitions.manifest import Piece
from partitions.skips import describe_skips


@dataclass(frozen=True, slots=True)
class Clip:
    """A stretch of a file with what is to be found in it."""

    piece: Piece
    speaker: str = ""
    """Whose voice it is, where the corpus says so."""
    label: str = ""
    """The class, of tasks that classify."""
    text: str = ""
    """The symbols to be written, of tasks that transcribe."""

    @property
    def name(self) -> str:
        """Path, and where in the file it starts if that is not its beginning."""
        at = f"@{self.piece.start}" if self.piece.start else ""
        return self.piece.path + at


@dataclass(frozen=True, slots=True)
class Trial:
    """Two files, and whether the same person speaks in both."""

    same: bool
    first: str
    """Path relative to the corpus root."""
    second: str


@dataclass(frozen=True)
class TaskData:
    """A corpus as a task sees it."""

    root: Path
    """Paths of clips are relative to it."""
    train: tuple[Clip, ...]
    valid: tuple[Clip, ...]
    test: tuple[Clip, ...]
    labels: tuple[str, ...]
    """Classes in a fixed order; of tasks that transcribe, the symbols without the blank."""
    trials: tuple[Trial, ...] = ()
    """Of verification; `test` holds every file they name, once."""
    skips: Mapping[str, int] = field(default_factory=dict)
    """Files left out, counted by reason."""
    skipped_examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def describe_skips(self) -> list[str]:
        """One line for each reason something was left out, with the first few paths."""
        return describe_skips(self.skips, self.skipped_examples)
