"""Manifests: the file positions and the speaker of every training sequence."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from common.errors import DataError
from partitions.columns import Columns, Integers, compact
from partitions.sampling import SAMPLE_RATE
from partitions.sequences import Piece, Sequence, Sequences
from partitions.skips import describe_skips

__all__ = ["Manifest", "Piece", "Sequence", "Sequences", "natural_order", "path_problem"]

FORMAT_VERSION = 1
"""Written in the first line of every manifest; other versions are refused.

Raise it when the format changes, or when recutting changes, which makes cached manifests stale.
"""

FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")
"""Characters that no name in a manifest has."""

_COUNTS = ("total_samples", "remainder_samples", "remainder_speakers")


@dataclass(frozen=True, eq=False)
class Manifest:
    """A corpus recut to one nominal length; positions are in samples at 16 kHz."""

    root: Path
    """The folder with the subsets."""
    length: float
    """Nominal length in seconds, which is the minimum of every sequence."""
    sequences: Sequences
    """The sequences, grouped by speaker."""
    total_samples: int
    """Samples before recutting: all sequences and the remainder."""
    remainder_samples: int = 0
    """Samples in no sequence: too few to fill another one."""
    remainder_speakers: int = 0
    """Speakers with a remainder."""
    skips: Mapping[str, int] = field(default_factory=dict)
    """Number of skipped files and speakers by reason."""
    skipped_examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The first few skipped paths or speakers by reason."""
    utterance_lengths: Integers = field(default_factory=lambda: compact(()))
    """Lengths of the utterances before recutting, in samples, `[utterance]`."""
    files: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Content of every file that was scanned, by path (`fingerprints`); not written."""

    @cached_property
    def speaker_samples(self) -> dict[str, int]:
        """Samples in the sequences of each speaker; speakers are sorted."""
        sums = self.sequences.samples_by_speaker().tolist()
        samples = dict(zip(self.sequences.speakers, sums, strict=True))
        return {speaker: samples[speaker] for speaker in sorted(samples, key=natural_order)}

    @property
    def digest(self) -> str:
        """Digest of all but the corpus root and the files' content."""
        return self.columns().digest

    def __eq__(self, other: object) -> bool:
        """Whether root, sequences and counts are the same; the files' content is not compared."""
        return isinstance(other, Manifest) and (self.root, self.digest) == (
            other.root,
            other.digest,
        )

    __hash__ = None  # type: ignore[assignment]

    def columns(self) -> Columns:
        """The manifest in columns, without root and files."""
        header = {
            "format": FORMAT_VERSION,
            "length": self.length,
            **{name: getattr(self, name) for name in _COUNTS},
            "skips": [[reason, count] for reason, count in self.skips.items()],
            "skipped examples": {
                reason: list(each)
                for reason, each in self.skipped_examples.items()
                if reason in self.skips
            },
        }
        lengths = {"utterances": compact(self.utterance_lengths)}
        return Columns(header, self.sequences.arrays() | lengths)

    @classmethod
    def of(cls, columns: Columns, root: Path) -> "Manifest":
        """The manifest with these columns, of a corpus in `root`.

        Raises:
            DataError: columns of something else or of another version.
        """
        header = columns.header
        if header.get("format") != FORMAT_VERSION:
            raise DataError(f"{columns.path}: not a manifest of version {FORMAT_VERSION}")
        return cls(
            root=root,
            length=header["length"],
            sequences=Sequences(columns),
            **{name: header[name] for name in _COUNTS},
            skips=dict(header["skips"]),
            skipped_examples={r: tuple(each) for r, each in header["skipped examples"].items()},
            utterance_lengths=columns["utterances"],
        )

    @property
    def speakers(self) -> tuple[str, ...]:
        """Speakers with at least one sequence, sorted."""
        return tuple(self.speaker_samples)

    @property
    def samples(self) -> int:
        """Samples in all sequences."""
        return sum(self.speaker_samples.values())

    @property
    def seconds(self) -> float:
        """Seconds of audio in all sequences."""
        return self.samples / SAMPLE_RATE

    @property
    def remainder_seconds(self) -> float:
        """Seconds of audio in no sequence."""
        return self.remainder_samples / SAMPLE_RATE

    def describe_skips(self) -> list[str]:
        """One line for each reason, with the count and the first few skipped examples."""
        return describe_skips(self.skips, self.skipped_examples)


def natural_order(name: str) -> tuple[int, int, str]:
    """Sorting key: numbers by value, then other names alphabetically."""
    if name.isascii() and name.isdigit():
        return (0, int(name), name)
    return (1, 0, name)


def path_problem(path: str) -> str | None:
    """Why a path is not a safe relative posix path, or None if it is."""
    if not path:
        return "an empty path"
    if FORBIDDEN.search(path):
        return "a path with a control character, a backslash or a byte that is not UTF-8"
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        return f"an absolute path '{path}' (paths are relative to the corpus root)"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return f"a path '{path}' with an empty part, '.' or '..'"
    return None
