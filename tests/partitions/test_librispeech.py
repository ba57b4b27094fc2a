"""Finding utterances: order, lengths, transcripts, subsets and skipped files."""

from pathlib import Path

import pytest
import soundfile
from conftest import Writer

from common.errors import DataError, UsageError
from partitions.librispeech import find_utterances


def test_utterances_in_order_with_lengths_and_transcripts(root: Path, write: Writer) -> None:
    write("train-clean-100", 10, 5, 0, samples=300)
    write("train-clean-100", 9, 12, 1, samples=200, words="TWO WORDS")
    write("train-clean-100", 9, 12, 0, samples=100, words="ONE")
    write("train-clean-100", 9, 3, 0, samples=50, suffix="wav")
    corpus = find_utterances(root)
    assert [(u.path, u.speaker, u.chapter, u.samples, u.transcript) for u in corpus.utterances] == [
        ("train-clean-100/9/3/9-3-0000.wav", "9", "3", 50, None),
        ("train-clean-100/9/12/9-12-0000.flac", "9", "12", 100, "ONE"),
        ("train-clean-100/9/12/9-12-0001.flac", "9", "12", 200, "TWO WORDS"),
        ("train-clean-100/10/5/10-5-0000.flac", "10", "5", 300, None),
    ]
    assert corpus.root == root
    assert corpus.speakers == ("9", "10")
    assert corpus.without_transcript == 2
    assert corpus.skips == {}


@pytest.mark.parametrize(("rate", "frames", "samples"), [(44100, 44100, 16000), (8000, 81, 162)])
def test_length_is_counted_at_16_khz(
    root: Path, write: Writer, rate: int, frames: int, samples: int
) -> None:
    write("train-a", 1, 1, 0, samples=frames, rate=rate, channels=2)
    assert find_utterances(root).utterances[0].samples == samples


def test_training_subsets_are_the_default(root: Path, write: Writer) -> None:
    write("train-clean-100", 1, 1, 0)
    write("train-other-500", 2, 1, 0)
    write("test-other", 3, 1, 0)
    assert find_utterances(root).subsets == ("train-clean-100", "train-other-500")
    assert find_utterances(root, ("test-other",)).speakers == ("3",)


def test_without_a_training_subset_all_are_used(root: Path, write: Writer) -> None:
    write("dev-clean", 1, 1, 0)
    write("my-voices", 2, 1, 0)
    assert find_utterances(root).subsets == ("dev-clean", "my-voices")


def test_parent_folder_and_single_subset_are_accepted(tmp_path: Path, write: Writer) -> None:
    write("train-a", 1, 1, 0)
    (tmp_path / "corpus").rename(tmp_path / "LibriSpeech")
    for given in (tmp_path, tmp_path / "LibriSpeech", tmp_path / "LibriSpeech" / "train-a"):
        corpus = find_utterances(given)
        assert corpus.root == tmp_path / "LibriSpeech"
        assert [each.path for each in corpus.utterances] == ["train-a/1/1/1-1-0000.flac"]


def test_folders_count_and_speakers_txt_does_not(root: Path, write: Writer) -> None:
    write("train-a", 1, 1, 0)
    (root / "SPEAKERS.TXT").write_text("1 | F | train-a | 1 | A\n2 | M | train-a | 1 | B\n")
    assert find_utterances(root).speakers == ("1",)


def test_bad_files_are_counted_by_reason(root: Path, write: Writer) -> None:
    for number in range(7):
        path = write("train-a", 1, 1, number)
        if number < 5:
            path.write_bytes(b"" if number == 0 else b"not audio at all")
    silent = write("train-a", 1, 2, 0, suffix="wav")
    soundfile.write(silent, [], 16000)
    write("train-a", 1, 3, 0).rename(root / "train-a/1/3/copy.flac")
    (root / "train-a/1/1/._1-1-0005.flac").write_bytes(b"hidden")
    corpus = find_utterances(root)
    assert [each.path for each in corpus.utterances] == [
        "train-a/1/1/1-1-0005.flac",
        "train-a/1/1/1-1-0006.flac",
    ]
    assert corpus.skips == {"name not speaker-chapter-number": 1, "empty": 2, "unreadable": 4}
    assert corpus.describe_skips()[2] == (
        "skipped, unreadable: 4 (train-a/1/1/1-1-0001.flac, train-a/1/1/1-1-0002.flac, "
        "train-a/1/1/1-1-0003.flac, ...)"
    )


def test_name_that_a_manifest_cannot_hold_is_counted(root: Path, write: Writer) -> None:
    write("train-a", 1, 1, 0)
    path = write("train-a", 1, 1, 1)
    path.rename(path.with_name("1-1-a\tb.flac"))
    corpus = find_utterances(root)
    assert len(corpus.utterances) == 1
    assert corpus.skips == {"name that cannot be written in a manifest": 1}
    assert corpus.describe_skips()[0].endswith("(train-a/1/1/1-1-a?b.flac)")


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder: .*nowhere; give the folder"):
        find_utterances(tmp_path / "nowhere")


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="file is not a folder"):
        find_utterances(tmp_path / "file")


def test_another_layout_says_what_was_expected_and_found(root: Path) -> None:
    (root / "clips").mkdir()
    (root / "clips" / "one.flac").write_bytes(b"x")
    (root / "labels.csv").write_text("x")
    with pytest.raises(DataError) as caught:
        find_utterances(root)
    text = str(caught.value)
    assert (
        "is not in LibriSpeech's layout: expected subset/speaker/chapter/speaker-chapter-" in text
    )
    assert "found clips, labels.csv" in text
    assert "\n" not in text


def test_an_empty_folder_is_an_empty_corpus(root: Path) -> None:
    with pytest.raises(DataError, match="empty corpus: nothing in"):
        find_utterances(root)


def test_layout_without_audio_is_an_empty_corpus(root: Path) -> None:
    (root / "train-clean-100" / "19" / "198").mkdir(parents=True)
    with pytest.raises(DataError, match="empty corpus: no audio in train-clean-100"):
        find_utterances(root)


def test_only_unusable_audio_names_the_reasons(root: Path, write: Writer) -> None:
    write("train-a", 1, 1, 0).write_bytes(b"")
    with pytest.raises(DataError, match=r"no usable audio .*skipped, empty: 1 \(train-a/1/1/1-1"):
        find_utterances(root)


def test_unknown_subset_names_the_nearest(root: Path, write: Writer) -> None:
    write("train-clean-100", 1, 1, 0)
    write("test-other", 2, 1, 0)
    with pytest.raises(UsageError) as caught:
        find_utterances(root, ("train-clean-10",))
    assert "did you mean 'train-clean-100'? (present: test-other, train-clean-100)" in str(
        caught.value
    )


def test_real_recordings(librispeech: Path) -> None:
    corpus = find_utterances(librispeech)
    assert corpus.subsets == ("train-clean-100",)
    assert len(corpus.utterances) == 490
    assert len(corpus.speakers) == 229
    assert corpus.speakers[0] == "19"
    assert corpus.without_transcript == 168
    assert corpus.skips == {}
    first = corpus.utterances[0]
    assert (first.path, first.samples) == ("train-clean-100/19/198/19-198-0000.flac", 31440)
    assert len(find_utterances(librispeech / "test-other").utterances) == 50
