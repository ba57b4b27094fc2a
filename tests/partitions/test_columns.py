"""Columns: compact, mapped from a file, shared when pickled, and refused when damaged."""

import contextlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from partitions.columns import Column, Columns, Names, compact, kept, with_names
from partitions.file_contents import FileContents, digest_of


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=5), max_size=20))
def test_names_are_kept_as_they_are(texts: list[str]) -> None:
    names = Names.of(texts)
    assert list(names) == texts
    assert [names[index] for index in range(len(texts))] == texts
    with pytest.raises(IndexError):
        names[len(texts)]


def test_bytes_that_are_not_utf8_are_kept() -> None:
    assert list(Names.of(["a\udcff.wav", "é"])) == ["a\udcff.wav", "é"]


@pytest.mark.parametrize(
    ("largest", "kind"),
    [(65_535, "uint16"), (65_536, "uint32"), (2**32 - 1, "uint32"), (2**32, "int64")],
)
def test_numbers_take_the_fewest_bytes(largest: int, kind: str) -> None:
    found = compact([0, largest])
    assert (found.dtype.name, found.tolist()) == (kind, [0, largest])
    assert compact(()).dtype == np.uint16


def columns() -> Columns:
    arrays: dict[str, Column] = {
        "a": np.arange(7, dtype=np.uint16),
        "b": np.zeros((0, 3)),
        "c": np.eye(2),
    }
    return Columns({"length": 1.5, "of": ["x"]}, with_names(n=Names.of(["p", "qr"])) | arrays)


def test_a_file_gives_back_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.columns"
    found = columns().save(path)
    assert (found.header, found.path) == (columns().header, path)
    assert list(found.names("n")) == ["p", "qr"]
    for name, each in columns().arrays.items():
        assert (found[name].dtype, found[name].tolist()) == (each.dtype, each.tolist())
    assert found.digest == columns().digest
    assert not found["a"].flags.writeable
    assert [each.name for each in path.parent.iterdir()] == ["a.columns"]


def test_another_process_maps_the_same_file(tmp_path: Path) -> None:
    mapped = kept(columns(), tmp_path / "a.columns")
    assert len(pickle.dumps(mapped)) < 300
    assert pickle.loads(pickle.dumps(mapped)).path == tmp_path / "a.columns"
    (tmp_path / "a.columns").unlink()
    assert pickle.loads(pickle.dumps(mapped)).digest == columns().digest


def test_every_damaged_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.columns"
    columns().save(path)
    whole = path.read_bytes()
    padding = 0
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        (tmp_path / "b").write_bytes(changed)
        with contextlib.suppress(DataError):
            assert Columns.open(tmp_path / "b").digest == columns().digest
            padding += 1
    assert 0 < padding < 64 * 6  # between arrays
    for size in (0, 1, 30, len(whole) - 1):
        (tmp_path / "c").write_bytes(whole[:size])
        with pytest.raises(DataError, match="is damaged"):
            Columns.open(tmp_path / "c")
    with pytest.raises(DataError, match="cannot read"):
        Columns.open(tmp_path / "d")


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert kept(columns(), tmp_path / "file" / "a.columns").path is None


def test_contents_by_path() -> None:
    paths = Names.of(["b/2.wav", "a/1.wav", "c"])
    found = FileContents.of(paths, bytes(range(48)), b"\1\1\0")
    expected = {
        "b/2.wav": bytes(range(16)).hex(),
        "a/1.wav": bytes(range(16, 32)).hex(),
        "c": "",
    }
    assert dict(found.items()) == expected == dict(found.rows())
    assert found == expected
    assert expected == found
    assert found != expected | {"d": ""}
    assert found != expected | {"c": "00"}
    assert found.digest == digest_of(expected)
    assert "c" in found
    assert "d" not in found
    assert found.named().digest == found.digest
