"""Atomic replacement of files and directories."""

import os
from pathlib import Path

import pytest

from common import atomic


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_is_replaced_whole(place: Path, sync: bool) -> None:
    with atomic.replacing(place / "sub" / "a.bin", sync) as partial:
        partial.write_bytes(b"first")
        assert not (place / "sub" / "a.bin").exists()
    with atomic.replacing(place / "sub" / "a.bin", sync) as partial:
        assert partial.read_bytes() == b""
        partial.write_bytes(b"second")
        assert (place / "sub" / "a.bin").read_bytes() == b"first"
    assert (place / "sub" / "a.bin").read_bytes() == b"second"
    assert os.listdir(place / "sub") == ["a.bin"]
    assert (place / "sub" / "a.bin").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_after_an_error_the_old_file_stays_and_no_other(
    place: Path, sync: bool, error: BaseException
) -> None:
    atomic.write_text(place / "a", "old\u00e9")

    def write_half() -> None:
        with atomic.replacing(place / "a", sync) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert (place / "a").read_text(encoding="utf-8") == "old\u00e9"
    assert os.listdir(place) == ["a"]


def test_a_directory_is_replaced_whole(place: Path) -> None:
    for content in ("first", "second"):
        with atomic.directory(place / "model") as partial:
            (partial / content).write_text(content)
    assert os.listdir(place) == ["model"]
    assert os.listdir(place / "model") == ["second"]

    def write_half() -> None:
        with atomic.directory(place / "model") as partial:
            (partial / "third").write_text("")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_half()
    assert os.listdir(place) == ["model"]
    assert os.listdir(place / "model") == ["second"]
