"""Run directories: which may be used for a new run."""

from pathlib import Path

import pytest

from common.errors import UsageError
from partitions.corpus_record import CORPUS
from ssl_core.training.run_directory import CHECKPOINTS, METRICS, RunDirectory


@pytest.fixture
def begun(tmp_path: Path) -> RunDirectory:
    """A run that has failed before its first update, with all that it may have written."""
    run = RunDirectory.create(tmp_path / "run", "seed: 1\n")
    run.lock()
    run.identity()
    run.rewind(1)
    for name in (CORPUS, "manifest.tsv", "status.json"):
        (run.path / name).write_text("old")
    run.close()
    return run


def test_a_run_that_has_done_nothing_blocks_no_other(begun: RunDirectory) -> None:
    before = begun.identity()
    again = RunDirectory.create(begun.path, "seed: 2\n")
    assert [path.name for path in begun.path.iterdir()] == ["config.yaml"]
    assert (again.path / "config.yaml").read_text() == "seed: 2\n"
    assert again.identity() != before


@pytest.mark.parametrize("name", [METRICS, f"{CHECKPOINTS}/update-0000001", "my notes.txt"])
def test_whatever_a_run_has_done_is_kept(begun: RunDirectory, name: str) -> None:
    (begun.path / name).parent.mkdir(exist_ok=True)
    (begun.path / name).write_text("")
    before = sorted(path.name for path in begun.path.iterdir())
    with pytest.raises(UsageError, match="is not empty: choose another, or go on with --resume"):
        RunDirectory.create(begun.path, "seed: 2\n")
    assert sorted(path.name for path in begun.path.iterdir()) == before


def test_files_without_a_run_are_kept(tmp_path: Path) -> None:
    (tmp_path / "manifest.tsv").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        RunDirectory.create(tmp_path, "")
    assert (tmp_path / "manifest.tsv").read_text() == "mine"


def test_a_run_that_has_just_begun_is_not_taken_over(begun: RunDirectory) -> None:
    begun.lock()
    with pytest.raises(UsageError, match="is not empty"):
        RunDirectory.create(begun.path, "seed: 2\n")
    begun.close()
    assert (begun.path / "config.yaml").read_text() == "seed: 1\n"
