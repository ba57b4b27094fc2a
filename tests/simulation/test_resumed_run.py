"""A simulation goes on only with its corpus, parts and manifest, wherever the corpus lies."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tone_words import write_backbone, write_words

from common import command
from fl_client.local_data import load_manifest
from fl_client.task_data import load_pool
from partitions.corpus_record import CORPUS, CorpusRecord
from partitions.manifest_text import read_manifest
from simulation import simulate

SMALL = [
    "--model", "tiny", "--architecture.num-hidden-layers", "1", "--length", "1s", "--clients", "3",
    "--clients-per-round", "2", "--held-out", "0.25", "--seed", "7",
]  # fmt: skip
TASK = [
    "--task", "kws35", "--method", "fedper", "--share", "lora", "--lora-rank", "2", "--clients",
    "3", "--clients-per-round", "3",
]  # fmt: skip


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Node configs of the clients of each simulation, which ends before its first round."""
    nodes: list[Any] = []
    monkeypatch.setattr(simulate, "run_on_ray", lambda *given: nodes.append(given[2]))
    monkeypatch.setattr(simulate, "write_report", lambda *_: "report.md")
    return nodes


@pytest.fixture
def copied(corpus: Path, tmp_path: Path) -> Path:
    shutil.copytree(corpus, tmp_path / "corpus")
    return tmp_path / "corpus"


def resume(run: Path, *options: object) -> int:
    load_pool.cache_clear()  # a resumed run is another process
    load_manifest.cache_clear()
    return simulate.main(["--resume", str(run), *map(str, options)])


def refused(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command.run(lambda _: resume(run, "--data", data))
    error = capsys.readouterr().err
    assert stopped.value.code == 2, error
    assert len(error.strip().splitlines()) == 1
    return error


def test_pretraining_keeps_its_manifest_and_follows_its_corpus(
    begun: list[Any], copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    simulate.main(["--data", str(copied), *SMALL, "--output", str(run)])
    manifest = (run / "manifest.tsv").read_bytes()
    record = CorpusRecord.read(run)
    assert record is not None
    assert len(record.held_out or ()) == 2
    moved = tmp_path / "mount" / "LibriSpeech"
    moved.parent.mkdir()
    copied.rename(moved)
    assert resume(run, "--data", moved.parent) == 0
    assert resume(run) == 0
    assert begun[0] == begun[1] == begun[2]
    assert (run / "manifest.tsv").read_bytes() == manifest
    # Clients and server read the manifest of the run, with the corpus where it is now.
    found = load_manifest(moved.parent, (), 1.0, begun[2][0]["manifest"])
    assert (found.root, len(found.speakers)) == (moved, 8)

    shutil.copytree(moved / "train-small" / "1", moved / "train-small" / "11")
    for path in (moved / "train-small" / "11" / "1").iterdir():
        path.rename(path.with_name(f"1{path.name}"))
    error = refused(run, moved, capsys)
    assert "speakers: 1 added (11); files: 2 added (train-small/11/1/11-1-0000.flac, " in error
    assert (run / "manifest.tsv").read_bytes() == manifest
    assert CorpusRecord.read(run) == record


def test_an_older_run_is_compared_with_its_manifest(
    begun: list[Any], copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    simulate.main(["--data", str(copied), *SMALL, "--output", str(run)])
    record = CorpusRecord.read(run)
    (run / CORPUS).unlink()
    moved = copied.rename(tmp_path / "moved")
    gone = moved / "train-small" / "8" / "1" / "8-1-0001.flac"
    gone.rename(tmp_path / "8-1-0001.flac")
    error = refused(run, moved, capsys)
    assert "its corpus is not the one of its manifest.tsv: files: 1 removed (train-small/8" in error
    assert not (run / CORPUS).exists()
    (tmp_path / "8-1-0001.flac").rename(gone)
    assert resume(run, "--data", moved) == 0
    assert CorpusRecord.read(run) == record
    assert read_manifest(run / "manifest.tsv").root == copied
    assert len(begun) == 2


def test_a_task_keeps_labels_parts_and_backbone(
    begun: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = write_words(tmp_path / "words"), tmp_path / "run"
    backbone = write_backbone(tmp_path / "backbone")
    options = ["--data", str(data), "--checkpoint", str(backbone), *TASK, "--output", str(run)]
    assert simulate.main(options) == 0
    record = CorpusRecord.read(run)
    assert record is not None
    assert len(record.clips or {}) == len(record.files or {}) == 48
    moved = data.rename(tmp_path / "moved")
    weights = backbone.rename(tmp_path / "weights")
    assert resume(run, "--data", moved, "--checkpoint", weights) == 0
    assert resume(run) == 0
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert (config["data"], config["checkpoint"]) == (str(moved), str(weights))
    shutil.copytree(moved / "marvin", moved / "mother")
    assert "labels: 1 added (mother); files: 12 added (mother/aa00" in refused(run, moved, capsys)
    shutil.rmtree(moved / "mother")
    shutil.rmtree(weights)
    write_backbone(weights, seed=1)
    assert "the weights of the checkpoint are not those" in refused(run, moved, capsys)
    assert CorpusRecord.read(run) == record
    assert len(begun) == 3
