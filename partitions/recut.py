"""Recuts a corpus to a nominal length by joining and cutting each speaker's utterances."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from common.errors import DataError, UsageError
from common.units import format_length
from partitions.librispeech import Corpus, Utterance
from partitions.manifest import Manifest, Piece, Sequence
from partitions.sampling import SAMPLE_RATE

PAPER_MEANS = {1.0: 1.1, 5.0: 5.2, 10.0: 10.4, 15.0: 15.8}
"""Mean seconds of the paper's four data sets by nominal length (section 3.1)."""

TOO_SHORT = "speaker shorter than the length"
"""Reason for skipping speakers with too little audio for one sequence."""

_EXAMPLES = 3


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
    """Lengths of the sequences to cut from each speaker's stream.

    Args:
        available: length of each speaker's stream in samples at 16 kHz.
        limits: the allowed lengths in seconds.

    Returns:
        For each speaker, the lengths of the sequences in samples at 16 kHz.
    """
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
    """The pieces of each sequence, cut from the stream across utterance boundaries."""
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
