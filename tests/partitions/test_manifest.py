"""Manifests: exact round trips, refusals with file and line, and the cache."""

import errno
import os
from pathlib import Path

import pytest
from conftest import Writer
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from partitions import prepared
from partitions.columns import compact
from partitions.librispeech import Listing, Recordings
from partitions.manifest import (
    Manifest,
    Piece,
    Sequence,
    Sequences,
    natural_order,
)
from partitions.manifest_text import read_manifest, write_manifest
from partitions.prepared import prepare
from partitions.scan import recordings_of

NAMES = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="\\/"),
    min_size=1,
).filter(lambda name: name not in (".", "..") and name[1:2] != ":")
PIECES = st.builds(
    Piece,
    st.lists(NAMES, min_size=1, max_size=4).map("/".join),
    st.integers(0, 10**12),
    st.integers(1, 10**9),
)
MANIFESTS = st.builds(
    Manifest,
    root=st.just(Path("/corpus")),
    length=st.floats(1e-3, 1e3),
    sequences=st.lists(
        st.builds(
            Sequence,
            NAMES.filter(lambda name: not name.startswith("#")),
            st.lists(PIECES, min_size=1, max_size=3).map(tuple),
        ),
        min_size=1,
        max_size=5,
    ).map(Sequences.of),
    total_samples=st.integers(0, 10**12),
    remainder_samples=st.integers(0, 10**12),
    remainder_speakers=st.integers(0, 10**6),
    skips=st.dictionaries(st.sampled_from(["empty", "unreadable"]), st.integers(1, 99)),
    utterance_lengths=st.lists(st.integers(1, 10**7), max_size=40).map(compact),
)

HEADER = (
    "# shortwave manifest\t1\n# sample rate\t16000\n# length\t5.0\n# root\t/corpus\n"
    "# sequences\t{}\n# total samples\t10\n# remainder samples\t0\n# remainder speakers\t0\n"
)


@settings(max_examples=100, deadline=None)
@given(manifest=MANIFESTS)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> None:
    path = tmp_path_factory.mktemp("manifest") / "m.tsv"
    write_manifest(path, manifest)
    first = path.read_bytes()
    assert read_manifest(path) == manifest
    write_manifest(path, read_manifest(path))
    assert path.read_bytes() == first


def test_written_form(tmp_path: Path) -> None:
    manifest = Manifest(
        root=Path("/corpus"),
        length=5.0,
        sequences=Sequences.of(
            [Sequence("7", (Piece("a/7/1/7-1-0.flac", 3, 4), Piece("b.wav", 0, 6)))]
        ),
        total_samples=12,
        remainder_samples=2,
        remainder_speakers=1,
        skips={"empty": 1},
        skipped_examples={"empty": ("a/7/1/7-1-1.flac",)},
        utterance_lengths=compact((6, 6)),
    )
    write_manifest(tmp_path / "m.tsv", manifest)
    assert (tmp_path / "m.tsv").read_text() == (
        "# shortwave manifest\t1\n# sample rate\t16000\n# length\t5.0\n# root\t/corpus\n"
        "# sequences\t1\n# total samples\t12\n# remainder samples\t2\n# remainder speakers\t1\n"
        "# skipped\tempty\t1\ta/7/1/7-1-1.flac\n# utterance samples\t6\t6\n"
        "7\ta/7/1/7-1-0.flac\t3\t4\tb.wav\t0\t6\n"
    )
    assert read_manifest(tmp_path / "m.tsv", Path("elsewhere")).root == Path("elsewhere")
    assert manifest.speakers == ("7",)
    assert manifest.seconds == 10 / 16000
    assert manifest.describe_skips() == ["skipped, empty: 1 (a/7/1/7-1-1.flac)"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("7\t/etc/passwd\t0\t5", "an absolute path '/etc/passwd'"),
        ("7\tC:/audio.flac\t0\t5", "an absolute path 'C:/audio.flac'"),
        ("7\ta/../../b.flac\t0\t5", "an empty part, '.' or '..'"),
        ("7\t..\t0\t5", "an empty part, '.' or '..'"),
        ("7\ta//b.flac\t0\t5", "an empty part, '.' or '..'"),
        ("7\ta\\..\\b.flac\t0\t5", "a backslash"),
        ("7\t\t0\t5", "an empty path"),
        ("7\ta.flac\t-1\t5", "start is '-1', not a whole number from 0"),
        ("7\ta.flac\t0\t0", "samples is '0', not a whole number from 1"),
        ("7\ta.flac\t0\t-5", "samples is '-5'"),
        ("7\ta.flac\t0\t5.5", "samples is '5.5'"),
        ("7\ta.flac\t0\t٣", "samples is '٣'"),
        ("7\ta.flac\t0\tnan", "samples is 'nan'"),
        ("7\ta.flac\t0", "missing columns"),
        ("7", "missing columns"),
        ("7\ta.flac\t0\t5\tb.flac", "missing columns"),
        ("\ta.flac\t0\t5", "no speaker"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "m.tsv"
    path.write_text(HEADER.format(2) + "7\ta.flac\t0\t5\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_manifest(path)
    assert str(caught.value).startswith(f"{path}:10: ")
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "an empty manifest"),
        (HEADER.format(0).encode(), "an empty manifest"),
        (b"hello\n", ":1: not a manifest"),
        (b"# shortwave manifest\t99\n", ":1: a manifest of another version"),
        (HEADER.format(2).encode() + b"7\ta.flac\t0\t5\n", "truncated: 1 sequences of 2"),
        (HEADER.format(1).encode() + b"7\t\xff.flac\t0\t5\n", ":9: not UTF-8"),
        (b"# shortwave manifest\t1\n7\ta.flac\t0\t5\n", "header 'sample rate' is ''"),
        (
            HEADER.format(1).replace("16000", "8000").encode() + b"7\ta.flac\t0\t5\n",
            "positions at 8000 Hz",
        ),
        (HEADER.format(1).replace("5.0", "inf").encode() + b"7\ta\t0\t5\n", "no header 'length'"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "m.tsv"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_manifest(path)
    assert str(path) in str(caught.value)
    assert problem in str(caught.value)


def test_a_missing_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read manifest .*m.tsv: No such file"):
        read_manifest(tmp_path / "m.tsv")


@pytest.mark.parametrize("path", ["../a.flac", "a\tb.flac", "/a.flac", "a\nb.flac"])
def test_an_unsafe_path_is_not_written(tmp_path: Path, path: str) -> None:
    sequences = Sequences.of([Sequence("7", (Piece(path, 0, 5),))])
    with pytest.raises(DataError, match="cannot write"):
        write_manifest(tmp_path / "m.tsv", Manifest(Path("/corpus"), 5.0, sequences, 5))
    assert list(tmp_path.glob("*.tsv")) == []


def test_a_full_disk_leaves_the_old_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    sequences = Sequences.of([Sequence("7", (Piece("a.flac", 0, 5),))])
    manifest = Manifest(Path("/corpus"), 5.0, sequences, 5)
    write_manifest(folder / "m.tsv", manifest)
    before = (folder / "m.tsv").read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_manifest(folder / "m.tsv", manifest)
    assert [path.name for path in folder.iterdir()] == ["m.tsv"]
    assert (folder / "m.tsv").read_bytes() == before


def test_prepare_takes_the_second_result_from_the_cache(
    root: Path, write: Writer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("train-a", 1, 1, 0, samples=50_000)
    first = prepare(root, (), 1.0)
    (cached,) = (cache / "shortwave" / "manifests").iterdir()

    def unexpected(*_: object) -> None:
        raise AssertionError("the corpus was scanned again")

    with monkeypatch.context() as patch:
        patch.setattr(prepared, "recordings_of", unexpected)
        assert prepare(root, (), 1.0) == first
    assert prepare(root, (), 2.0).length == 2.0
    write("train-a", 1, 1, 1, samples=20_000)
    assert prepare(root, (), 1.0).total_samples == 70_000
    assert len(list(cached.parent.iterdir())) == 3


def test_a_moved_corpus_takes_the_result_from_the_cache(
    root: Path, write: Writer, cache: Path, tmp_path: Path
) -> None:
    write("train-a", 1, 1, 0, samples=50_000)
    first = prepare(root, (), 1.0)
    root.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    second = prepare(tmp_path / "link", (), 1.0)
    assert (second.root, second.files) == (tmp_path / "moved", first.files)
    assert second.sequences == first.sequences
    assert len(list((cache / "shortwave" / "manifests").iterdir())) == 1


def test_other_audio_of_the_same_size_and_time_is_recut(root: Path, write: Writer) -> None:
    path = write("train-a", 1, 1, 0, samples=50_000, suffix="wav")
    status = path.stat()
    assert prepare(root, (), 1.0).total_samples == 50_000
    write("train-a", 1, 1, 0, samples=50_000, rate=8000, suffix="wav")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert prepare(root, (), 1.0).total_samples == 100_000


def test_a_corpus_that_changes_during_the_scan_is_not_kept(
    root: Path, write: Writer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("train-a", 1, 1, 0, samples=50_000)

    def changing(listing: Listing, progress: bool) -> Recordings:
        write("train-a", 1, 1, 0, samples=60_000)
        return recordings_of(listing, progress)

    with monkeypatch.context() as patch:
        patch.setattr(prepared, "recordings_of", changing)
        assert prepare(root, (), 1.0).total_samples == 60_000
    assert not (cache / "shortwave" / "manifests").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"# shortwave manifest\t1\n"])
def test_a_broken_cache_is_rebuilt(root: Path, write: Writer, cache: Path, content: bytes) -> None:
    write("train-a", 1, 1, 0, samples=50_000)
    first = prepare(root, (), 1.0)
    (cached,) = (cache / "shortwave" / "manifests").iterdir()
    whole = cached.read_bytes()
    cached.unlink()  # it is mapped
    cached.write_bytes(content)
    assert prepare(root, (), 1.0) == first
    assert cached.read_bytes() == whole


def test_an_unwritable_cache_is_done_without(
    root: Path, write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("train-a", 1, 1, 0, samples=50_000)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert prepare(root, (), 1.0).samples == 50_000


def test_natural_order() -> None:
    names = ["b", "10", "9", "a", "010"]
    assert sorted(names, key=natural_order) == ["9", "010", "10", "a", "b"]
