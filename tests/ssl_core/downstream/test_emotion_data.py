"""IEMOCAP and EmoDB: four emotions, folds by speaker, and the right speaker of a clip."""

from collections import Counter
from pathlib import Path

import pytest
from noise_files import real_data, write_noise

from common.errors import DataError, UsageError
from ssl_core.downstream.corpora import emotion

EMOTIONS = ("ang", "hap", "exc", "neu", "sad", "fru", "xxx")


def write_dialogue(root: Path, session: int, wearer: str, name: str) -> None:
    """One dialogue in which both speakers show every emotion once."""
    dialogue = f"Ses{session:02d}{wearer}_{name}"
    folder = root / f"Session{session}"
    lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
    for voice in "FM":
        for number, label in enumerate(EMOTIONS):
            utterance = f"{dialogue}_{voice}{number:03d}"
            lines += [
                f"[6.29 - 8.23]\t{utterance}\t{label}\t[2.5, 2.5, 2.5]",
                "C-E2:\tNeutral;\t()",
            ]
            write_noise(folder / "sentences" / "wav" / dialogue / f"{utterance}.wav")
    labels = folder / "dialog" / "EmoEvaluation"
    labels.mkdir(parents=True, exist_ok=True)
    (labels / f"{dialogue}.txt").write_text("\n".join(lines) + "\n")
    (labels / f"._{dialogue}.txt").write_bytes(b"\x00\x05\x16\x07")


@pytest.fixture
def iemocap(tmp_path: Path) -> Path:
    root = tmp_path / "IEMOCAP_full_release"
    for session in range(1, 6):
        write_dialogue(root, session, "F", "impro01")
        write_dialogue(root, session, "M", "script02_1")
    return root


@pytest.mark.parametrize(("fold", "test", "valid"), [(1, 1, 2), (3, 3, 4), (5, 5, 1)])
def test_a_fold_tests_on_one_session_and_validates_on_the_next(
    iemocap: Path, fold: int, test: int, valid: int
) -> None:
    data = emotion.read(iemocap, fold, 0)
    assert data.labels == ("ang", "hap", "neu", "sad")
    assert {clip.speaker for clip in data.test} == {f"Ses{test:02d}F", f"Ses{test:02d}M"}
    assert {clip.speaker for clip in data.valid} == {f"Ses{valid:02d}F", f"Ses{valid:02d}M"}
    assert len({clip.speaker for clip in data.train}) == 6
    everyone = [{clip.speaker for clip in split} for split in (data.train, data.valid, data.test)]
    assert sum(len(speakers) for speakers in everyone) == len(set().union(*everyone)) == 10
    # Excited counts as happy; frustration and no agreement are skipped.
    counts = Counter(clip.label for clip in data.test)
    assert counts == {"ang": 4, "hap": 8, "neu": 4, "sad": 4}
    assert data.skips == {"another emotion": 40}


def test_the_speaker_is_who_speaks_and_not_who_wears_the_sensors(iemocap: Path) -> None:
    data = emotion.read(iemocap, 1, 0)
    first = data.test[0]
    assert first.name == "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav"
    assert first.speaker == "Ses01F"
    speakers = {clip.name.rpartition("/")[2]: clip.speaker for clip in data.test}
    assert speakers["Ses01F_impro01_M000.wav"] == "Ses01M"
    assert speakers["Ses01M_script02_1_F003.wav"] == "Ses01F"


def test_the_test_sets_of_all_folds_are_the_corpus(iemocap: Path) -> None:
    assert emotion.count_folds(iemocap) == 5
    names = [clip.name for fold in range(1, 6) for clip in emotion.read(iemocap, fold, 0).test]
    assert len(names) == len(set(names)) == 100


def test_the_seed_and_the_parent_folder_change_nothing(iemocap: Path) -> None:
    assert emotion.read(iemocap, 2, 0) == emotion.read(iemocap.parent, 2, 7)


def test_bad_files_are_counted_by_reason(iemocap: Path) -> None:
    folder = iemocap / "Session2" / "sentences" / "wav" / "Ses02F_impro01"
    (folder / "Ses02F_impro01_F000.wav").unlink()
    (folder / "Ses02F_impro01_F001.wav").write_bytes(b"")
    (folder / "Ses02F_impro01_F002.wav").write_bytes(b"no audio")
    data = emotion.read(iemocap, 2, 0)
    assert data.skips == {"another emotion": 40, "missing": 1, "empty": 1, "unreadable": 1}
    assert len(data.test) == 17


@pytest.mark.parametrize("fold", [0, 6, -1])
def test_unknown_folds_are_refused(iemocap: Path, fold: int) -> None:
    with pytest.raises(UsageError, match=rf"no fold {fold} of .*: choose 1 to 5"):
        emotion.read(iemocap, fold, 0)


def test_a_missing_session_is_an_error(iemocap: Path) -> None:
    (iemocap / "Session4").rename(iemocap / "Session 4")
    with pytest.raises(DataError, match=r"no usable clip in .*Session4; the folds need all 5"):
        emotion.read(iemocap, 1, 0)


@pytest.mark.parametrize(
    "line",
    [
        "[1.0 - 2.0]\tSes01F_impro01_F000",
        "[1.0 - 2.0] Ses01F_impro01_F000 ang",
        "[1.0 - 2.0]\t../../secret\tang\t[]",
    ],
)
def test_a_bad_line_is_named(iemocap: Path, line: str) -> None:
    path = iemocap / "Session1" / "dialog" / "EmoEvaluation" / "Ses01F_impro01.txt"
    path.write_text(f"% header\n\n{line}\n")
    with pytest.raises(DataError, match=r"Ses01F_impro01\.txt:3: expected '\[start - end\]'"):
        emotion.read(iemocap, 1, 0)


def test_an_utterance_labelled_twice_is_an_error(iemocap: Path) -> None:
    path = iemocap / "Session1" / "dialog" / "EmoEvaluation" / "Ses01F_impro01.txt"
    path.write_text("[1 - 2]\tSes01F_impro01_F000\tang\t[]\n" * 2)
    with pytest.raises(DataError, match=r":2: Ses01F_impro01_F000 is labelled twice"):
        emotion.read(iemocap, 1, 0)


def write_emodb(root: Path, speakers: int) -> Path:
    rows = ["id,path,duration,emotion,speaker"]
    for speaker in range(3, 3 + speakers):
        for label in ("ang", "hap", "neu", "sad", "bored"):
            path = f"data/{speaker:02d}/{label}.flac"
            rows.append(f"x,{path},0.1,{label},{speaker:02d}")
            write_noise(root / path)
    rows.append("x,heldout/99/ang.flac,0.1,ang,99")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return root


def test_emodb_leaves_two_speakers_out(tmp_path: Path) -> None:
    root = write_emodb(tmp_path / "emodb", 8)
    assert emotion.count_folds(root) == 4
    data = emotion.read(root, 4, 0)
    assert {clip.speaker for clip in data.test} == {"09", "10"}
    assert {clip.speaker for clip in data.valid} == {"03", "04"}
    assert {clip.speaker for clip in data.train} == {"05", "06", "07", "08"}
    assert data.skips == {"another emotion": 8, "missing": 1}


def test_an_odd_speaker_joins_the_last_pair(tmp_path: Path) -> None:
    root = write_emodb(tmp_path / "emodb", 7)
    assert emotion.count_folds(root) == 3
    assert {clip.speaker for clip in emotion.read(root, 3, 0).test} == {"07", "08", "09"}


def test_too_few_speakers(tmp_path: Path) -> None:
    root = write_emodb(tmp_path / "emodb", 5)
    with pytest.raises(
        DataError, match=r"clips of 5 speakers in .*, six are needed: two to train on"
    ):
        emotion.read(root, 1, 0)


def test_an_emotion_without_clips_to_train_on(tmp_path: Path) -> None:
    root = write_emodb(tmp_path / "emodb", 6)
    for speaker in ("07", "08"):
        (root / "data" / speaker / "sad.flac").unlink()
    with pytest.raises(DataError, match=r"fold 1 of .* has no clip of 'sad' to train on"):
        emotion.read(root, 1, 0)


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("path,emotion\na.wav,ang\n", r"no column 'speaker' \(found path, emotion\)"),
        ("path,emotion,speaker\n../a.wav,ang,1\n", r"labels\.csv:2: a path '\.\./a\.wav'"),
        ("path,emotion,speaker\na.wav,ang,\n", r"labels\.csv:2: no speaker"),
        ("path,emotion,speaker\na.wav\n", r"labels\.csv:2: fewer columns"),
        ("path,emotion,speaker\na,ang,1\n\na,sad,1\n", r"labels\.csv:4: a is labelled twice"),
    ],
)
def test_bad_tables(tmp_path: Path, table: str, problem: str) -> None:
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(DataError, match=problem):
        emotion.read(tmp_path, 1, 0)


def test_another_corpus_says_what_was_expected_and_found(corpus: Path) -> None:
    with pytest.raises(DataError, match=r"expected Session1 to Session5 with .* found train-small"):
        emotion.read(corpus, 1, 0)


def test_real_recordings() -> None:
    root = real_data("emotion-emodb")
    assert emotion.count_folds(root) == 4
    sizes = []
    for fold in range(1, 5):
        data = emotion.read(root, fold, 0)
        sizes.append((len(data.train), len(data.valid), len(data.test)))
        assert data.skips == {"missing": 73}
    assert sizes == [(134, 51, 81), (158, 57, 51), (132, 77, 57), (108, 81, 77)]
