"""The sequences of a manifest in columns: which pieces of which files, and whose voice."""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from partitions.columns import Column, Columns, Integers, Names, chunks, compact, with_names

Indices = npt.NDArray[np.int32]
"""Of sequences in a manifest, `[sequence]`."""


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


_ARRAYS = ("speaker", "samples", "ends", "file", "start", "size")
_TABLES = ("speaker text", "speaker ends", "path text", "path ends")


class Sequences:
    """Sequences as columns; `sequences[i]` makes the object of one.

    Attributes:
        speakers: names of the speakers, in the order in which they come.
        paths: of the files, in the order in which they come.
        speaker: of each sequence, index into `speakers`, `[sequence]`.
        samples: length of each sequence at 16 kHz, `[sequence]`.
    """

    def __init__(self, columns: Columns) -> None:
        """Take the columns that `SequenceList` made."""
        self.columns = columns
        self.speakers, self.paths = columns.names("speaker"), columns.names("path")
        self.speaker, self.samples = columns["speaker"], columns["samples"]
        self._ends = columns["ends"]
        self._file, self._start, self._size = columns["file"], columns["start"], columns["size"]

    @classmethod
    def of(cls, sequences: Iterable[Sequence]) -> "Sequences":
        """Collect sequences."""
        made = SequenceList()
        for each in sequences:
            for piece in each.pieces:
                made.add_piece(made.path(piece.path), piece.start, piece.samples)
            made.end(made.speaker(each.speaker))
        return made.finish()

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.samples)

    def __getitem__(self, index: int) -> Sequence:
        """A sequence by its index, from 0 on."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        first, last = int(self._ends[index - 1]) if index else 0, int(self._ends[index])
        pieces = tuple(
            Piece(self.paths[int(file)], int(start), int(size))
            for file, start, size in zip(
                self._file[first:last],
                self._start[first:last],
                self._size[first:last],
                strict=True,
            )
        )
        return Sequence(self.speakers[int(self.speaker[index])], pieces)

    def __iter__(self) -> Iterator[Sequence]:
        """The sequences in order."""
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        """Whether the sequences are the same, in the same order."""
        if not isinstance(other, Sequences):
            return NotImplemented
        return Columns({}, self.arrays()).digest == Columns({}, other.arrays()).digest

    def arrays(self) -> dict[str, Column]:
        """All columns by name."""
        return {name: self.columns[name] for name in (*_TABLES, *_ARRAYS)}

    __hash__ = None  # type: ignore[assignment]

    def samples_by_speaker(self) -> npt.NDArray[np.int64]:
        """Samples in the sequences of each speaker, `[speaker]`."""
        return _sums(self.speaker, self.samples, len(self.speakers))

    def samples_by_path(self) -> npt.NDArray[np.int64]:
        """Samples taken of each file, `[file]`."""
        return _sums(self._file, self._size, len(self.paths))

    def rows(self) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
        """Of each sequence the speaker's index and, of each piece, path's index, start, samples."""
        first = 0
        for part in chunks(len(self)):
            speakers, ends = self.speaker[part].tolist(), self._ends[part].tolist()
            every = (self._file, self._start, self._size)
            columns = (each[first : ends[-1]].tolist() for each in every)
            pieces = list(zip(*columns, strict=True))
            done = 0
            for speaker, end in zip(speakers, ends, strict=True):
                yield speaker, pieces[done : end - first]
                done = end - first
            first += done


class SequenceList:
    """Collects sequences into columns."""

    def __init__(self) -> None:
        """Begin with none."""
        self._paths: dict[str, int] = {}
        self._speakers: dict[str, int] = {}
        self._piece_columns = {name: array("q") for name in ("file", "start", "size")}
        self._columns = {name: array("q") for name in ("speaker", "samples", "ends")}
        self._samples = 0

    def path(self, path: str) -> int:
        """Index of a path; new ones are added."""
        return self._paths.setdefault(path, len(self._paths))

    def speaker(self, name: str) -> int:
        """Index of a speaker; new ones are added."""
        return self._speakers.setdefault(name, len(self._speakers))

    def add_piece(self, path: int, start: int, samples: int) -> None:
        """Add a piece to the sequence that `end` ends.

        Args:
            path: index of the file.
            start: first sample.
            samples: number of samples.
        """
        columns = self._piece_columns
        columns["file"].append(path)
        columns["start"].append(start)
        columns["size"].append(samples)
        self._samples += samples

    def end(self, speaker: int) -> None:
        """End a sequence, whose speaker has this index."""
        columns = self._columns
        columns["speaker"].append(speaker)
        columns["samples"].append(self._samples)
        columns["ends"].append(len(self._piece_columns["file"]))
        self._samples = 0

    def __len__(self) -> int:
        """Number of sequences so far."""
        return len(self._columns["ends"])

    def finish(self) -> Sequences:
        """The sequences."""
        columns = self._columns | self._piece_columns
        arrays = {name: np.frombuffer(each, np.int64) for name, each in columns.items()}
        return sequences_of_columns(Names.of(self._speakers), Names.of(self._paths), **arrays)


def sequences_of_columns(speakers: Names, paths: Names, **arrays: Integers) -> Sequences:
    """Sequences from columns: `speaker`, `samples`, `ends`, `file`, `start` and `size`.

    Args:
        speakers: names in the order in which `speaker` has them.
        paths: files in the order in which `file` has them.
        arrays: `[sequence]` index of the speaker, number of samples, and number of pieces up to its
            end; `[piece]` index of the file, first sample and number of samples.
    """
    names = with_names(speaker=speakers, path=paths)
    return Sequences(Columns({}, names | {name: compact(arrays[name]) for name in _ARRAYS}))


def _sums(groups: Integers, values: Integers, count: int) -> npt.NDArray[np.int64]:
    """Sum of the values of each group, `[group]`; exact below 2**53."""
    sums = np.zeros(count, np.int64)
    for part in chunks(len(groups)):
        found = np.bincount(groups[part], values[part], count)
        sums += found.astype(np.int64)
    return sums
