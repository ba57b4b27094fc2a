"""Labelled clips, on which downstream tasks are trained and tested."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from partitions.manifest import Piece
from partitions.skips import describe_skips


@dataclass(frozen=True, slots=True)
class Clip:
    """Part of an audio file with its label or text."""

    piece: Piece
    speaker: str = ""
    """Empty if the corpus does not name speakers."""
    label: str = ""
    """Class, for classification."""
    text: str = ""
    """Transcript, for transcription."""

    @property
    def name(self) -> str:
        """Path, with `@` and the first sample if that is not 0."""
        at = f"@{self.piece.start}" if self.piece.start else ""
        return self.piece.path + at


@dataclass(frozen=True, slots=True)
class Trial:
    """A pair of files, and whether they are of the same speaker."""

    same: bool
    first: str
    """Path relative to the corpus root."""
    second: str


@dataclass(frozen=True)
class TaskData:
    """Clips and labels of a task."""

    root: Path
    """Corpus root, to which paths of clips are relative."""
    train: tuple[Clip, ...]
    valid: tuple[Clip, ...]
    test: tuple[Clip, ...]
    labels: tuple[str, ...]
    """Classes in a fixed order, or symbols without the blank for transcription."""
    trials: tuple[Trial, ...] = ()
    """Of verification; `test` has every file of the trials once."""
    skips: Mapping[str, int] = field(default_factory=dict)
    """Number of skipped files by reason."""
    skipped_examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The first few skipped paths by reason."""

    def describe_skips(self) -> list[str]:
        """One line per reason for skipping, with the first few paths."""
        return describe_skips(self.skips, self.skipped_examples)
