"""A pretraining run goes on only with the corpus and the split it began with, wherever it lies."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from common import command
from partitions.corpus_record import CORPUS, CorpusRecord
from ssl_core.train import main

OPTIONS = [
    "--model", "tiny", "--architecture.num-hidden-layers", "1", "--length", "1s", "--batch", "2",
    "--eval-crops", "2", "--threads", "1", "--updates", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has taken its only update, beside its corpus; to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(corpus, folder / "corpus")
    arguments = ["--data", str(folder / "corpus"), *OPTIONS, "--output", str(folder / "run")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        assert main(arguments) == 0
    return folder


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Path:
    """A copy of a run and its corpus, which are not where the run began."""
    shutil.copytree(finished / "corpus", tmp_path / "corpus")
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path


def utterance(root: Path, speaker: int, number: int, seed: int) -> Path:
    path = root / "train-small" / str(speaker) / "1" / f"{speaker}-1-{number:04d}.flac"
    path.parent.mkdir(parents=True, exist_ok=True)
    sound = 0.1 * np.random.default_rng(seed).standard_normal(4 * 16_000)
    soundfile.write(path, sound, 16_000)
    return path


class Accepted:
    """Instead of the training of a run that may go on."""

    def __init__(self, *_: object) -> None: ...

    def run(self) -> None: ...


def another_speaker(root: Path) -> None:
    utterance(root, 9, 0, 9)


def another_file(root: Path) -> None:
    utterance(root, 1, 7, 9)


def another_subset(root: Path) -> None:
    shutil.copytree(root / "train-small" / "1", root / "train-more" / "1")


def removed_file(root: Path) -> None:
    (root / "train-small" / "2" / "1" / "2-1-0001.flac").unlink()


def renamed_speaker(root: Path) -> None:
    folder = root / "train-small"
    (folder / "3").rename(folder / "33")
    for path in (folder / "33" / "1").iterdir():
        path.rename(path.with_name(f"3{path.name}"))


def changed_audio(root: Path) -> None:
    path = root / "train-small" / "4" / "1" / "4-1-0000.flac"
    status = path.stat()
    utterance(root, 4, 0, 99)
    data = path.read_bytes()[: status.st_size].ljust(status.st_size, b"\0")
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def cut_short(root: Path) -> None:
    path = root / "train-small" / "5" / "1" / "5-1-0001.flac"
    path.write_bytes(path.read_bytes()[:-3000])


CHANGES: dict[Callable[[Path], None], str] = {
    another_speaker: "speakers: 1 added (9); files: 1 added (train-small/9/1/9-1-0000.flac)",
    another_file: "files: 1 added (train-small/1/1/1-1-0007.flac)",
    another_subset: "files: 2 added (train-more/1/1/1-1-0000.flac, train-more/1/1/1-1-0001.flac)",
    removed_file: "files: 1 removed (train-small/2/1/2-1-0001.flac)",
    renamed_speaker: "speakers: 1 added (33), 1 removed (3); files: 2 added (train-small/33/1/33",
    changed_audio: "files: 1 changed (train-small/4/1/4-1-0000.flac)",
    cut_short: "files: 1 changed (train-small/5/1/5-1-0001.flac)",
}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error line of a command that ends with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command.run(lambda _: main(arguments))
    error = capsys.readouterr().err
    assert stopped.value.code == 2, error
    assert len(error.strip().splitlines()) == 1
    return error


@pytest.mark.parametrize("change", CHANGES)
def test_another_corpus_is_refused_with_the_difference(
    change: Callable[[Path], None], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (place / "run" / CORPUS).read_bytes()
    change(place / "corpus")
    error = refused(["--resume", str(place / "run"), "--data", str(place / "corpus")], capsys)
    assert f"--resume {place / 'run'}: its corpus is not the one that the run began with" in error
    assert CHANGES[change] in error
    assert "Put it back as it was, or name one with the same audio by --data and --subset" in error
    assert (place / "run" / CORPUS).read_bytes() == before


def test_the_same_audio_in_another_place_is_accepted_and_remembered(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (place / "corpus").rglob("*.flac"):
        os.utime(path, ns=(1, 1))
    (place / "mount").symlink_to(place / "corpus")
    run = ["--resume", str(place / "run")]
    assert main([*run, "--data", str(place / "mount")]) == 0
    monkeypatch.setattr("ssl_core.train.CentralRun", Accepted)
    assert main(run) == 0
    (place / "corpus").rename(place / "LibriSpeech")  # found in its parent
    assert main([*run, "--data", str(place)]) == 0
    config = yaml.safe_load((place / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert (config["data"], config["resume"]) == (str(place), None)
    another_subset(place / "LibriSpeech")
    assert "files: 2 added" in refused(run, capsys)
    assert main([*run, "--subset", "train-small"]) == 0
    assert main(run) == 0
    assert "length was '1s' there and is '2s' now" in refused([*run, "--length", "2s"], capsys)


def test_the_split_is_that_of_the_beginning(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = CorpusRecord.read(place / "run")
    assert record is not None
    assert record.held_out
    assert len(record.files or {}) == 16
    monkeypatch.setattr("ssl_core.training.central.held_out_speakers", lambda *_: ("1", "2"))
    error = refused(["--resume", str(place / "run"), "--data", str(place / "corpus")], capsys)
    assert "this version divides it otherwise (held-out speakers: " in error
    assert "go on with the version that began the run" in error


def test_a_run_without_a_record_goes_on_and_gets_one(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("ssl_core.train.CentralRun", Accepted)
    run = place / "run"
    before = CorpusRecord.read(run)
    (run / CORPUS).unlink()
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    data = config["data"]
    error = refused(["--resume", str(run), "--data", str(place / "corpus")], capsys)
    assert f"data was '{data}' there and is '{place / 'corpus'}' now" in error
    (place / "link").symlink_to(data)
    assert main(["--resume", str(run), "--data", str(place / "link")]) == 0
    assert caplog.messages == [
        f"{run} began with a version that kept no record of its corpus: the corpus as it is now is "
        "taken for that of the run, and recorded"
    ]
    assert CorpusRecord.read(run) == before
    caplog.clear()
    assert main(["--resume", str(run), "--data", str(place / "corpus")]) == 0
    assert not caplog.messages
    (run / CORPUS).write_text(json.dumps({"version": 1, "files": 3}))
    with pytest.raises(SystemExit) as stopped:
        command.run(lambda _: main(["--resume", str(run)]))
    assert stopped.value.code == 1
    assert "corpus.json is damaged: delete it if" in capsys.readouterr().err
