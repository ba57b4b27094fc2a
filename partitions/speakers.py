"""Shares a manifest out: held-out speakers for evaluation, a part for each client."""

import heapq
import itertools
import statistics
from collections.abc import Collection, Iterable
from random import Random
from typing import Literal, get_args

from common.command import nearest
from common.errors import UsageError
from common.units import format_length
from partitions.manifest import Manifest, Sequence
from partitions.sampling import SAMPLE_RATE

How = Literal["speaker", "iid", "skewed"]
"""Whole speakers a client, evenly shuffled sequences, or shuffled with skewed amounts."""

HELD_OUT_SHARE = 0.05
"""Share of the speakers that is held out by default."""

_HELD_OUT_SPEAKERS = 2
_HELD_OUT_SECONDS = 60.0
_DOMINANT = 4.0
_CONCENTRATION = 0.5
"""Of the Dirichlet distribution of skewed amounts: below one, few clients hold most."""


def held_out_speakers(
    manifest: Manifest, count_or_share: int | float = HELD_OUT_SHARE, seed: int = 0
) -> tuple[str, ...]:
    """Choose speakers for evaluation, who belong to no client; returned sorted.

    A whole number asks for that many speakers. A share (a float below one) asks for that share of
    the speakers, but at least 2 speakers and 60 s of audio, and at most a third of the speakers.
    Speakers with over four times the median audio are passed over while there are others: they are
    worth most in training, and would drown the others in an evaluation. The choice depends only on
    the speakers, their audio and the seed.

    Raises:
        UsageError: a share outside 0 to 1/3, or more than a third of the speakers.
    """
    samples = manifest.speaker_samples
    most = len(samples) // 3
    if isinstance(count_or_share, float) and not 0 <= count_or_share <= 1 / 3:
        raise UsageError(f"cannot hold out a share of {count_or_share:g}: choose 0 to 0.33")
    if isinstance(count_or_share, int) and not 0 <= count_or_share <= max(most, 0):
        raise UsageError(
            f"cannot hold out {count_or_share} of {len(samples)} speakers: "
            f"at most a third, {most}, so that enough are left to train on"
        )
    if not count_or_share or not most:
        return ()
    order = list(samples)
    Random(f"held-out speakers {seed}").shuffle(order)
    ordinary = _DOMINANT * statistics.median(samples.values())
    order.sort(key=lambda speaker: samples[speaker] > ordinary)
    if isinstance(count_or_share, int):
        return tuple(sorted(order[:count_or_share], key=list(samples).index))
    wanted = max(_HELD_OUT_SPEAKERS, round(count_or_share * len(samples)))
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
) -> tuple[tuple[int, ...], ...]:
    """Share the sequences out to clients: for each client, indices into `manifest.sequences`.

    Every sequence of a speaker who is not in `exclude` goes to exactly one client, and every client
    has at least one sequence.

    Args:
        manifest: the recut corpus.
        clients: number of parts.
        how: "speaker" gives whole speakers to a client, balanced by audio; with more clients than
            speakers, each client has a consecutive part of one speaker. "iid" shuffles all
            sequences and deals them evenly. "skewed" shuffles them and draws each client's share
            from a Dirichlet distribution.
        seed: the same seed gives the same parts.
        exclude: speakers who are held out.

    Raises:
        UsageError: no such way, fewer than one client, or more clients than sequences.
    """
    if how not in get_args(How):
        known = get_args(How)
        raise UsageError(f"no partition '{how}'{nearest(how, known)} (known: {', '.join(known)})")
    if clients < 1:
        raise UsageError(f"{clients} clients cannot share anything: ask for at least 1")
    indices = select(manifest, (each for each in manifest.speakers if each not in set(exclude)))
    if clients > len(indices):
        raise UsageError(
            f"{clients} clients cannot share {len(indices)} sequences of "
            f"{format_length(manifest.length)}: at most {len(indices)} clients at this length; "
            f"ask for fewer clients, a shorter length, or add more audio"
        )
    random = Random(f"partition {how} {seed}")
    if how == "speaker":
        parts = _by_speaker(manifest, indices, clients, random)
    else:
        random.shuffle(indices)
        shares = [1.0] * clients
        if how == "skewed":
            shares = [random.gammavariate(_CONCENTRATION, 1.0) for _ in range(clients)]
        parts = _deal(indices, shares)
    return tuple(tuple(sorted(part)) for part in parts)


def select(manifest: Manifest, speakers: Iterable[str]) -> list[int]:
    """Indices of the sequences of these speakers, in the manifest's order."""
    wanted = set(speakers)
    return [index for index, each in enumerate(manifest.sequences) if each.speaker in wanted]


def seconds_of(manifest: Manifest, indices: Iterable[int]) -> float:
    """Seconds of audio in the sequences with these indices."""
    return sum(manifest.sequences[index].samples for index in indices) / SAMPLE_RATE


def sequences_of(manifest: Manifest, indices: Iterable[int]) -> tuple[Sequence, ...]:
    """The sequences with these indices."""
    return tuple(manifest.sequences[index] for index in indices)


def _by_speaker(
    manifest: Manifest, indices: list[int], clients: int, random: Random
) -> list[list[int]]:
    """Whole speakers for each client, or parts of one speaker where clients are more."""
    voices: dict[str, list[int]] = {}
    for index in indices:
        voices.setdefault(manifest.sequences[index].speaker, []).append(index)
    samples = manifest.speaker_samples
    order = sorted(voices)
    random.shuffle(order)
    order.sort(key=lambda speaker: -samples[speaker])
    if clients <= len(order):
        parts: list[list[int]] = [[] for _ in range(clients)]
        loads = [(0, client) for client in range(clients)]
        for speaker in order:
            load, client = heapq.heappop(loads)
            parts[client] += voices[speaker]
            heapq.heappush(loads, (load + samples[speaker], client))
    else:
        allotted = _allot(order, {each: len(voices[each]) for each in order}, samples, clients)
        parts = [
            part for speaker in order for part in _deal(voices[speaker], [1.0] * allotted[speaker])
        ]
    random.shuffle(parts)
    return parts


def _allot(
    order: list[str], sequences: dict[str, int], samples: dict[str, int], clients: int
) -> dict[str, int]:
    """How many clients share each speaker: the next goes where clients hold most audio each."""
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


def _deal(indices: list[int], shares: list[float]) -> list[list[int]]:
    """Cut a list into consecutive parts in proportion to `shares`, with at least one in each."""
    spare = len(indices) - len(shares)
    total = sum(shares)
    bounds = [round(spare * part / total) for part in itertools.accumulate(shares)]
    bounds[-1] = spare
    ends = [bound + rank for rank, bound in enumerate(bounds, start=1)]
    return [indices[first:last] for first, last in itertools.pairwise([0, *ends])]
