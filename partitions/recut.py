"""Recuts a corpus to a nominal length by joining and cutting each speaker's utterances."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from common.errors import DataError, UsageError
from common.units import format_length
from partitions.columns import Integers, Names, compact
from partitions.librispeech import Corpus, Recordings
from partitions.manifest import Manifest, natural_order
from partitions.sampling import SAMPLE_RATE
from partitions.sequences import Sequences, sequences_of_columns

PAPER_MEANS = {1.0: 1.1, 5.0: 5.2, 10.0: 10.4, 15.0: 15.8}
"""Mean seconds of the paper's four data sets by nominal length (section 3.1)."""

TOO_SHORT = "speaker shorter than the length"
"""Reason for skipping speakers with too little audio for one sequence."""

_EXAMPLES = 3
_COLUMNS = ("speaker", "samples", "ends", "file", "start", "size")


@dataclass(frozen=True)
class Band:
    """Allowed sequence lengths of a set and their target mean, in seconds."""

    minimum: float
    mean: float
    maximum: float


def band(length: float) -> Band:
    """The band of sequence lengths for a nominal length in seconds.

    The means for the paper's four lengths are the paper's (section 3.1); the others follow the same
    trend. No sequence is shorter than the nominal length, so that a crop of that length always
    fits. The spread is at most a second, as in the paper.

    Raises:
        UsageError: the length is not above zero.
    """
    if not 0 < length < math.inf:
        raise UsageError(f"a length of {length} s holds no audio: it must be above zero")
    mean = PAPER_MEANS.get(length, length + min(0.8, max(0.1, 0.04 * length)))
    half = min(mean - length, 0.5)
    return Band(mean - half, mean, mean + half)


def recut(corpus: Corpus, length: float) -> Manifest:
    """Join each speaker's utterances into one stream and cut it into sequences.

    A stream is cut without remainder into nearly equal sequences whose length is closest to the
    band's mean. If no such cut is within the band, the stream gives as many sequences as fit, and
    the rest is its remainder. The sequences of all these streams have one common length, chosen so
    that the mean of the whole set is the band's. Sequences and remainders add up to the corpus.

    Args:
        corpus: the utterances.
        length: nominal length in seconds.

    Raises:
        DataError: no speaker has enough audio for one sequence.
        UsageError: the length is not above zero.
    """
    return cut_recordings(corpus.recordings(), length)


def cut_recordings(recordings: Recordings, length: float) -> Manifest:
    """`recut` of recordings in columns."""
    limits = band(length)
    speakers = sorted(recordings.speakers, key=natural_order)
    samples = recordings.samples
    order = np.argsort(recordings.speaker, kind="stable")
    counts = np.bincount(recordings.speaker, minlength=len(recordings.speakers))
    owned = np.split(order, np.cumsum(counts)[:-1])
    files = dict(zip(recordings.speakers, owned, strict=True))
    available = {name: int(samples[files[name]].sum(dtype=np.int64)) for name in speakers}
    cuts = cut(available, limits)
    if not any(each.sequences for each in cuts.values()):
        longest = max(available.values(), default=0) / SAMPLE_RATE
        raise DataError(
            f"no speaker in {recordings.root} has {format_length(round(limits.minimum, 4))} of "
            f"audio for one sequence: the longest has {longest:.1f} s; choose a shorter --length"
        )
    remainders = [available[speaker] - cuts[speaker].samples for speaker in speakers]
    short = [speaker for speaker in speakers if not cuts[speaker].sequences]
    skips, examples = dict(recordings.skips), dict(recordings.skipped_examples)
    if short:
        skips[TOO_SHORT] = len(short)
        examples[TOO_SHORT] = tuple(short[:_EXAMPLES])
    joined = _Joined(np.dtype(np.uint64 if int(samples.max()) >> 32 else np.uint32))
    for speaker in speakers:
        if cuts[speaker].sequences:
            joined.add(speaker, files[speaker], samples[files[speaker]], cuts[speaker])
    return Manifest(
        root=recordings.root,
        length=float(length),
        sequences=joined.finish(recordings.paths),
        total_samples=sum(available.values()),
        remainder_samples=sum(remainders),
        remainder_speakers=sum(remainder > 0 for remainder in remainders),
        skips=skips,
        skipped_examples=examples,
        utterance_lengths=compact(samples),
    )


class Cut(NamedTuple):
    """How a stream is cut: `longer` sequences of `size + 1` samples, then the others of `size`."""

    sequences: int
    size: int = 0
    longer: int = 0

    @property
    def samples(self) -> int:
        """Samples in all sequences."""
        return self.sequences * self.size + self.longer


def cut(available: Mapping[str, int], limits: Band) -> dict[str, Cut]:
    """Lengths of the sequences to cut from each speaker's stream.

    Args:
        available: length of each speaker's stream in samples at 16 kHz.
        limits: the allowed lengths in seconds.

    Returns:
        For each speaker, how many sequences and of which lengths.
    """
    least = math.ceil(limits.minimum * SAMPLE_RATE - 1e-6)
    most = math.floor(limits.maximum * SAMPLE_RATE + 1e-6)
    mean = limits.mean * SAMPLE_RATE
    cuts: dict[str, Cut] = {}
    partial: dict[str, int] = {}
    for speaker, stream in available.items():
        lowest, highest = max(1, -(-stream // most)), stream // least
        if lowest <= highest:
            below = min(max(int(stream / mean), lowest), highest)
            above = min(below + 1, highest)
            count = min((below, above), key=lambda count: abs(stream / count - mean))
            size, longer = divmod(stream, count)
            cuts[speaker] = Cut(count, size, longer)
        else:
            partial[speaker] = highest
    count = sum(partial.values())
    if count:
        whole, samples = (
            sum(e.sequences for e in cuts.values()),
            sum(e.samples for e in cuts.values()),
        )
        common = round((mean * (whole + count) - samples) / count)
        common = min(max(common, least), most)
        cuts.update({speaker: Cut(highest, common) for speaker, highest in partial.items()})
    return {speaker: cuts.get(speaker, Cut(0)) for speaker in available}


class _Joined:
    """The sequences of one speaker after another, cut across the boundaries of files."""

    def __init__(self, kind: np.dtype[Any]) -> None:
        """Begin with none; `kind` holds a position in the longest file."""
        self.kind = kind
        self.speakers: list[str] = []
        self.used: list[Integers] = []
        """Files in the order in which they come, with indices into the recordings."""
        self.files = 0
        self.pieces = 0
        self.columns = {name: bytearray() for name in _COLUMNS}

    def add(self, speaker: str, files: Integers, samples: Integers, how: Cut) -> None:
        """Cut the stream of a speaker.

        Args:
            speaker: the name.
            files: `[file]`, indices into the recordings.
            samples: `[file]`, length of each.
            how: the stream is cut.
        """
        sizes = np.full(how.sequences, how.size, np.int64)
        sizes[: how.longer] += 1
        ends, file_ends = np.cumsum(sizes), np.cumsum(samples, dtype=np.int64)
        inner = file_ends[file_ends < ends[-1]]
        # Pieces lie between neighbouring bounds, of sequences or of files.
        bounds = np.union1d(ends, inner)
        starts = np.concatenate(([0], bounds[:-1]))
        file = np.searchsorted(file_ends, starts, side="right")
        used = int(file[-1]) + 1
        self._append("file", file + self.files)
        self._append("start", starts - (file_ends - samples)[file])
        self._append("size", bounds - starts)
        self._append("speaker", np.full(how.sequences, len(self.speakers)))
        self._append("samples", sizes)
        self._append("ends", np.searchsorted(bounds, ends) + 1 + self.pieces)
        self.speakers.append(speaker)
        self.used.append(files[:used])
        self.files += used
        self.pieces += len(bounds)

    def _append(self, name: str, values: npt.NDArray[np.int64]) -> None:
        self.columns[name] += values.astype(self.kind).tobytes()

    def finish(self, paths: Names) -> Sequences:
        """All sequences; `paths` are those of the recordings."""
        arrays = {name: compact(np.frombuffer(each, self.kind)) for name, each in self._emptied()}
        names = list(paths)
        used = Names.of(names[index] for files in self.used for index in files.tolist())
        return sequences_of_columns(Names.of(self.speakers), used, **arrays)

    def _emptied(self) -> Iterator[tuple[str, bytearray]]:
        """Columns by name, each forgotten when the next is taken."""
        while self.columns:
            yield self.columns.popitem()
