"""Audio whose header does not state its length: counted once, and read to its last sample."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from partitions.audio import BadAudio, read_crop, read_piece, samples_of
from partitions.librispeech import find_utterances
from partitions.manifest import Piece
from partitions.prepared import prepare
from partitions.unstated_length import frames_of

Writer = Callable[..., Path]
BLOCK = 2**16


def noise(frames: int, channels: int = 1) -> NDArray[np.float32]:
    steps = np.random.default_rng(frames).integers(-9000, 9000, (frames, channels))
    return (steps / 32768).astype(np.float32)


def streamed_flac(path: Path) -> Path:
    """Set STREAMINFO's number of samples (36 bits) to 0, as an encoder that writes to a pipe."""
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path.write_bytes(data)
    return path


def streamed_wav(path: Path, length: int = 0, whole: int = 0) -> Path:
    """Set the length of a WAV file's data, and that of the whole file."""
    data = bytearray(path.read_bytes())
    place = data.index(b"data") + 4
    data[4:8] = struct.pack("<I", whole)
    data[place : place + 4] = struct.pack("<I", length)
    path.write_bytes(data)
    return path


def test_soundfile_does_not_know_such_a_length_and_fails_at_the_end(tmp_path: Path) -> None:
    """If this fails, libsndfile has learnt it, and `unstated_length` can go."""
    path = tmp_path / "a.flac"
    soundfile.write(path, noise(5000), 16_000)
    with soundfile.SoundFile(streamed_flac(path)) as sound:
        assert sound.frames == 2**63 - 1
        assert len(sound.read(4999)) == 4999
        with pytest.raises(soundfile.LibsndfileError):
            sound.read(1)


@pytest.mark.parametrize("streamed", [streamed_flac, streamed_wav])
@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2), (8_000, 1)])
@pytest.mark.parametrize("frames", [BLOCK, 2 * BLOCK, BLOCK + 1, 40_003])
def test_every_crop_is_that_of_the_file_with_a_length(
    root: Path, streamed: Callable[[Path], Path], rate: int, channels: int, frames: int
) -> None:
    suffix = streamed.__name__.removeprefix("streamed_")
    for name in ("stated", "streamed"):
        soundfile.write(root / f"{name}.{suffix}", noise(frames, channels), rate, subtype="PCM_16")
    path = streamed(root / f"streamed.{suffix}")
    total = samples_of(path)
    assert total == samples_of(root / f"stated.{suffix}")
    assert isinstance(total, int)
    for start, samples in ((0, total), (total - 100, 100), (5, 1000), (total - 3000, 2999)):
        stated = read_piece(root, Piece(f"stated.{suffix}", start, samples))
        np.testing.assert_array_equal(read_piece(root, Piece(path.name, start, samples)), stated)
    with pytest.raises(BadAudio, match="ends early or is damaged") as error:
        read_piece(root, Piece(path.name, total - 100, 200))
    assert error.value.reason == "truncated"


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
@pytest.mark.parametrize("length", [0, 2**32 - 1, 2**31 - 1, 2**31 - 36])
def test_wav_written_to_a_pipe_by_any_program(root: Path, subtype: str, length: int) -> None:
    audio = noise(4321)
    soundfile.write(root / "a.wav", audio, 16_000, subtype=subtype)
    for whole in (0, 2**32 - 1):
        path = streamed_wav(root / "a.wav", length, whole)
        assert samples_of(path) == 4321
        piece = read_piece(root, Piece("a.wav", 1000, 3321))
        np.testing.assert_allclose(piece, audio[1000:, 0], atol=1e-6)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_has_its_length_in_its_pages(root: Path, subtype: str) -> None:
    soundfile.write(root / "a.ogg", noise(4800), 16_000, format="OGG", subtype=subtype)
    assert samples_of(root / "a.ogg") == 4800
    assert len(read_piece(root, Piece("a.ogg", 800, 4000))) == 4000


def test_an_empty_file_stays_empty_whatever_follows_its_data(root: Path) -> None:
    soundfile.write(root / "a.wav", noise(0), 16_000)
    assert samples_of(root / "a.wav") == "empty"
    with (root / "a.wav").open("ab") as stream:
        stream.write(b"LIST" + struct.pack("<I", 3) + b"abc\0")
    assert samples_of(root / "a.wav") == "empty"
    with pytest.raises(BadAudio, match="an audio file without samples"):
        read_piece(root, Piece("a.wav", 0, 1))
    soundfile.write(root / "a.flac", noise(0), 16_000)
    assert samples_of(root / "a.flac") == "empty"


@pytest.mark.parametrize("damage", [slice(40_000, 40_050), slice(40_000, None)])
def test_a_damaged_or_cut_stream_is_not_counted_as_a_shorter_one(root: Path, damage: slice) -> None:
    path = root / "a.flac"
    soundfile.write(path, noise(40_000), 16_000)
    data = bytearray(streamed_flac(path).read_bytes())
    data[damage] = b"\x55" * 50 if damage.stop else b""
    path.write_bytes(data)
    assert samples_of(path) == "unreadable"
    assert len(read_piece(root, Piece("a.flac", 0, 8000))) == 8000
    with pytest.raises(BadAudio, match="ends early or is damaged"):
        read_piece(root, Piece("a.flac", 0, 30_000))


def test_a_corpus_of_streamed_files_is_recut_as_any_other(root: Path, write: Writer) -> None:
    for number in range(3):
        write("train-a", 7, 1, number, samples=BLOCK + 999 * number)
    expected = prepare(root, length=2.0)
    for path in root.rglob("*.flac"):
        streamed_flac(path)
    assert [each.samples for each in find_utterances(root).utterances] == [
        BLOCK, BLOCK + 999, BLOCK + 1998,
    ]  # fmt: skip
    found = prepare(root, length=2.0)
    assert found.sequences == expected.sequences
    assert found.skips == {}
    for sequence in found.sequences:
        assert len(read_crop(root, sequence)) == sequence.samples


def test_only_files_without_a_length_are_decoded_to_count(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soundfile.write(root / "a.flac", noise(3 * BLOCK + 5), 16_000)
    decoded: list[int] = []
    read = soundfile.SoundFile.read

    def spy(self: soundfile.SoundFile, *arguments: object, **options: object) -> object:
        decoded.append(1)
        return read(self, *arguments, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", spy)
    with soundfile.SoundFile(root / "a.flac") as sound:
        assert frames_of(sound) == 3 * BLOCK + 5
    assert not decoded
    with soundfile.SoundFile(streamed_flac(root / "a.flac")) as sound:
        assert frames_of(sound) == 3 * BLOCK + 5
    assert len(decoded) == 4
    decoded.clear()
    assert len(read_piece(root, Piece("a.flac", 3 * BLOCK, 5))) == 5
    assert len(decoded) == 1
