"""The record of a run's corpus: what it takes for a change, and how it says so."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Writer

from common.errors import DataError
from partitions.corpus_record import CORPUS, NOTHING, CorpusRecord, difference, record_of
from partitions.manifest import Manifest, Piece, Sequence, Sequences
from partitions.prepared import prepare
from partitions.speakers import held_out_speakers, partition

RECORD = CorpusRecord(
    files={"train-a/1/1/1-1-0.flac": "aa", "train-a/2/1/2-1-0.flac": "bb"},
    speakers=("1", "2"),
    labels=(" ", "'", "\ue000"),
    clips={"a.wav": "train 1 yes", "b.wav": "test 2 no"},
    held_out=("2",),
    split="cc",
    backbone="dd",
)
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "files added": (
        {"files": dict(RECORD.files or {}) | {f"x/{n}.flac": "" for n in (10, 9, 8, 11)}},
        "files: 4 added (x/10.flac, x/11.flac, x/8.flac, ...)",
    ),
    "a file removed": (
        {"files": {"train-a/1/1/1-1-0.flac": "aa"}},
        "files: 1 removed (train-a/2/1/2-1-0.flac)",
    ),
    "a file changed": (
        {"files": {"train-a/1/1/1-1-0.flac": "ab", "train-a/2/1/2-1-0.flac": "bb"}},
        "files: 1 changed (train-a/1/1/1-1-0.flac)",
    ),
    "a speaker renamed": ({"speakers": ("1", "3")}, "speakers: 1 added (3), 1 removed (2)"),
    "a label that is not printable": ({"labels": (" ", "'")}, r"labels: 1 removed ('\ue000')"),
    "labels in another order": ({"labels": ("'", " ", "\ue000")}, "labels in another order"),
    "a clip with another label": (
        {"clips": {"a.wav": "train 1 no", "b.wav": "test 2 no"}},
        "clips by label and split: 1 changed (a.wav)",
    ),
    "other held-out speakers": ({"held_out": ("1",)}, "divides it otherwise (held-out speakers: 1"),
    "another division": ({"split": "ce"}, "(other sequences or parts): go on with the version"),
    "another backbone": ({"backbone": "de"}, "the weights of the checkpoint are not those"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_named(name: str) -> None:
    change, text = CHANGES[name]
    now = dataclasses.replace(RECORD, **change)
    assert text in RECORD.refusal(now)
    assert now.refusal(RECORD)
    assert RECORD.refusal(RECORD) == RECORD.refusal(NOTHING) == NOTHING.refusal(now) == ""


def test_what_follows_from_another_change_is_not_listed() -> None:
    now = dataclasses.replace(
        RECORD, files={}, clips={}, held_out=(), split="other", backbone="other"
    )
    assert RECORD.refusal(now) == (
        "its corpus is not the one that the run began with: files: 2 removed "
        "(train-a/1/1/1-1-0.flac, train-a/2/1/2-1-0.flac). Put it back as it was, or name one with "
        "the same audio by --data, or begin another run"
    )


def test_it_is_read_as_it_was_written_and_completed(tmp_path: Path) -> None:
    assert CorpusRecord.read(tmp_path) is None
    RECORD.write(tmp_path)
    assert CorpusRecord.read(tmp_path) == RECORD
    text = (tmp_path / CORPUS).read_text(encoding="utf-8")
    assert json.loads(text)["held_out"] == ["2"]
    assert len(text.splitlines()) == 14  # one an entry
    part = CorpusRecord(labels=("a",))
    part.write(tmp_path)
    assert CorpusRecord.read(tmp_path) == part
    assert part.completed(RECORD) == dataclasses.replace(RECORD, labels=("a",))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"version": 1, "files": ["a"]}', '{"version": 1, "labels": [1]}', "\xff"],
)
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / CORPUS).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"corpus.json is damaged: delete it if"):
        CorpusRecord.read(tmp_path)
    (tmp_path / CORPUS).write_text('{"version": 2}')
    with pytest.raises(DataError, match="of another version"):
        CorpusRecord.read(tmp_path)


def test_the_record_of_a_corpus_has_its_split(root: Path, write: Writer) -> None:
    for speaker in range(1, 7):
        write("train-a", speaker, 1, speaker, samples=40_000)
    manifest = prepare(root, (), 1.0)
    excluded = held_out_speakers(manifest, 0.2)
    parts = partition(manifest, 3, "speaker", 0, excluded)
    record = record_of(manifest, excluded, parts)
    assert sorted(record.files or {}) == [f"train-a/{n}/1/{n}-1-000{n}.flac" for n in range(1, 7)]
    assert (record.speakers, record.held_out) == (manifest.speakers, excluded)
    assert record_of(prepare(root, (), 1.0), excluded, parts) == record
    others = [record_of(manifest, excluded, parts[::-1]), record_of(manifest, excluded)]
    assert len({record.split, *(other.split for other in others)}) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("partitions.corpus_record.FORMAT_VERSION", 99)
        assert "other sequences or parts" in record.refusal(record_of(manifest, excluded, parts))


def test_manifests_of_other_sequences_differ() -> None:
    def manifest(**samples: int) -> Manifest:
        sequences = tuple(
            Sequence(name[0], (Piece(f"{name}.flac", 0, count),)) for name, count in samples.items()
        )
        return Manifest(Path("/a"), 1.0, Sequences.of(sequences), sum(samples.values()))

    first = manifest(a0=5, a1=7, b0=9)
    assert difference(first, dataclasses.replace(first, root=Path("/b"))) == ""
    assert difference(first, manifest(a0=5, a1=8, c0=9)) == (
        "speakers: 1 added (c), 1 removed (b); files: 1 added (c0.flac), 1 removed (b0.flac), "
        "1 changed (a1.flac)"
    )
    assert difference(first, manifest(a1=7, a0=5, b0=9)) == "the same files in other sequences"
