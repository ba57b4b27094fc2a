"""The length of a FLAC file by its header is what libsndfile says, however the file is damaged."""

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from partitions import audio
from partitions.audio import samples_of
from partitions.flac_header import flac_length


def written(path: Path, rate: int = 16_000, subtype: str = "PCM_16", channels: int = 1) -> bytes:
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, (3_000, channels))
    soundfile.write(path, noise, rate, subtype=subtype)
    return path.read_bytes()


def padded(data: bytes) -> bytes:
    """With a block of padding that is longer than what is read at once."""
    first = bytes([data[4] & 0x7F]) + data[5:42]
    return b"fLaC" + first + b"\x01" + (5_000).to_bytes(3) + bytes(5_000) + data[42:]


def by_libsndfile(path: Path) -> int | str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audio, "flac_length", lambda path: None)
        return samples_of(path)


@pytest.mark.parametrize(
    ("rate", "subtype", "channels"),
    [(16_000, "PCM_16", 1), (8_000, "PCM_S8", 1), (44_100, "PCM_24", 2), (96_000, "PCM_16", 8)],
)
def test_the_length_is_read_from_the_header(
    tmp_path: Path, rate: int, subtype: str, channels: int
) -> None:
    path = tmp_path / "a.flac"
    data = written(path, rate, subtype, channels)
    assert flac_length(str(path)) == (3_000, rate)
    assert samples_of(path) == 3_000 * 16_000 // rate
    path.write_bytes(padded(data))
    assert flac_length(str(path)) == (3_000, rate)
    assert by_libsndfile(path) == 3_000 * 16_000 // rate


@pytest.mark.parametrize("pad", [False, True])
def test_a_file_cut_short_anywhere_is_told_as_libsndfile_does(tmp_path: Path, pad: bool) -> None:
    path = tmp_path / "a.flac"
    data = written(path)
    data = padded(data) if pad else data
    for size in {*range(0, 140), *range(0, len(data), 97), *range(5_030, 5_200), len(data)}:
        path.write_bytes(data[:size])
        assert samples_of(path) == by_libsndfile(path), size


def test_a_damaged_byte_is_told_as_libsndfile_does(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    data = written(path)
    for place in range(100):
        for flipped in (0x01, 0x80, 0xFF):
            path.write_bytes(data[:place] + bytes([data[place] ^ flipped]) + data[place + 1 :])
            assert samples_of(path) == by_libsndfile(path), (place, flipped)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.flac")
    assert samples_of(tmp_path / "a.flac") == "empty"
