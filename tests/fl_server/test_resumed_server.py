"""A ServerApp's run goes on only with the corpus and labels that the server began with."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
from tone_words import write_words

from common.errors import UsageError
from fl_client.federation_settings import RunSettings, from_run_config
from fl_client.local_data import load_manifest
from fl_client.task_data import load_pool
from fl_server.server_app import job_of, open_federation
from partitions.corpus_record import CORPUS, CorpusRecord
from ssl_core.training.run_directory import RunDirectory

PRETRAINING = {"model": "tiny", "length": "1s", "held-out": 0.25, "eval-crops": 2, "batch": 2}
TASK = {"task": "kws35", "method": "fedavg", "checkpoint": "random", "model": "tiny"}


def opened(settings: RunSettings, resume: Path | None = None) -> RunDirectory:
    """The run directory as `serve` opens it, in a process of its own."""
    load_manifest.cache_clear()
    load_pool.cache_clear()
    settings = dataclasses.replace(settings, resume=resume)
    return open_federation(settings, job_of(settings, "").record)


def settings_of(kind: dict[str, Any], data: Path, output: Path) -> RunSettings:
    return from_run_config({**kind, "data": str(data), "output": str(output)})


def test_the_held_out_speakers_stay_and_the_corpus_may_move(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    run = opened(settings_of(PRETRAINING, tmp_path / "corpus", tmp_path / "run")).path
    record = CorpusRecord.read(run)
    assert record is not None
    assert len(record.held_out or ()) == 2
    moved = (tmp_path / "corpus").rename(tmp_path / "moved")
    settings = settings_of(PRETRAINING, moved, tmp_path / "run")
    assert opened(settings, run).path == run
    with pytest.raises(UsageError, match="subset was '' there and is 'train-small' now"):
        # It is what the devices take too.
        opened(from_run_config({**PRETRAINING, "data": str(moved), "subset": "train-small"}), run)
    (moved / "train-small" / "1").rename(moved / "train-small" / "0")
    with pytest.raises(UsageError, match=r"speakers: 1 removed \(1\); files: 2 removed"):
        opened(settings, run)
    assert CorpusRecord.read(run) == record


def test_a_server_that_does_not_evaluate_needs_no_corpus(tmp_path: Path) -> None:
    settings = settings_of({**PRETRAINING, "held-out": 0.0}, tmp_path / "none", tmp_path / "run")
    run = opened(settings).path
    assert opened(settings, run).path == run
    assert not (run / CORPUS).exists()


def test_the_labels_of_a_shared_head_stay(tmp_path: Path) -> None:
    data = write_words(tmp_path / "words")
    run = opened(settings_of(TASK, data, tmp_path / "run")).path
    moved = data.rename(tmp_path / "moved")
    settings = settings_of(TASK, moved, tmp_path / "run")
    assert opened(settings, run).path == run
    (moved / "sheila").rename(moved / "sheilas")
    for name in ("validation", "testing"):
        path = moved / f"{name}_list.txt"
        path.write_text(path.read_text().replace("sheila/", "sheilas/"))
    with pytest.raises(UsageError, match=r"labels: 1 added \(sheilas\), 1 removed \(sheila\)"):
        opened(settings, run)
    changed = {**TASK, "checkpoint": "random", "seed": 0, "model": "tiny", "data": str(data)}
    record = CorpusRecord.read(run)
    assert record is not None
    dataclasses.replace(record, labels=None, backbone="other").write(run)
    (moved / "sheilas").rename(moved / "sheila")
    with pytest.raises(UsageError, match="the weights of the checkpoint are not those"):
        opened(from_run_config({**changed, "data": str(moved)}), run)
