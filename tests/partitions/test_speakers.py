"""Held-out speakers and the three partitions of a corpus among clients."""

import random
from collections.abc import Sequence as Many
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UsageError
from partitions.librispeech import find_utterances
from partitions.manifest import Manifest, Piece, Sequence, Sequences
from partitions.recut import recut
from partitions.sequences import Indices
from partitions.speakers import (
    How,
    held_out_speakers,
    partition,
    seconds_of,
    select,
    sequences_of,
)

WAYS: tuple[How, ...] = ("speaker", "iid", "skewed")


def manifest_of(counts: Many[int], samples: int = 80_000) -> Manifest:
    """Speaker `n` has `counts[n]` sequences."""
    sequences = tuple(
        Sequence(str(speaker), (Piece(f"{speaker}.flac", number * samples, samples),))
        for speaker, count in enumerate(counts)
        for number in range(count)
    )
    return Manifest(Path("/corpus"), 5.0, Sequences.of(sequences), samples * len(sequences))


@settings(max_examples=150, deadline=None)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    fraction=st.floats(0, 1),
    how=st.sampled_from(WAYS),
    seed=st.integers(0, 99),
)
def test_parts_are_disjoint_complete_and_never_empty(
    counts: list[int], fraction: float, how: How, seed: int
) -> None:
    manifest = manifest_of(counts)
    held_out = held_out_speakers(manifest, seed=seed)
    expected = [i for i, each in enumerate(manifest.sequences) if each.speaker not in held_out]
    clients = 1 + round(fraction * (len(expected) - 1))
    parts = partition(manifest, clients, how, seed, held_out)
    assert len(parts) == clients
    assert all(len(part) for part in parts)
    assert sorted(index for part in parts for index in part) == expected
    assert same(parts, partition(manifest, clients, how, seed, held_out))


def same(one: Many[Indices], other: Many[Indices]) -> bool:
    return [part.tolist() for part in one] == [part.tolist() for part in other]


def voices(manifest: Manifest, part: Indices) -> set[str]:
    return {each.speaker for each in sequences_of(manifest, part)}


def test_whole_speakers_are_balanced_by_audio() -> None:
    manifest = manifest_of([8, 7, 6, 5, 4])
    parts = partition(manifest, 2, "speaker", 3)
    assert sorted(map(len, parts)) == [13, 17]
    assert not voices(manifest, parts[0]) & voices(manifest, parts[1])


def test_as_many_clients_as_speakers_have_one_each() -> None:
    manifest = manifest_of([3, 1, 2])
    parts = partition(manifest, 3, "speaker", 0)
    assert sorted(map(len, parts)) == [1, 2, 3]
    assert all(len(voices(manifest, part)) == 1 for part in parts)


def test_more_clients_than_speakers_divide_each_speaker() -> None:
    manifest = manifest_of([12, 3, 1])
    parts = partition(manifest, 6, "speaker", 0)
    assert sorted(map(len, parts)) == [1, 3, 3, 3, 3, 3]
    for part in parts:
        assert len(voices(manifest, part)) == 1
        assert list(part) == list(range(part[0], part[-1] + 1))


def test_iid_parts_are_even_and_mixed() -> None:
    manifest = manifest_of([20, 20, 20])
    parts = partition(manifest, 7, "iid", 1)
    assert sorted(map(len, parts)) == [8, 8, 8, 9, 9, 9, 9]
    assert all(len(voices(manifest, part)) >= 2 for part in parts)


def test_skewed_parts_are_uneven() -> None:
    lengths = sorted(map(len, partition(manifest_of([50] * 10), 20, "skewed", 0)))
    assert lengths[0] <= 3
    assert lengths[-1] >= 60


@pytest.mark.parametrize("how", WAYS)
def test_the_seed_matters(how: How) -> None:
    manifest = manifest_of([4] * 10)
    assert not same(partition(manifest, 5, how, 0), partition(manifest, 5, how, 1))


def test_more_clients_than_sequences() -> None:
    with pytest.raises(UsageError) as caught:
        partition(manifest_of([3, 2]), 6, "speaker", 0)
    assert str(caught.value) == (
        "cannot divide 5 sequences of 5s among 6 clients: at most 5 clients at this length; "
        "ask for fewer clients, a shorter length, or add more audio"
    )


def test_bad_arguments() -> None:
    manifest = manifest_of([3, 2])
    with pytest.raises(UsageError, match="no partition 'speakers'; did you mean 'speaker'"):
        partition(manifest, 2, "speakers")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="ask for at least 1"):
        partition(manifest, 0)


def test_held_out_speakers_do_not_depend_on_order() -> None:
    manifest = manifest_of([5, 4, 3, 5, 4, 3, 5, 4, 3, 40])
    sequences = list(manifest.sequences)
    random.Random(0).shuffle(sequences)
    shuffled = Manifest(manifest.root, 5.0, Sequences.of(sequences), manifest.total_samples)
    for seed in range(5):
        assert held_out_speakers(manifest, seed=seed) == held_out_speakers(shuffled, seed=seed)
    assert len({held_out_speakers(manifest, seed=seed) for seed in range(20)}) > 5


def test_held_out_speakers_are_enough_and_at_most_a_third() -> None:
    # Of 100 speakers of 5 s, the fraction gives 5, but 60 s need 12.
    assert len(held_out_speakers(manifest_of([1] * 100))) == 12
    assert len(held_out_speakers(manifest_of([12] * 100))) == 5
    assert len(held_out_speakers(manifest_of([12] * 10))) == 2
    assert len(held_out_speakers(manifest_of([1] * 10))) == 3
    assert len(held_out_speakers(manifest_of([12] * 100), 0.2)) == 20
    assert len(held_out_speakers(manifest_of([1] * 10), 1)) == 1
    assert held_out_speakers(manifest_of([9])) == ()
    assert held_out_speakers(manifest_of([1] * 9), 0) == ()


def test_speakers_with_far_more_audio_are_held_out_last() -> None:
    manifest = manifest_of([100, 4, 4, 4, 4, 4, 4, 4, 4])
    assert all("0" not in held_out_speakers(manifest, 0.3, seed) for seed in range(20))


@pytest.mark.parametrize("wanted", [-1, 4, 0.5, -0.1, float("nan")])
def test_too_many_held_out_speakers(wanted: float) -> None:
    with pytest.raises(UsageError, match="cannot hold out"):
        held_out_speakers(manifest_of([3] * 9), wanted)


def test_selection() -> None:
    manifest = manifest_of([2, 1, 2])
    assert select(manifest, ["2", "0"]).tolist() == [0, 1, 3, 4]
    assert seconds_of(manifest, [0, 3]) == 10.0


def test_real_recordings_for_a_hundred_clients(librispeech: Path) -> None:
    manifest = recut(find_utterances(librispeech), 5.0)
    held_out = held_out_speakers(manifest)
    parts = partition(manifest, 100, "speaker", 0, held_out)
    owners = [voice for part in parts for voice in voices(manifest, part)]
    assert len(held_out) == 10
    assert len(owners) == len(set(owners)) == 199
    assert not set(owners) & set(held_out)
    assert min(seconds_of(manifest, part) for part in parts) > 20
