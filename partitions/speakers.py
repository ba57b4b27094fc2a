"""Splits a manifest into held-out speakers for evaluation and a part for each client."""

import heapq
import itertools
import statistics
from array import array
from collections.abc import Collection, Iterable
from random import Random
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from common.command import nearest
from common.errors import UsageError
from common.units import format_length
from partitions.columns import chunks
from partitions.manifest import Manifest
from partitions.sampling import SAMPLE_RATE
from partitions.sequences import Indices, Sequence

How = Literal["speaker", "iid", "skewed"]
"""Whole speakers, shuffled sequences in even parts, or shuffled sequences in skewed amounts."""

HELD_OUT_FRACTION = 0.05
"""Fraction of the speakers that is held out by default."""

_HELD_OUT_SPEAKERS = 2
_HELD_OUT_SECONDS = 60.0
_DOMINANT = 4.0
"""A speaker with more than this multiple of the median audio is held out last."""
_CONCENTRATION = 0.5
"""Of the Dirichlet distribution of the skewed amounts; below 1, a few clients get most audio."""


def held_out_speakers(
    manifest: Manifest, count_or_fraction: int | float = HELD_OUT_FRACTION, seed: int = 0
) -> tuple[str, ...]:
    """Choose speakers for evaluation, who belong to no client.

    Speakers with over four times the median audio are chosen last: they are worth most in training
    and would dominate the evaluation. The choice depends only on the speakers, their audio and the
    seed.

    Args:
        manifest: the recut corpus.
        count_or_fraction: an int is the number of speakers. A float is the fraction of the
            speakers, with at least 2 speakers and 60 s of audio and at most a third of the
            speakers.
        seed: the same seed gives the same speakers.

    Returns:
        The speakers, sorted.

    Raises:
        UsageError: a fraction outside 0 to 1/3, or more than a third of the speakers.
    """
    samples = manifest.speaker_samples
    most = len(samples) // 3
    if isinstance(count_or_fraction, float) and not 0 <= count_or_fraction <= 1 / 3:
        raise UsageError(f"cannot hold out a fraction of {count_or_fraction:g}: choose 0 to 0.33")
    if isinstance(count_or_fraction, int) and not 0 <= count_or_fraction <= max(most, 0):
        raise UsageError(
            f"cannot hold out {count_or_fraction} of {len(samples)} speakers: "
            f"at most a third, {most}, so that enough remain for training"
        )
    if not count_or_fraction or not most:
        return ()
    order = list(samples)
    Random(f"held-out speakers {seed}").shuffle(order)
    ordinary = _DOMINANT * statistics.median(samples.values())
    order.sort(key=lambda speaker: samples[speaker] > ordinary)
    if isinstance(count_or_fraction, int):
        return tuple(sorted(order[:count_or_fraction], key=list(samples).index))
    wanted = max(_HELD_OUT_SPEAKERS, round(count_or_fraction * len(samples)))
    chosen: list[str] = []
    seconds = 0.0
    for speaker in order[:most]:
        if len(chosen) >= wanted and seconds >= _HELD_OUT_SECONDS:
            break
        chosen.append(speaker)
        seconds += samples[speaker] / SAMPLE_RATE
    return tuple(speaker for speaker in samples if speaker in set(chosen))


def partition(
    manifest: Manifest,
    clients: int,
    how: How = "speaker",
    seed: int = 0,
    exclude: Collection[str] = (),
) -> tuple[Indices, ...]:
    """Divide the sequences among clients.

    Every sequence whose speaker is not in `exclude` goes to exactly one client, and every client
    gets at least one sequence.

    Args:
        manifest: the recut corpus.
        clients: number of clients.
        how: "speaker" assigns whole speakers to clients, balanced by audio; if there are more
            clients than speakers, each client gets consecutive sequences of one speaker. "iid"
            shuffles all sequences and divides them evenly. "skewed" shuffles them and draws the
            fraction of each client from a Dirichlet distribution.
        seed: the same seed gives the same parts.
        exclude: the held-out speakers.

    Returns:
        For each client, ascending indices into `manifest.sequences`, `[sequence]`.

    Raises:
        UsageError: unknown `how`, fewer than one client, or more clients than sequences.
    """
    if how not in get_args(How):
        known = get_args(How)
        raise UsageError(f"no partition '{how}'{nearest(how, known)} (known: {', '.join(known)})")
    if clients < 1:
        raise UsageError(f"cannot divide a corpus among {clients} clients: ask for at least 1")
    indices = select(manifest, (each for each in manifest.speakers if each not in set(exclude)))
    if clients > len(indices):
        raise UsageError(
            f"cannot divide {len(indices)} sequences of {format_length(manifest.length)} among "
            f"{clients} clients: at most {len(indices)} clients at this length; "
            f"ask for fewer clients, a shorter length, or add more audio"
        )
    random = Random(f"partition {how} {seed}")
    if how == "speaker":
        parts = _by_speaker(manifest, indices, clients, random)
    else:
        shuffled = array("i", indices.tobytes())
        random.shuffle(shuffled)
        weights = [1.0] * clients
        if how == "skewed":
            weights = [random.gammavariate(_CONCENTRATION, 1.0) for _ in range(clients)]
        parts = _split(np.frombuffer(shuffled, np.int32), weights)
    return tuple(np.sort(part) for part in parts)


def select(manifest: Manifest, speakers: Iterable[str]) -> Indices:
    """Indices `[sequence]` of the sequences of these speakers, in manifest order."""
    wanted, sequences = set(speakers), manifest.sequences
    chosen = np.array([each in wanted for each in sequences.speakers], bool)
    parts = [
        np.flatnonzero(chosen[sequences.speaker[part]]) + part.start
        for part in chunks(len(sequences))
    ]
    return np.concatenate([part.astype(np.int32) for part in parts])


def seconds_of(manifest: Manifest, indices: npt.ArrayLike) -> float:
    """Seconds of audio in the sequences with these indices, `[sequence]`."""
    chosen = manifest.sequences.samples[np.asarray(indices, np.int32)]
    return int(chosen.sum(dtype=np.int64)) / SAMPLE_RATE


def speakers_of(manifest: Manifest, indices: Indices) -> list[str]:
    """Speakers of the sequences with these indices `[sequence]`, each once, sorted as text."""
    found = np.unique(manifest.sequences.speaker[indices])
    return sorted(manifest.sequences.speakers[int(speaker)] for speaker in found)


def sequences_of(manifest: Manifest, indices: Iterable[int]) -> tuple[Sequence, ...]:
    """The sequences with these indices."""
    return tuple(manifest.sequences[int(index)] for index in indices)


def _by_speaker(
    manifest: Manifest, indices: Indices, clients: int, random: Random
) -> list[Indices]:
    """Whole speakers for each client, or part of one speaker if clients outnumber speakers."""
    owned = _by_owner(manifest, indices)
    samples = manifest.speaker_samples
    order = sorted(owned)
    random.shuffle(order)
    order.sort(key=lambda speaker: -samples[speaker])
    if clients <= len(order):
        several: list[list[Indices]] = [[] for _ in range(clients)]
        loads = [(0, client) for client in range(clients)]
        for speaker in order:
            load, client = heapq.heappop(loads)
            several[client].append(owned[speaker])
            heapq.heappush(loads, (load + samples[speaker], client))
        parts = [np.concatenate(each) for each in several]
    else:
        allotted = _allot(order, {each: len(owned[each]) for each in order}, samples, clients)
        parts = [
            part for speaker in order for part in _split(owned[speaker], [1.0] * allotted[speaker])
        ]
    random.shuffle(parts)
    return parts


def _by_owner(manifest: Manifest, indices: Indices) -> dict[str, Indices]:
    """The sequences of each speaker, in manifest order."""
    speakers = manifest.sequences.speaker[indices]
    order = np.argsort(speakers, kind="stable").astype(np.int32)
    bounds = np.flatnonzero(np.diff(speakers[order])) + 1
    groups = np.split(indices[order], bounds)
    return {
        manifest.sequences.speakers[int(manifest.sequences.speaker[group[0]])]: group
        for group in groups
        if len(group)
    }


def _allot(
    order: list[str], sequences: dict[str, int], samples: dict[str, int], clients: int
) -> dict[str, int]:
    """Clients per speaker: each extra client goes to the speaker with most audio per client."""
    allotted = dict.fromkeys(order, 1)
    waiting: list[tuple[float, int]] = [
        (-samples[each], rank) for rank, each in enumerate(order) if sequences[each] > 1
    ]
    heapq.heapify(waiting)
    for _ in range(clients - len(order)):
        _, rank = heapq.heappop(waiting)
        speaker = order[rank]
        allotted[speaker] += 1
        if allotted[speaker] < sequences[speaker]:
            heapq.heappush(waiting, (-samples[speaker] / allotted[speaker], rank))
    return allotted


def _split(indices: Indices, weights: list[float]) -> list[Indices]:
    """Split indices into consecutive non-empty parts in proportion to `weights`."""
    spare = len(indices) - len(weights)
    total = sum(weights)
    bounds = [round(spare * part / total) for part in itertools.accumulate(weights)]
    bounds[-1] = spare
    ends = [bound + rank for rank, bound in enumerate(bounds, start=1)]
    return [indices[first:last] for first, last in itertools.pairwise([0, *ends])]
