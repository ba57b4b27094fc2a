"""LibriSpeech's transcripts: symbols, chapters without transcripts, and a random validation set."""

from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import DataError, UsageError
from ssl_core.downstream.corpora import asr

Writer = Callable[..., Path]

TRAIN, VALID, TEST = ("train-clean-100",), ("dev-clean",), ("test-clean",)


@pytest.fixture
def transcribed(root: Path, write: Writer) -> Path:
    """Three utterances to train on, one each to validate and test on."""
    for number, words in enumerate(("ONE", "IT'S TWO", "THREE MORE")):
        write("train-clean-100", 7, 1, number, words=words)
    write("dev-clean", 8, 1, 0, words="FOUR")
    write("test-clean", 9, 1, 0, words="FIVE", samples=320)
    return root


def test_subsets_texts_and_labels(transcribed: Path) -> None:
    data = asr.read(transcribed, TRAIN, VALID, TEST, 0)
    assert data.labels == tuple(" 'ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert len(data.labels) == 28
    assert [clip.text for clip in data.train] == ["ONE", "IT'S TWO", "THREE MORE"]
    assert [clip.text for clip in data.valid] == ["FOUR"]
    test = data.test[0]
    assert (test.name, test.speaker, test.piece.samples) == (
        "test-clean/9/1/9-1-0000.flac",
        "9",
        320,
    )
    assert data.root == transcribed
    assert data.skips == {}


@pytest.mark.parametrize(
    ("transcript", "text"),
    [
        ("already FINE", "ALREADY FINE"),
        ("Don\N{RIGHT SINGLE QUOTATION MARK}t, stop--now!", "DON'T STOP NOW"),
        ("twenty-five  (or so).", "TWENTY FIVE OR SO"),
        ("U.S.", "U S"),
        ("...", ""),
        ("ROUTE 66", None),
        ("CAFÉ", None),
        ("$ FIVE", None),
    ],
)
def test_transcripts_in_28_symbols(transcript: str, text: str | None) -> None:
    assert asr.normalised(transcript) == text


def test_utterances_without_a_usable_transcript_are_counted(
    transcribed: Path, write: Writer
) -> None:
    write("train-clean-100", 10, 2, 0)
    write("train-clean-100", 10, 3, 0, words="ROUTE 66")
    write("train-clean-100", 10, 3, 1, words="--")
    write("train-clean-100", 10, 3, 2, words=" ")
    write("train-clean-100", 10, 3, 3, words="BROKEN").write_bytes(b"x")
    data = asr.read(transcribed, TRAIN, VALID, TEST, 0)
    assert data.skips == {
        "unreadable": 1,
        "no transcript": 2,
        "other symbols in the transcript": 1,
        "empty transcript": 1,
    }
    assert len(data.train) == 3


def test_without_a_subset_to_validate_on_utterances_are_drawn(root: Path, write: Writer) -> None:
    for number in range(40):
        write("train-clean-100", 7, 1, number, samples=160, words="WORD")
    write("test-clean", 9, 1, 0, words="FIVE")
    drawn = [asr.read(root, TRAIN, (), TEST, seed) for seed in range(4)]
    for data in drawn:
        assert (len(data.train), len(data.valid)) == (38, 2)
        assert len({clip.name for clip in (*data.train, *data.valid)}) == 40
    assert drawn[0] == asr.read(root, TRAIN, (), TEST, 0)
    assert len({data.valid for data in drawn}) > 1


def test_at_least_one_utterance_is_drawn_and_one_is_left(transcribed: Path) -> None:
    data = asr.read(transcribed, TRAIN, (), TEST, 0)
    assert (len(data.train), len(data.valid)) == (2, 1)
    with pytest.raises(DataError, match="no clip to validate on"):
        asr.read(transcribed, VALID, (), TEST, 0)


def test_a_missing_subset_names_what_is_there(transcribed: Path) -> None:
    with pytest.raises(UsageError, match=r"no subset 'test-other'.*present: dev-clean, test-clean"):
        asr.read(transcribed, TRAIN, VALID, ("test-other",), 0)


def test_a_subset_in_two_splits_is_refused(transcribed: Path) -> None:
    with pytest.raises(UsageError, match="'dev-clean' is in two splits"):
        asr.read(transcribed, TRAIN, VALID, VALID, 0)


def test_training_needs_subsets(transcribed: Path) -> None:
    with pytest.raises(UsageError, match="name one, such as train-clean-100"):
        asr.read(transcribed, (), VALID, TEST, 0)


def test_without_a_test_subset_the_validation_clips_are_tested_on(transcribed: Path) -> None:
    data = asr.read(transcribed, TRAIN, VALID, (), 0)
    assert data.test == data.valid


def test_a_split_without_transcripts_is_an_error(transcribed: Path) -> None:
    (transcribed / "test-clean" / "9" / "1" / "9-1.trans.txt").unlink()
    with pytest.raises(DataError, match=r"no clip to test on in .*; skipped, no transcript: 1"):
        asr.read(transcribed, TRAIN, VALID, TEST, 0)


def test_another_corpus_says_what_was_expected_and_found(tmp_path: Path) -> None:
    (tmp_path / "wav" / "id1").mkdir(parents=True)
    with pytest.raises(DataError, match=r"not in LibriSpeech's layout: .*found wav"):
        asr.read(tmp_path, TRAIN, VALID, TEST, 0)


def test_real_recordings(librispeech: Path) -> None:
    data = asr.read(librispeech, TRAIN, (), ("test-other",), 0)
    assert [len(data.train), len(data.valid), len(data.test)] == [306, 16, 50]
    assert data.skips == {"no transcript": 168}
