"""Recutting: the paper's four sets, and no audio lost at any length."""

from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import Writer
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError, UsageError
from partitions.librispeech import Corpus, Utterance, find_utterances
from partitions.manifest import Piece
from partitions.recut import TOO_SHORT, Band, band, recut
from partitions.recut_report import plot_lengths, summary, table


def corpus_of(speakers: dict[str, list[int]]) -> Corpus:
    """A corpus, in memory only, with utterances of these lengths in samples."""
    return Corpus(
        Path("/corpus"),
        tuple(
            Utterance(
                f"train-a/{speaker}/1/{speaker}-1-{number}.flac",
                "train-a",
                speaker,
                "1",
                samples,
                None,
            )
            for speaker, lengths in speakers.items()
            for number, samples in enumerate(lengths)
        ),
    )


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (1, Band(1.0, 1.1, 1.2)),
        (5, Band(5.0, 5.2, 5.4)),
        (10, Band(10.0, 10.4, 10.8)),
        (15, Band(15.3, 15.8, 16.3)),
        (15.8, Band(15.932, 16.432, 16.932)),
        (2, Band(2.0, 2.1, 2.2)),
        (30, Band(30.3, 30.8, 31.3)),
    ],
)
def test_band(length: float, expected: Band) -> None:
    limits = band(length)
    assert (limits.minimum, limits.mean, limits.maximum) == pytest.approx(
        (expected.minimum, expected.mean, expected.maximum), abs=1e-9
    )


@given(st.floats(0.05, 120))
def test_a_crop_of_the_nominal_length_always_fits_and_the_spread_is_within_a_second(
    length: float,
) -> None:
    limits = band(length)
    assert limits.minimum >= length - 1e-9
    assert limits.maximum - limits.minimum <= 1 + 1e-9


@pytest.mark.parametrize("length", [0.0, -1.0, float("nan"), float("inf")])
def test_a_length_without_audio_is_refused(length: float) -> None:
    with pytest.raises(UsageError, match="must be above zero"):
        band(length)


def test_a_stream_is_cut_whole_across_utterance_boundaries() -> None:
    manifest = recut(corpus_of({"7": [100_000, 66_401]}), 5)
    path = "train-a/7/1/7-1-{}.flac"
    assert [sequence.pieces for sequence in manifest.sequences] == [
        (Piece(path.format(0), 0, 83_201),),
        (Piece(path.format(0), 83_201, 16_799), Piece(path.format(1), 0, 66_401)),
    ]
    assert manifest.remainder_samples == 0


def test_a_stream_outside_the_band_leaves_a_remainder() -> None:
    manifest = recut(corpus_of({"7": [14 * 16_000], "8": [4 * 16_000]}), 5)
    assert [sequence.samples for sequence in manifest.sequences] == [83_200, 83_200]
    assert manifest.remainder_samples == 18 * 16_000 - 2 * 83_200
    assert manifest.remainder_speakers == 2
    assert manifest.skips == {TOO_SHORT: 1}
    assert manifest.skipped_examples == {TOO_SHORT: ("8",)}
    assert manifest.speakers == ("7",)


def test_partly_used_streams_bring_the_mean_to_the_bands() -> None:
    manifest = recut(corpus_of({"1": [162_000], "2": [14 * 16_000]}), 5)
    assert [sequence.samples for sequence in manifest.sequences] == [81_000, 81_000, 85_400, 85_400]
    assert summary(manifest).mean == pytest.approx(5.2)


def test_no_speaker_with_enough_audio() -> None:
    with pytest.raises(DataError, match=r"no speaker in .* has 10s of audio .* longest has 2.0 s"):
        recut(corpus_of({"1": [16_000, 16_000], "2": [100]}), 10)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from("123456"),
        st.lists(st.integers(1, 400_000), min_size=1, max_size=6),
        min_size=1,
    ),
    st.sampled_from([0.5, 1.0, 2.37, 5.0, 10.0, 15.0]),
)
def test_no_audio_is_lost(speakers: dict[str, list[int]], length: float) -> None:
    corpus = corpus_of(speakers)
    try:
        manifest = recut(corpus, length)
    except DataError:
        assert max(map(sum, speakers.values())) < band(length).minimum * 16_000
        return
    assert manifest.samples + manifest.remainder_samples == manifest.total_samples
    assert manifest.total_samples == sum(map(sum, speakers.values()))
    limits = band(length)
    lengths = [sequence.samples for sequence in manifest.sequences]
    assert min(lengths) >= round(length * 16_000)
    assert min(lengths) >= limits.minimum * 16_000 - 1e-6
    assert max(lengths) <= limits.maximum * 16_000 + 1e-6
    sizes = {utterance.path: utterance.samples for utterance in corpus.utterances}
    pieces = defaultdict(list)
    for sequence in manifest.sequences:
        for piece in sequence.pieces:
            assert piece.path.split("/")[1] == sequence.speaker
            pieces[piece.path].append((piece.start, piece.start + piece.samples))
    for path, spans in pieces.items():
        assert spans[0][0] == 0
        assert all(first[1] == second[0] for first, second in pairwise(spans))
        assert spans[-1][1] <= sizes[path]


@pytest.mark.parametrize(("length", "mean"), [(1, 1.1), (5, 5.2), (10, 10.4), (15, 15.8)])
def test_a_large_corpus_has_the_papers_means(length: float, mean: float) -> None:
    # A LibriSpeech speaker reads for about 25 minutes, in utterances of about 12 s.
    corpus = corpus_of({str(n): [190_001 + 1_000 * n] * 125 for n in range(4)})
    row = summary(recut(corpus, length))
    assert row.mean == pytest.approx(mean, abs=0.05)
    assert row.remainder_seconds == 0


@pytest.mark.parametrize(
    ("length", "mean", "sequences", "fraction"),
    [
        (1, 1.1, 5339, 0.0005),
        (5, 5.2, 1029, 0.0892),
        (10, 10.4, 473, 0.1627),
        (15, 15.8, 239, 0.357),
    ],
)
def test_real_recordings_have_the_papers_means(
    librispeech: Path, length: float, mean: float, sequences: int, fraction: float
) -> None:
    # Most speakers here have one utterance of 14 to 16 s, hence the remainders.
    corpus = find_utterances(librispeech)
    manifest = recut(corpus, length)
    row = summary(manifest)
    assert row.mean == pytest.approx(mean, abs=0.01)
    assert row.minimum >= length
    assert row.maximum - row.minimum <= 1
    assert row.sequences == sequences
    assert row.remainder_fraction == pytest.approx(fraction, abs=1e-4)
    total = sum(utterance.samples for utterance in corpus.utterances)
    assert manifest.samples + manifest.remainder_samples == total == manifest.total_samples


def test_table_and_figure(root: Path, write: Writer, tmp_path: Path) -> None:
    write("train-a", 1, 1, 0, samples=3 * 16_000)
    manifests = [recut(find_utterances(root), length) for length in (1, 2)]
    assert table(manifests).splitlines() == [
        "| set | sequences | speakers | audio | mean (s) | min (s) | max (s) | remainder "
        "| fraction |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        "| utterances | 1 | | 3 s | 3.00 | 3.00 | 3.00 | | |",
        "| 1s | 3 | 1 | 3 s | 1.00 | 1.00 | 1.00 | 0 s of 0 speakers | 0.00% |",
        "| 2s | 1 | 1 | 2.1 s | 2.10 | 2.10 | 2.10 | 0.9 s of 1 speakers | 30.00% |",
    ]
    for name in ("a.png", "b.png"):
        plot_lengths(manifests, tmp_path / "figures" / name)
    first, second = (tmp_path / "figures" / name for name in ("a.png", "b.png"))
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(path.name for path in first.parent.iterdir()) == ["a.png", "b.png"]
