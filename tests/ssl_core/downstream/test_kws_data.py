"""Speech Commands: official lists, unknown words, and silence that is disjoint between splits."""

import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from noise_files import real_data, write_noise

from common.errors import DataError, UsageError
from ssl_core.downstream.clips import Clip, TaskData
from ssl_core.downstream.corpora import kws

OTHERS = ("bed", "cat", "dog")
SPLITS = ("train", "valid", "test")


def clips_of(data: TaskData, split: str) -> tuple[Clip, ...]:
    return {"train": data.train, "valid": data.valid, "test": data.test}[split]


def paths(clips: Iterable[Clip], label: str) -> list[str]:
    return [clip.name for clip in clips if clip.label == label]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten commands and three other words, 4 files each; read-only."""
    root = tmp_path_factory.mktemp("speech") / "speech_commands_v0.02"
    valid, test = [], []
    for word in (*kws.COMMANDS, *OTHERS):
        for number, speaker in enumerate(("aa00c1e7", "bb11d2f8", "cc22e3a9", "dd33f4ba")):
            write_noise(root / word / f"{speaker}_nohash_{number}.wav")
        valid.append(f"{word}/cc22e3a9_nohash_2.wav")
        test.append(f"{word}/dd33f4ba_nohash_3.wav")
    for name, seconds in (("hum", 20), ("tap", 10)):
        write_noise(root / kws.NOISE / f"{name}.wav", seconds * 16_000)
    (root / kws.NOISE / "README.md").write_text("noise")
    (root / "LICENSE").write_text("free")
    (root / "validation_list.txt").write_text("\n".join(valid) + "\n")
    (root / "testing_list.txt").write_text("\n".join(test) + "\n")
    return root


@pytest.fixture
def own(commands: Path, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    return Path(shutil.copytree(commands, tmp_path / "own"))


def test_the_official_lists_decide_the_split(commands: Path) -> None:
    data = kws.read(commands, 35, 0)
    assert data.labels == tuple(sorted((*kws.COMMANDS, *OTHERS)))
    assert [len(clips_of(data, split)) for split in SPLITS] == [26, 13, 13]
    first = data.train[0]
    assert (first.name, first.speaker, first.label, first.piece.samples) == (
        "bed/aa00c1e7_nohash_0.wav",
        "aa00c1e7",
        "bed",
        1600,
    )
    assert {clip.speaker for clip in data.valid} == {"cc22e3a9"}
    assert {clip.speaker for clip in data.test} == {"dd33f4ba"}
    assert data.skips == {}


def test_any_folder_around_the_corpus_is_accepted(commands: Path, tmp_path: Path) -> None:
    (tmp_path / "SpeechCommands").mkdir()
    (tmp_path / "SpeechCommands" / "speech_commands_v0.02").symlink_to(commands)
    for given in (commands, commands.parent, tmp_path / "SpeechCommands", tmp_path):
        data = kws.read(given, 35, 0)
        assert data.root.name == "speech_commands_v0.02"
        assert len(data.train) == 26


def test_twelve_classes_count_from_the_commands_there_are(commands: Path) -> None:
    data = kws.read(commands, 12, 0)
    assert data.labels == (*kws.COMMANDS, "unknown", "silence")
    for split, each in (("train", 2), ("valid", 1), ("test", 1)):
        counts = Counter(clip.label for clip in clips_of(data, split))
        assert counts == {**dict.fromkeys(kws.COMMANDS, each), "unknown": each, "silence": each}
        unknown = paths(clips_of(data, split), "unknown")
        assert {path.split("/")[0] for path in unknown} <= set(OTHERS)
    assert {clip.piece.samples for clip in data.train if clip.label == "silence"} == {16_000}


def test_unknown_and_silence_are_drawn_by_the_seed_alone(commands: Path, own: Path) -> None:
    def draw(root: Path, seed: int) -> list[list[str]]:
        data = kws.read(root, 12, seed)
        return [
            paths(clips_of(data, split), label) for split in SPLITS for label in data.labels[-2:]
        ]

    drawn = [draw(commands, seed) for seed in range(4)]
    assert drawn[0] == draw(commands, 0)
    for kind in range(6):
        assert len({tuple(each[kind]) for each in drawn}) > 1
    # The file system lists the same files in another order.
    for word in ("cat", "bed"):
        shutil.move(own / word, own / f"_{word}")
        shutil.copytree(own / f"_{word}", own / word)
        shutil.rmtree(own / f"_{word}")
    assert draw(own, 0) == drawn[0]


@pytest.mark.parametrize("seed", range(5))
def test_silence_of_two_splits_shares_no_sample(commands: Path, seed: int) -> None:
    data = kws.read(commands, 12, seed)
    heard = {name: np.full(size * 16_000, -1) for name, size in (("hum", 20), ("tap", 10))}
    for number, split in enumerate(SPLITS):
        for clip in clips_of(data, split):
            if clip.label == "silence":
                stretch = heard[Path(clip.piece.path).stem]
                end = clip.piece.start + clip.piece.samples
                assert 0 <= clip.piece.start < end <= len(stretch)
                taken = stretch[clip.piece.start : end]
                assert set(taken) <= {-1, number}
                taken[:] = number


def test_short_noise_serves_the_splits_it_is_long_enough_for(own: Path) -> None:
    write_noise(own / kws.NOISE / "tap.wav", 4 * 16_000)
    for seed in range(5):
        data = kws.read(own, 12, seed)
        for clip in (*data.valid, *data.test):
            assert clip.piece.path != f"{kws.NOISE}/tap.wav"
    write_noise(own / kws.NOISE / "hum.wav", 4 * 16_000)
    with pytest.raises(
        DataError, match=r"long enough .* in the valid split: a file of at least 5 s is"
    ):
        kws.read(own, 12, 0)


@pytest.mark.parametrize("name", ["validation_list.txt", "testing_list.txt"])
def test_a_missing_list_is_an_error(own: Path, name: str) -> None:
    (own / name).unlink()
    with pytest.raises(DataError, match=rf"no {name} in .*own; .*unpack the archive again"):
        kws.read(own, 35, 0)


def test_no_noise_matters_to_twelve_classes_only(own: Path) -> None:
    shutil.rmtree(own / kws.NOISE)
    with pytest.raises(DataError, match=r"no audio in .*_background_noise_.* or ask for 35"):
        kws.read(own, 12, 0)
    assert len(kws.read(own, 35, 0).labels) == 13


def test_bad_files_are_counted_by_reason(own: Path) -> None:
    (own / "cat" / "aa00c1e7_nohash_0.wav").write_bytes(b"")
    (own / "cat" / "bb11d2f8_nohash_1.wav").write_bytes(b"not audio")
    (own / "dog" / "notes.txt").write_text("x")
    (own / "dog" / "dd33f4ba_nohash_3.wav").unlink()
    with open(own / "validation_list.txt", "a") as stream:
        stream.write("zebra/ee44a5cb_nohash_0.wav\n\nzebra/ee44a5cb_nohash_0.wav\n")
    data = kws.read(own, 35, 0)
    assert data.skips == {
        "name not speaker_nohash_number.wav": 1,
        "missing": 2,
        "empty": 1,
        "unreadable": 1,
        "word without clips to train on": 2,
    }
    assert data.skipped_examples["missing"] == (
        "zebra/ee44a5cb_nohash_0.wav",
        "dog/dd33f4ba_nohash_3.wav",
    )
    assert "cat" not in data.labels


def test_a_command_without_clips_is_an_error(own: Path) -> None:
    shutil.rmtree(own / "go")
    with pytest.raises(DataError, match="no clip of 'go' to train on"):
        kws.read(own, 12, 0)


def test_no_other_words_are_an_error(own: Path) -> None:
    for word in OTHERS:
        shutil.rmtree(own / word)
    with pytest.raises(DataError, match="no other words for the class 'unknown'"):
        kws.read(own, 12, 0)


def test_a_list_with_an_unsafe_path_names_its_line(own: Path) -> None:
    with open(own / "testing_list.txt", "a") as stream:
        stream.write("../secret.wav\n")
    with pytest.raises(DataError, match=r"testing_list\.txt:14: .*'\.\./secret\.wav'"):
        kws.read(own, 35, 0)


def test_a_file_in_both_lists_is_an_error(own: Path) -> None:
    with open(own / "testing_list.txt", "a") as stream:
        stream.write("cat/cc22e3a9_nohash_2.wav\n")
    with pytest.raises(DataError, match=r":14: cat/cc22e3a9.* is in validation_list\.txt too"):
        kws.read(own, 35, 0)


def test_a_split_without_clips_is_an_error(own: Path) -> None:
    (own / "validation_list.txt").write_text("")
    with pytest.raises(DataError, match=r"no clip to validate on in .*own"):
        kws.read(own, 35, 0)


def test_other_numbers_of_words_are_refused(commands: Path) -> None:
    with pytest.raises(UsageError, match="with 10 words: choose 12 or 35"):
        kws.read(commands, 10, 0)


def test_another_corpus_says_what_was_expected_and_found(corpus: Path) -> None:
    with pytest.raises(DataError) as caught:
        kws.read(corpus, 35, 0)
    assert "expected word/speaker_nohash_number.wav with validation_list.txt" in str(caught.value)
    assert "found train-small;" in str(caught.value)


def test_no_folder_or_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder: .*nowhere"):
        kws.read(tmp_path / "nowhere", 35, 0)
    with pytest.raises(DataError, match=r"nothing in .*; unpack Speech Commands v2 there"):
        kws.read(tmp_path, 35, 0)


def test_real_recordings() -> None:
    root = real_data("SpeechCommands")
    data = kws.read(root, 35, 0)
    assert [len(clips_of(data, split)) for split in SPLITS] == [529, 98, 100]
    assert len(data.labels) == 30
    assert data.skips == {}
    data = kws.read(root, 12, 0)
    assert [len(clips_of(data, split)) for split in SPLITS] == [58, 22, 29]
    assert Counter(clip.label for clip in data.test)["silence"] == 3
