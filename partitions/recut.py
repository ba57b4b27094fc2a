"""Recuts a corpus to a target length by joining and cutting within each speaker, and reports it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from common.errors import DataError, UsageError
from common.units import format_length, format_seconds
from partitions.librispeech import Corpus, Utterance
from partitions.manifest import Manifest, Piece, Sequence
from partitions.sampling import SAMPLE_RATE

PAPER_MEANS = {1.0: 1.1, 5.0: 5.2, 10.0: 10.4, 15.0: 15.8}
"""Mean seconds of the paper's four data sets by their nominal length (section 3.1)."""

TOO_SHORT = "speaker shorter than the length"
"""The reason under which speakers without a single sequence are counted."""

_EXAMPLES = 3


@dataclass(frozen=True)
class Band:
    """Lengths in seconds that the sequences of one set may have, and their target mean."""

    minimum: float
    mean: float
    maximum: float


def band(length: float) -> Band:
    """The lengths of the sequences of a set of nominal length `length`, all in seconds.

    The means of the paper's four sets are its own (section 3.1); others follow the same trend. No
    sequence is shorter than the nominal length, so a crop of that length always fits, and the
    spread is within a second, as in the paper.

    Raises:
        UsageError: a length that is not above zero.
    """
    if not 0 < length < math.inf:
        raise UsageError(f"a length of {length} s holds no audio: it must be above zero")
    mean = PAPER_MEANS.get(length, length + min(0.8, max(0.1, 0.04 * length)))
    half = min(mean - length, 0.5)
    return Band(mean - half, mean, mean + half)


def recut(corpus: Corpus, length: float) -> Manifest:
    """Join each speaker's utterances into one stream and cut it into sequences of one length.

    A stream is cut whole into nearly equal sequences, as many as bring them closest to the band's
    mean. Streams that no number brings inside the band give as many sequences as they can; these
    have one common length, which brings the mean of the whole set to the band's, and the rest of
    such a stream is its remainder. Sequences and remainders together are the whole corpus.

    Raises:
        DataError: no speaker has enough audio for one sequence.
        UsageError: a length that is not above zero.
    """
    limits = band(length)
    streams: dict[str, list[Utterance]] = {}
    for utterance in corpus.utterances:
        streams.setdefault(utterance.speaker, []).append(utterance)
    available = {
        speaker: sum(utterance.samples for utterance in streams[speaker])
        for speaker in corpus.speakers
    }
    sizes = cut(available, limits)
    if not any(sizes.values()):
        longest = max(available.values(), default=0) / SAMPLE_RATE
        raise DataError(
            f"no speaker in {corpus.root} has {format_length(round(limits.minimum, 4))} of audio "
            f"for one sequence: the longest has {longest:.1f} s; choose a shorter --length"
        )
    remainders = [available[speaker] - sum(sizes[speaker]) for speaker in available]
    short = [speaker for speaker in available if not sizes[speaker]]
    skips, examples = dict(corpus.skips), dict(corpus.skipped_examples)
    if short:
        skips[TOO_SHORT] = len(short)
        examples[TOO_SHORT] = tuple(short[:_EXAMPLES])
    return Manifest(
        root=corpus.root,
        length=float(length),
        sequences=tuple(
            Sequence(speaker, pieces)
            for speaker in available
            for pieces in _join(streams[speaker], sizes[speaker])
        ),
        total_samples=sum(available.values()),
        remainder_samples=sum(remainders),
        remainder_speakers=sum(remainder > 0 for remainder in remainders),
        skips=skips,
        skipped_examples=examples,
        utterance_lengths=tuple(utterance.samples for utterance in corpus.utterances),
    )


def cut(available: Mapping[str, int], limits: Band) -> dict[str, list[int]]:
    """Sizes of the sequences cut from each speaker's stream; `available` and sizes in samples."""
    least = math.ceil(limits.minimum * SAMPLE_RATE - 1e-6)
    most = math.floor(limits.maximum * SAMPLE_RATE + 1e-6)
    mean = limits.mean * SAMPLE_RATE
    sizes: dict[str, list[int]] = {}
    partial: dict[str, int] = {}
    for speaker, stream in available.items():
        lowest, highest = max(1, -(-stream // most)), stream // least
        if lowest <= highest:
            below = min(max(int(stream / mean), lowest), highest)
            above = min(below + 1, highest)
            count = min((below, above), key=lambda count: abs(stream / count - mean))
            size, longer = divmod(stream, count)
            sizes[speaker] = [size + 1] * longer + [size] * (count - longer)
        else:
            partial[speaker] = highest
    whole = [size for stream in sizes.values() for size in stream]
    count = sum(partial.values())
    if count:
        common = round((mean * (len(whole) + count) - sum(whole)) / count)
        common = min(max(common, least), most)
        sizes.update({speaker: [common] * highest for speaker, highest in partial.items()})
    return {speaker: sizes.get(speaker, []) for speaker in available}


def _join(stream: list[Utterance], sizes: list[int]) -> Iterator[tuple[Piece, ...]]:
    """Pieces of each sequence, following the stream across the utterances' borders."""
    source = iter(stream)
    utterance = next(source)
    start = 0
    for size in sizes:
        pieces = []
        missing = size
        while missing:
            if start == utterance.samples:
                utterance = next(source)
                start = 0
            taken = min(missing, utterance.samples - start)
            pieces.append(Piece(utterance.path, start, taken))
            start += taken
            missing -= taken
        yield tuple(pieces)


@dataclass(frozen=True)
class Summary:
    """What one recut set holds; lengths in seconds."""

    length: float
    sequences: int
    speakers: int
    hours: float
    mean: float
    minimum: float
    maximum: float
    remainder_seconds: float
    remainder_speakers: int
    remainder_share: float
    """Share of all audio that is in no sequence, from 0 to 1."""


def summary(manifest: Manifest) -> Summary:
    """Count the sequences of a set, its audio, its lengths and what was left over."""
    lengths = sequence_seconds(manifest)
    return Summary(
        length=manifest.length,
        sequences=len(lengths),
        speakers=len(manifest.speakers),
        hours=manifest.seconds / 3600,
        mean=float(lengths.mean()),
        minimum=float(lengths.min()),
        maximum=float(lengths.max()),
        remainder_seconds=manifest.remainder_seconds,
        remainder_speakers=manifest.remainder_speakers,
        remainder_share=manifest.remainder_samples / max(1, manifest.total_samples),
    )


def table(manifests: list[Manifest]) -> str:
    """A Markdown table with a row for the utterances as they are and one for each recut set."""
    lines = [
        "| set | sequences | speakers | audio | mean (s) | min (s) | max (s) | remainder | share |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    if manifests and manifests[0].utterance_lengths:
        lengths = np.array(manifests[0].utterance_lengths) / SAMPLE_RATE
        lines.append(
            f"| utterances | {len(lengths)} | | {format_seconds(lengths.sum())} "
            f"| {lengths.mean():.2f} | {lengths.min():.2f} | {lengths.max():.2f} | | |"
        )
    for row in map(summary, manifests):
        lines.append(
            f"| {format_length(row.length)} | {row.sequences} | {row.speakers} "
            f"| {format_seconds(row.hours * 3600)} | {row.mean:.2f} | {row.minimum:.2f} "
            f"| {row.maximum:.2f} | {format_seconds(row.remainder_seconds)} "
            f"of {row.remainder_speakers} speakers | {row.remainder_share:.2%} |"
        )
    return "\n".join(lines) + "\n"


def sequence_seconds(manifest: Manifest) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Of each sequence, its seconds."""
    samples = [sequence.samples for sequence in manifest.sequences]
    return np.array(samples, dtype=np.float64) / SAMPLE_RATE
