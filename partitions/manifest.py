"""Manifests: the file positions and the speaker of every training sequence."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from common.atomic import write_text
from common.errors import DataError
from partitions.sampling import SAMPLE_RATE
from partitions.skips import describe_skips

FORMAT_VERSION = 1
"""Written in the first line of every manifest; other versions are refused.

Raise it when the format changes, or when recutting changes, which makes cached manifests stale.
"""

_TITLE = "# shortwave manifest"
_NUMBER = re.compile(r"[0-9]{1,15}")
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")
_LENGTHS_A_LINE = 16


@dataclass(frozen=True, slots=True)
class Piece:
    """A span of one audio file."""

    path: str
    """Posix path of the file, relative to the corpus root."""
    start: int
    """First sample at 16 kHz, counted from the start of the file."""
    samples: int
    """Number of samples at 16 kHz."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """A recut sequence: joined pieces of one speaker's utterances."""

    speaker: str
    pieces: tuple[Piece, ...]

    @property
    def samples(self) -> int:
        """Length in samples at 16 kHz."""
        return sum(piece.samples for piece in self.pieces)


@dataclass(frozen=True)
class Manifest:
    """A corpus recut to one nominal length; positions are in samples at 16 kHz."""

    root: Path
    """The folder with the subsets."""
    length: float
    """Nominal length in seconds, which is the minimum of every sequence."""
    sequences: tuple[Sequence, ...]
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
    utterance_lengths: tuple[int, ...] = ()
    """Lengths of the utterances before recutting, in samples."""
    files: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Content of every file that was scanned, by path (`fingerprints`); not written."""

    @cached_property
    def speaker_samples(self) -> dict[str, int]:
        """Samples in the sequences of each speaker; speakers are sorted."""
        samples: dict[str, int] = {}
        for sequence in self.sequences:
            samples[sequence.speaker] = samples.get(sequence.speaker, 0) + sequence.samples
        return {speaker: samples[speaker] for speaker in sorted(samples, key=natural_order)}

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
    if _FORBIDDEN.search(path):
        return "a path with a control character, a backslash or a byte that is not UTF-8"
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        return f"an absolute path '{path}' (paths are relative to the corpus root)"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return f"a path '{path}' with an empty part, '.' or '..'"
    return None


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest as text, atomically.

    Header lines start with `#`; then follows one tab-separated line for each sequence:
    `speaker path start samples [path start samples ...]`.

    Raises:
        DataError: a name with a character that the format does not allow, such as a tab.
        OSError: the disk is full or the folder cannot be written.
    """
    root = str(manifest.root.resolve())
    for name in (root, *manifest.speakers):
        if not name or _FORBIDDEN.search(name):
            raise DataError(f"cannot write {path}: {name!r} has a character a manifest cannot hold")
    lines = [
        f"{_TITLE}\t{FORMAT_VERSION}",
        f"# sample rate\t{SAMPLE_RATE}",
        f"# length\t{manifest.length!r}",
        f"# root\t{root}",
        f"# sequences\t{len(manifest.sequences)}",
        f"# total samples\t{manifest.total_samples}",
        f"# remainder samples\t{manifest.remainder_samples}",
        f"# remainder speakers\t{manifest.remainder_speakers}",
    ]
    for reason, count in manifest.skips.items():
        examples = manifest.skipped_examples.get(reason, ())
        lines.append("\t".join(["# skipped", reason, str(count), *examples]))
    lengths = manifest.utterance_lengths
    for first in range(0, len(lengths), _LENGTHS_A_LINE):
        chosen = lengths[first : first + _LENGTHS_A_LINE]
        lines.append("\t".join(["# utterance samples", *map(str, chosen)]))
    for sequence in manifest.sequences:
        columns = [sequence.speaker]
        for piece in sequence.pieces:
            problem = path_problem(piece.path)
            if problem:
                raise DataError(f"cannot write {path}: {problem}; rename that file")
            columns += [piece.path, str(piece.start), str(piece.samples)]
        lines.append("\t".join(columns))
    write_text(path, "\n".join(lines) + "\n")


def read_manifest(path: Path, root: Path | None = None) -> Manifest:
    """Read a manifest; `root` replaces the corpus root written in it.

    Raises:
        DataError: the file is missing, not UTF-8, not a manifest, of another version, truncated or
            empty, or a line has an unsafe path, an invalid number or a missing column; the message
            names the file and the line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read manifest {path}: {error.strerror}") from None
    try:
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{number}: not UTF-8 text; write the manifest again") from None
    reader = _Reader(path)
    for number, line in enumerate(lines, start=1):
        if line:
            reader.take(number, line)
    return reader.finish(root)


class _Reader:
    """Parses a manifest line by line; errors name the current line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0
        self.header: dict[str, str] = {}
        self.skips: dict[str, int] = {}
        self.examples: dict[str, tuple[str, ...]] = {}
        self.lengths: list[int] = []
        self.sequences: list[Sequence] = []

    def fail(self, what: str) -> DataError:
        return DataError(f"{self.path}:{self.number}: {what}; write the manifest again")

    def take(self, number: int, line: str) -> None:
        self.number = number
        if _TITLE[2:] not in self.header:
            if line.split("\t")[0] != _TITLE:
                raise self.fail(f"not a manifest (the first line must start with '{_TITLE}')")
            self.header[_TITLE[2:]] = line.partition("\t")[2]
            if self.header[_TITLE[2:]] != str(FORMAT_VERSION):
                raise self.fail(f"a manifest of another version than {FORMAT_VERSION}")
        elif line.startswith("#"):
            self.take_header(line)
        else:
            self.sequences.append(self.sequence(line))

    def take_header(self, line: str) -> None:
        key, *values = line.lstrip("# ").split("\t")
        if key == "skipped":
            if len(values) < 2:
                raise self.fail("'skipped' needs a reason and a count")
            self.skips[values[0]] = self.integer(values[1], "count", least=1)
            if values[2:]:
                self.examples[values[0]] = tuple(values[2:])
        elif key == "utterance samples":
            self.lengths += [self.integer(value, "length", least=1) for value in values]
        elif values:
            self.header[key] = values[0]

    def sequence(self, line: str) -> Sequence:
        speaker, *columns = line.split("\t")
        if not speaker or _FORBIDDEN.search(speaker):
            raise self.fail("no speaker in the first column")
        if not columns or len(columns) % 3:
            raise self.fail(
                "missing columns: a speaker, then path, start and samples of each piece"
            )
        pieces = []
        for path, start, samples in zip(columns[::3], columns[1::3], columns[2::3], strict=True):
            problem = path_problem(path)
            if problem:
                raise self.fail(problem)
            first = self.integer(start, "start", least=0)
            pieces.append(Piece(path, first, self.integer(samples, "samples", least=1)))
        return Sequence(speaker, tuple(pieces))

    def integer(self, text: str, name: str, least: int) -> int:
        if not _NUMBER.fullmatch(text) or int(text) < least:
            raise self.fail(f"{name} is '{text}', not a whole number from {least}")
        return int(text)

    def finish(self, root: Path | None) -> Manifest:
        if not self.sequences:
            raise DataError(f"{self.path}: an empty manifest, without sequences; recut the corpus")
        self.number = 1
        counts = {
            key: self.integer(self.header.get(key, ""), f"header '{key}'", least=0)
            for key in (
                "sample rate",
                "sequences",
                "total samples",
                "remainder samples",
                "remainder speakers",
            )
        }
        if counts["sample rate"] != SAMPLE_RATE:
            raise self.fail(f"positions at {counts['sample rate']} Hz, not {SAMPLE_RATE}")
        if counts["sequences"] != len(self.sequences):
            found = len(self.sequences)
            raise self.fail(f"truncated: {found} sequences of {counts['sequences']}")
        try:
            length = float(self.header.get("length", ""))
        except ValueError:
            length = 0.0
        if not 0 < length < float("inf"):
            raise self.fail("no header 'length' in seconds")
        if root is None and not self.header.get("root"):
            raise self.fail("no header 'root', the folder with the subsets")
        return Manifest(
            root=root if root is not None else Path(self.header["root"]),
            length=length,
            sequences=tuple(self.sequences),
            total_samples=counts["total samples"],
            remainder_samples=counts["remainder samples"],
            remainder_speakers=counts["remainder speakers"],
            skips=self.skips,
            skipped_examples=self.examples,
            utterance_lengths=tuple(self.lengths),
        )
