"""Fingerprints of files: of their content alone, taken again whenever that may have changed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from common.cache_folder import cache_folder
from partitions import fingerprints as module
from partitions.file_contents import digest_of
from partitions.file_system import file_system
from partitions.fingerprints import (
    contents,
    fingerprints,
    is_unchanged,
    stamp_of,
)

SUFFIXES = ("wav", "flac", "flac without MD5")


def sound(path: Path, seed: int, samples: int = 4000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, samples)
    soundfile.write(path, noise, 16_000, subtype="PCM_16")
    return path


def made(folder: Path, kind: str, seed: int) -> bytes:
    """The bytes of some audio, as long as that of other seeds."""
    suffix = kind.split(" ", maxsplit=1)[0]
    data = sound(folder / f"made.{suffix}", seed).read_bytes()
    (folder / f"made.{suffix}").unlink()
    if kind.endswith("MD5"):
        data = data[:26] + bytes(16) + data[42:]
    return data.ljust(8200, b"\0")


def content(root: Path, name: str) -> str:
    return fingerprints(root, [name])[name].content


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remember files that have just been written."""
    monkeypatch.setattr(module, "SETTLED", -1.0)


def in_place(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def renamed_over(path: Path, data: bytes) -> None:
    path.with_name("new").write_bytes(data)
    os.utime(path.with_name("new"), ns=(0, path.stat().st_mtime_ns))
    path.with_name("new").replace(path)


def hard_linked(path: Path, data: bytes) -> None:
    path.with_name("other").write_bytes(data)
    path.unlink()
    os.link(path.with_name("other"), path)


def symlinked(path: Path, data: bytes) -> None:
    path.with_name("target").write_bytes(data)
    path.unlink()
    path.symlink_to(path.with_name("target"))


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("kind", SUFFIXES)
@pytest.mark.parametrize("replaced", [in_place, renamed_over, hard_linked, symlinked])
def test_other_audio_of_the_same_size_and_time_is_noticed(
    tmp_path: Path, kind: str, replaced: Callable[[Path, bytes], None]
) -> None:
    path = tmp_path / f"a.{kind[:4].strip()}"
    path.write_bytes(made(tmp_path, kind, 1))
    before, status = content(tmp_path, path.name), path.stat()
    assert content(tmp_path, path.name) == before
    replaced(path, made(tmp_path, kind, 2))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert content(tmp_path, path.name) not in ("", before)


def test_place_name_and_times_do_not_count(tmp_path: Path) -> None:
    first = sound(tmp_path / "a" / "x.flac", 1)
    copy = tmp_path / "elsewhere" / "y.flac"
    copy.parent.mkdir()
    shutil.copy(first, copy)
    os.utime(copy, ns=(1, 1))
    found = fingerprints(tmp_path, ["a/x.flac", "elsewhere/y.flac"])
    assert found["a/x.flac"].content == found["elsewhere/y.flac"].content
    assert len(found["a/x.flac"].content) == 32
    files = contents(found)
    assert digest_of(files) == digest_of(dict(reversed(files.items())))
    assert digest_of(files) != digest_of({"a/x.flac": files["a/x.flac"]})


def test_of_flac_the_header_alone_is_read_and_a_file_cut_short_is_noticed(tmp_path: Path) -> None:
    path = sound(tmp_path / "a.flac", 1)
    before, data = content(tmp_path, "a.flac"), path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert content(tmp_path, "a.flac") == before
    path.write_bytes(data[:-500])
    assert content(tmp_path, "a.flac") != before


@pytest.mark.usefixtures("settled")
def test_the_second_start_reads_no_file_that_has_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [sound(tmp_path / f"{number}.wav", number, 100).name for number in range(300)]
    monkeypatch.setattr(module, "_WRITTEN", 100)
    first = fingerprints(tmp_path, names)
    assert list(first) == names
    sound(tmp_path / "7.wav", 700)
    read: list[str] = []
    real = module._read

    def noted(root: Path, path: str) -> module.Fingerprint:
        read.append(path)
        return real(root, path)

    monkeypatch.setattr(module, "_read", noted)
    second = fingerprints(tmp_path, names)
    assert read == ["7.wav"]
    assert [name for name in names if second[name] != first[name]] == ["7.wav"]


def remembers_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file is read at a second start too."""
    before = content(root, "a.wav")
    monkeypatch.setattr(module, "_read", lambda root, path: module.UNREADABLE)
    return content(root, "a.wav") != before


def test_a_file_that_has_just_changed_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound(tmp_path / "a.wav", 1)
    assert remembers_nothing(tmp_path, monkeypatch)
    assert not cache_folder().exists()


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("kind", ["vfat", "fuse.sshfs", "cifs", ""])
def test_where_times_of_change_are_not_kept_every_file_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    sound(tmp_path / "a.wav", 1)
    monkeypatch.setattr(module, "file_system", lambda path: kind)
    assert remembers_nothing(tmp_path, monkeypatch)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("trouble", ["no database", "damaged", "a folder", "no cache folder"])
def test_without_a_memory_it_goes_on(
    tmp_path: Path, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [sound(tmp_path / f"{number}.wav", number).name for number in range(100)]
    first = fingerprints(tmp_path, names)
    path = cache_folder() / "fingerprints.sqlite"
    size = path.stat().st_size
    if trouble == "no database":
        path.write_bytes(b"rubbish" * 1000)
    elif trouble == "damaged":
        with open(path, "r+b") as stream:
            stream.seek(4096)
            stream.write(b"\xa5" * (size - 4096))
    elif trouble == "a folder":
        path.unlink()
        path.mkdir()
    else:
        (tmp_path / "file").write_text("in the way")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert fingerprints(tmp_path, names) == first
    if trouble in ("no database", "damaged"):
        assert path.read_bytes().startswith(b"SQLite")


def test_what_is_no_file_is_empty_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "link.wav").symlink_to(tmp_path / "gone")
    (tmp_path / "empty.wav").write_bytes(b"")
    names = ["pipe.wav", "folder.wav", "link.wav", "none.wav", "empty.wav"]
    found = fingerprints(tmp_path, names)
    assert [bool(each.content) for each in found.values()] == [False] * 4 + [True]
    assert not any(is_unchanged(tmp_path, name, found[name]) for name in names[:4])


def test_a_file_that_changes_while_it_is_read_is_not_taken_for_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sound(tmp_path / "a.wav", 1)
    real = os.fstat

    def growing(descriptor: int) -> os.stat_result:
        status = real(descriptor)
        with open(path, "ab") as stream:
            stream.write(b"more")
        return status

    monkeypatch.setattr("partitions.fingerprints.os.fstat", growing)
    found = fingerprints(tmp_path, ["a.wav"])["a.wav"]
    assert found.stamp is None
    assert not is_unchanged(tmp_path, "a.wav", found)
    monkeypatch.undo()
    found = fingerprints(tmp_path, ["a.wav"])["a.wav"]
    assert found.stamp == stamp_of(tmp_path, "a.wav")
    assert is_unchanged(tmp_path, "a.wav", found)
    sound(path, 2)
    assert not is_unchanged(tmp_path, "a.wav", found)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/data/x.wav", "ext4"),
        ("/media/my card/a/x.wav", "vfat"),
        ("/media/my cards/x.wav", "ext4"),
        ("/mnt/corpora/x.wav", "nfs4"),
        ("/mnt/over/x.wav", "fuse.sshfs"),
    ],
)
def test_the_file_system_is_that_of_the_nearest_mount(tmp_path: Path, path: str, name: str) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "20 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "21 20 8:2 / /media/my\\040card rw - vfat /dev/sdb1 rw\n"
        "22 20 0:40 / /mnt/corpora rw - nfs4 server:/corpora rw\n"
        "23 20 8:3 / /mnt/over rw - ext4 /dev/sdc1 rw\n"
        "24 23 0:41 / /mnt/over rw - fuse.sshfs host:/ rw\n"
    )
    assert file_system(path, mounts) == name
    assert file_system(path, tmp_path / "none") == ""
