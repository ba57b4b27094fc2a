"""VoxCeleb1: the paper's and the official split, chunks, and trials of untrained speakers."""

from collections import Counter
from pathlib import Path

import pytest
from noise_files import real_data, write_noise

from common.errors import DataError, UsageError
from partitions.manifest import Piece
from ssl_core.downstream.clips import Clip, Trial
from ssl_core.downstream.corpora import speaker

SECOND = 16_000


@pytest.fixture
def voxceleb(tmp_path: Path) -> Path:
    """Three speakers with 20, 4 and 1 utterances to train on, two with 2 each in the trials."""
    root = tmp_path / "VoxCeleb1"
    for name, count in (("id1", 20), ("id2", 4), ("id3", 1), ("id8", 2), ("id9", 2)):
        for number in range(count):
            write_noise(root / "wav" / name / f"video{number % 2}" / f"{number:05d}.wav")
    (root / "veri_test.txt").write_text(
        "1 id9/video0/00000.wav id9/video1/00001.wav\n"
        "0 id9/video0/00000.wav id8/video0/00000.wav\n"
        "\n"
        "0 id8/video0/00000.wav id9/video1/00001.wav\n"
    )
    (root / "iden_split.txt").write_text(
        "1 id1/video0/00000.wav\n2 id1/video1/00001.wav\n3 id1/video0/00002.wav\n"
        "1 id9/video0/00000.wav\n3 id9/video1/00001.wav\n"
    )
    return root


def test_the_paper_identifies_the_speakers_that_no_trial_names(voxceleb: Path) -> None:
    data = speaker.read_identification(voxceleb, 0)
    assert data.labels == ("id1", "id2", "id3")
    assert Counter(clip.label for clip in data.train) == {"id1": 18, "id2": 3, "id3": 1}
    assert Counter(clip.label for clip in data.valid) == {"id1": 2, "id2": 1}
    assert data.test == data.valid
    names = [clip.name for clip in (*data.train, *data.valid)]
    assert len(names) == len(set(names)) == 25
    assert all(clip.speaker == clip.label == clip.name.split("/")[1] for clip in data.train)
    assert data.skips == {}


def test_the_tenth_is_drawn_by_the_seed_alone(voxceleb: Path) -> None:
    drawn = [speaker.read_identification(voxceleb, seed).valid for seed in range(4)]
    assert drawn[0] == speaker.read_identification(voxceleb.parent, 0).valid
    assert drawn[0] == speaker.read_identification(voxceleb / "wav", 0).valid
    assert len(set(drawn)) == 4
    # The choice among a speaker's utterances does not depend on other speakers.
    write_noise(voxceleb / "wav" / "id0" / "video" / "00000.wav")
    of_first = [clip for clip in drawn[0] if clip.speaker == "id1"]
    again = speaker.read_identification(voxceleb, 0).valid
    assert [clip for clip in again if clip.speaker == "id1"] == of_first


def test_the_official_split_is_that_of_the_list(voxceleb: Path) -> None:
    data = speaker.read_identification(voxceleb, 0, "official")
    assert [clip.name for clip in data.train] == [
        "wav/id1/video0/00000.wav",
        "wav/id9/video0/00000.wav",
    ]
    assert [clip.name for clip in data.valid] == ["wav/id1/video1/00001.wav"]
    assert [clip.label for clip in data.test] == ["id1", "id9"]


def test_only_training_is_cut_into_chunks(voxceleb: Path) -> None:
    for path in (voxceleb / "wav" / "id1").rglob("*.wav"):
        write_noise(path, 7 * SECOND)
    data = speaker.read_identification(voxceleb, 0)
    first = [clip.piece for clip in data.train if clip.speaker == "id1"]
    assert len(first) == 36
    assert {(piece.start, piece.samples) for piece in first} == {
        (0, 3 * SECOND),
        (3 * SECOND, 3 * SECOND),
    }
    assert {clip.piece.samples for clip in data.valid if clip.speaker == "id1"} == {7 * SECOND}


@pytest.mark.parametrize(
    ("samples", "starts", "length"),
    [
        (3 * SECOND, [0], 3 * SECOND),
        (3 * SECOND - 1, [0], 3 * SECOND - 1),
        (6 * SECOND - 1, [0], 3 * SECOND),
        (9 * SECOND, [0, 3 * SECOND, 6 * SECOND], 3 * SECOND),
    ],
)
def test_chunks(samples: int, starts: list[int], length: int) -> None:
    clip = Clip(Piece("a.wav", 5, samples), "ann", "label", "text")
    cut = speaker.chunks(clip, 3.0)
    assert [each.piece for each in cut] == [Piece("a.wav", 5 + start, length) for start in starts]
    assert all((each.speaker, each.label, each.text) == ("ann", "label", "text") for each in cut)
    assert [again for each in cut for again in speaker.chunks(each, 3.0)] == cut


def test_chunks_without_length_are_refused() -> None:
    with pytest.raises(UsageError, match="chunks of 0 s hold no audio"):
        speaker.chunks(Clip(Piece("a.wav", 0, 5)), 0.0)


def test_verification_tests_each_file_once_and_on_new_voices(voxceleb: Path) -> None:
    data = speaker.read_verification(voxceleb, 0)
    assert data.trials == (
        Trial(True, "wav/id9/video0/00000.wav", "wav/id9/video1/00001.wav"),
        Trial(False, "wav/id9/video0/00000.wav", "wav/id8/video0/00000.wav"),
        Trial(False, "wav/id8/video0/00000.wav", "wav/id9/video1/00001.wav"),
    )
    assert [clip.name for clip in data.test] == [
        "wav/id8/video0/00000.wav",
        "wav/id9/video0/00000.wav",
        "wav/id9/video1/00001.wav",
    ]
    trained = {clip.speaker for clip in (*data.train, *data.valid)}
    assert trained == {"id1", "id2", "id3"}
    identification = speaker.read_identification(voxceleb, 0)
    assert (data.train, data.valid) == (identification.train, identification.valid)


def test_missing_trials(voxceleb: Path) -> None:
    (voxceleb / "veri_test.txt").unlink()
    for read in (speaker.read_verification, speaker.read_identification):
        with pytest.raises(DataError, match=r"no veri_test\.txt in .*VoxCeleb1; .*download it"):
            read(voxceleb, 0)
    assert len(speaker.read_identification(voxceleb, 0, "official").train) == 2
    (voxceleb / "iden_split.txt").unlink()
    with pytest.raises(DataError, match=r"no iden_split\.txt in .*VoxCeleb1"):
        speaker.read_identification(voxceleb, 0, "official")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("1 id9/video0/00000.wav", "expected 0 or 1 and two files"),
        ("2 id9/video0/00000.wav id9/video1/00001.wav", "expected 0 or 1 and two files"),
        ("1 id9/video0/00000.wav id9/../id1/video0/00000.wav", "a path .* '..'"),
        ("1 id9/00000.wav id9/00001.wav", "'id9/00000.wav' is not idXXXXX/video/number.wav"),
        ("0 id9/video0/00000.wav id9/video1/00001.wav", "0 contradicts the speakers of id9"),
    ],
)
def test_a_bad_trial_is_named(voxceleb: Path, line: str, problem: str) -> None:
    with open(voxceleb / "veri_test.txt", "a") as stream:
        stream.write(f"{line}\n")
    for read in (speaker.read_verification, speaker.read_identification):
        with pytest.raises(DataError, match=rf"veri_test\.txt:5: {problem}"):
            read(voxceleb, 0)


def test_trials_of_missing_files_are_named_and_counted(voxceleb: Path) -> None:
    (voxceleb / "wav" / "id8" / "video0" / "00000.wav").unlink()
    (voxceleb / "wav" / "id9" / "video1" / "00001.wav").write_bytes(b"")
    with pytest.raises(
        DataError,
        match=r"veri_test\.txt:1: wav/id9/video1/00001\.wav is empty .* 2 of the 3 files in trials",
    ):
        speaker.read_verification(voxceleb, 0)
    assert len(speaker.read_identification(voxceleb, 0).valid) == 3


@pytest.mark.parametrize(("kept", "lacking"), [(1, "different speakers"), (0, "the same speaker")])
def test_trials_of_one_kind_have_no_error_rate(voxceleb: Path, kept: int, lacking: str) -> None:
    lines = (voxceleb / "veri_test.txt").read_text().splitlines()
    chosen = [line for line in lines if line.startswith(str(kept))]
    (voxceleb / "veri_test.txt").write_text("\n".join(chosen))
    with pytest.raises(DataError, match=f"no trial of {lacking}"):
        speaker.read_verification(voxceleb, 0)
    (voxceleb / "veri_test.txt").write_text("\n")
    with pytest.raises(DataError, match="no trial in it"):
        speaker.read_identification(voxceleb, 0)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("4 id1/video0/00004.wav", "expected 1, 2 or 3 and a file"),
        ("1", "expected 1, 2 or 3 and a file"),
        ("2 id1/video0/00000.wav", "id1/video0/00000.wav is listed twice"),
        ("1 /etc/video0/00000.wav", "a path 'wav//etc/video0/00000.wav' with an empty part"),
    ],
)
def test_a_bad_line_of_the_official_split_is_named(voxceleb: Path, line: str, problem: str) -> None:
    with open(voxceleb / "iden_split.txt", "a") as stream:
        stream.write(f"{line}\n")
    with pytest.raises(DataError, match=rf"iden_split\.txt:6: {problem}"):
        speaker.read_identification(voxceleb, 0, "official")


def test_skipped_files_are_counted(voxceleb: Path) -> None:
    (voxceleb / "wav" / "id1" / "video0" / "00004.wav").write_bytes(b"no audio")
    assert speaker.read_identification(voxceleb, 0).skips == {"unreadable": 1}
    with open(voxceleb / "iden_split.txt", "a") as stream:
        stream.write("1 id7/video0/00000.wav\n2 id2/video0/00000.wav\n")
    data = speaker.read_identification(voxceleb, 0, "official")
    assert data.skips == {"missing": 1, "speaker without clips to train on": 1}


def test_one_speaker_cannot_be_identified(voxceleb: Path) -> None:
    for name in ("id2", "id3"):
        (voxceleb / "wav" / name).rename(voxceleb / name)
    with pytest.raises(DataError, match=r"clips of 1 speakers to train on .*, two are needed"):
        speaker.read_identification(voxceleb, 0)


def test_an_unknown_split_is_refused(voxceleb: Path) -> None:
    with pytest.raises(UsageError, match="no split 'random' of VoxCeleb1"):
        speaker.read_identification(voxceleb, 0, "random")  # type: ignore[arg-type]


def test_another_corpus_says_what_was_expected_and_found(corpus: Path) -> None:
    with pytest.raises(DataError, match=r"expected wav/idXXXXX/video/number\.wav .* train-small"):
        speaker.read_identification(corpus, 0)
    with pytest.raises(DataError, match=r"expected wav/idXXXXX/video/number\.wav .* train-small"):
        speaker.read_verification(corpus, 0)


def test_real_recordings() -> None:
    root = real_data("VoxCeleb1-layout")
    data = speaker.read_identification(root, 0)
    assert [len(data.train), len(data.valid), len(data.labels)] == [70, 10, 10]
    data = speaker.read_identification(root, 0, "official")
    assert [len(data.train), len(data.valid), len(data.test)] == [85, 17, 34]
    data = speaker.read_verification(root, 0)
    assert [len(data.trials), len(data.test)] == [300, 56]
    assert not {c.speaker for c in data.test} & {c.speaker for c in (*data.train, *data.valid)}
    assert data.skips == {}
