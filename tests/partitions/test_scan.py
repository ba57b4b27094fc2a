"""A second scan opens no file that has not changed; whatever has changed is read again."""

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import Writer

from partitions import fingerprints, manifest_text, scan
from partitions.librispeech import find_utterances
from partitions.manifest import Manifest, Piece, Sequence, Sequences
from partitions.manifest_text import read_manifest, write_manifest
from partitions.prepared import prepare
from partitions.recut import recut


@pytest.fixture
def corpus(root: Path, write: Writer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three speakers, whose files count as settled."""
    monkeypatch.setattr(fingerprints, "SETTLED", -1.0)
    for speaker in (1, 2, 10):
        write("train-a", speaker, 1, 0, samples=40_000)
        write("train-a", speaker, 1, 1, samples=20_000, suffix="wav")
    return root


def unexpected(*_: Any, **__: Any) -> Any:
    raise AssertionError("a file was read again")


def test_the_second_start_opens_no_file(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(corpus, (), 1.0)
    monkeypatch.setattr(scan, "fingerprints", unexpected)
    monkeypatch.setattr(scan, "samples_of", unexpected)
    second = prepare(corpus, (), 1.0)
    assert second == first
    assert second.files == first.files
    assert len(second.files) == 6
    assert second.sequences.columns.path == first.sequences.columns.path


def test_what_has_changed_is_read_again(corpus: Path, write: Writer) -> None:
    assert prepare(corpus, (), 1.0).total_samples == 180_000
    path = write("train-a", 2, 1, 1, samples=30_000, suffix="wav")
    assert prepare(corpus, (), 1.0).total_samples == 190_000
    os.utime(path, ns=(-(10**18), -(10**18)))  # before 1970
    assert prepare(corpus, (), 1.0).total_samples == 190_000
    path.unlink()
    assert prepare(corpus, (), 1.0).total_samples == 160_000
    path.mkdir()
    found = prepare(corpus, (), 1.0)
    assert (found.total_samples, found.skips) == (160_000, {"unreadable": 1})


def test_columns_are_those_of_the_objects(corpus: Path) -> None:
    found = prepare(corpus, (), 1.0)
    again = recut(find_utterances(corpus), 1.0)
    assert found == again
    assert Sequences.of(found.sequences) == found.sequences
    assert found.speakers == ("1", "2", "10")
    assert [pieces for _, pieces in found.sequences.rows()] == [
        [(list(found.sequences.paths).index(p.path), p.start, p.samples) for p in each.pieces]
        for each in found.sequences
    ]


def test_a_large_text_is_parsed_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [(Piece(f"a/{n}.wav", 0, 5), Piece(f"a/{n + 1}.wav", 2, 1)) for n in range(100)]
    monkeypatch.setattr(manifest_text, "_LARGE", 1000)
    sequences = Sequences.of(Sequence("1", each) for each in pieces)
    manifest = Manifest(Path("/corpus"), 1.0, sequences, 1)
    write_manifest(tmp_path / "m.tsv", manifest)
    (kept,) = (cache / "shortwave" / "manifests").iterdir()
    found = read_manifest(tmp_path / "m.tsv")
    assert (found, found.sequences.columns.path) == (manifest, kept)
    kept.unlink()
    parsed = read_manifest(tmp_path / "m.tsv", Path("/other"))
    assert parsed.sequences == manifest.sequences
    assert (parsed.root, parsed.sequences.columns.path) == (Path("/other"), kept)
    assert read_manifest(tmp_path / "m.tsv").root == Path("/corpus")


@pytest.mark.parametrize("quick", [0.0, 1.0])
def test_threads_give_the_same(corpus: Path, monkeypatch: pytest.MonkeyPatch, quick: float) -> None:
    monkeypatch.setattr(scan, "_QUICK", quick)
    monkeypatch.setattr(scan, "_TOGETHER", 2)
    assert prepare(corpus, (), 1.0) == recut(find_utterances(corpus), 1.0)
