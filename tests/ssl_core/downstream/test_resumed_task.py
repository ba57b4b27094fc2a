"""A run of a task goes on only with the clips, labels and backbone it began with."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_corpora import speech_commands, voices, write_tone
from small_models import save_backbone

from common import command
from partitions.corpus_record import CORPUS, CorpusRecord
from ssl_core.downstream.corpora.speaker import read_verification
from ssl_core.downstream.task_record import task_record
from ssl_core.finetune import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run beside its corpus and backbone; to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    speech_commands(folder / "words")
    save_backbone(folder / "backbone")
    arguments = ["--task", "kws35", "--data", str(folder / "words"), "--threads", "1"]
    arguments += ["--checkpoint", str(folder / "backbone"), "--epochs", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        assert main([*arguments, "--output", str(folder / "run")]) == 0
    return folder


def renamed_word(root: Path) -> None:
    (root / "no").rename(root / "nope")
    for name in ("validation", "testing"):
        path = root / f"{name}_list.txt"
        path.write_text(path.read_text().replace("no/", "nope/"))


def another_word(root: Path) -> None:
    write_tone(root / "yes" / "aa00_nohash_0.wav", 1000)


def another_clip(root: Path) -> None:
    write_tone(root / "up" / "aa77_nohash_0.wav", 800)


def removed_clip(root: Path) -> None:
    (root / "up" / "aa01_nohash_0.wav").unlink()


def clip_moved_to_training(root: Path) -> None:
    path = root / "testing_list.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def changed_audio(root: Path) -> None:
    path = root / "left" / "aa02_nohash_0.wav"
    status = path.stat()
    write_tone(path, 99, 4600)
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def another_backbone(root: Path) -> None:
    shutil.rmtree(root.parent / "backbone")
    save_backbone(root.parent / "backbone", seed=1)


CHANGES: dict[Callable[[Path], None], str] = {
    renamed_word: "labels: 1 added (nope), 1 removed (no); files: 8 added (nope/aa00",
    another_word: "labels: 1 added (yes); files: 1 added (yes/aa00_nohash_0.wav)",
    another_clip: "speakers: 1 added (aa77); files: 1 added (up/aa77_nohash_0.wav)",
    removed_clip: "files: 1 removed (up/aa01_nohash_0.wav)",
    clip_moved_to_training: "clips by label and split: 1 changed (down/aa06_nohash_0.wav)",
    changed_audio: "files: 1 changed (left/aa02_nohash_0.wav)",
    another_backbone: "the weights of the checkpoint are not those that the run began from",
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_corpus_or_backbone_is_refused(
    change: Callable[[Path], None],
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("words", "backbone", "run"):
        shutil.copytree(finished / name, tmp_path / name)
    change(tmp_path / "words")
    arguments = ["--resume", str(tmp_path / "run"), "--data", str(tmp_path / "words")]
    arguments += ["--checkpoint", str(tmp_path / "backbone")]
    with pytest.raises(SystemExit) as stopped:
        command.run(lambda _: main(arguments))
    error = capsys.readouterr().err
    assert stopped.value.code == 2, error
    assert CHANGES[change] in error
    assert len(error.strip().splitlines()) == 1


def test_corpus_and_backbone_may_move(finished: Path, tmp_path: Path) -> None:
    for name in ("words", "backbone", "run"):
        shutil.copytree(finished / name, tmp_path / name)
    record = CorpusRecord.read(tmp_path / "run")
    assert record is not None
    assert record.labels == ("down", "left", "no", "up")
    assert (record.clips or {})["up/aa06_nohash_0.wav"] == "test aa06 up"
    run = ["--resume", str(tmp_path / "run")]
    moved = ["--data", str(tmp_path / "words"), "--checkpoint", str(tmp_path / "backbone")]
    before = (tmp_path / "run" / "result.json").read_bytes()
    assert main([*run, *moved]) == 0
    assert main(run) == 0
    after = (tmp_path / "run" / "result.json").read_text(encoding="utf-8")
    assert after.replace(str(tmp_path), str(finished)) == before.decode()
    (tmp_path / "run" / CORPUS).unlink()  # as an older version left it
    assert main(run) == 0
    assert CorpusRecord.read(tmp_path / "run") == record


def test_another_list_of_trials_is_another_corpus(tmp_path: Path) -> None:
    root = voices(tmp_path / "voices")

    def record() -> CorpusRecord:
        data = read_verification(root)
        return task_record(data.root, {"test": data.test}, (), backbone="", trials=data.trials)

    before, path = record(), root / "veri_test.txt"
    assert before.refusal(record()) == ""
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert "clips by label and split: 1 removed (trial of wav/id8/" in before.refusal(record())
