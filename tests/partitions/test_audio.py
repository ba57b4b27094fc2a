"""Crops: exact samples, no needless decoding, and every kind of bad audio."""

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from numpy.typing import NDArray

from common.errors import UsageError
from partitions.audio import BadAudio, read_crop, read_piece
from partitions.librispeech import find_utterances
from partitions.manifest import Piece, Sequence
from partitions.recut import recut


def noise(frames: int, channels: int = 1, seed: int = 0) -> NDArray[np.float32]:
    """Noise, `[frame, channel]`, at 16-bit steps."""
    steps = np.random.default_rng(seed).integers(-9000, 9000, (frames, channels))
    return (steps / 32768).astype(np.float32)


def whole(path: str, samples: int) -> Sequence:
    return Sequence("1", (Piece(path, 0, samples),))


@pytest.mark.parametrize("name", ["a.flac", "a.wav"])
def test_a_piece_holds_exactly_its_samples(root: Path, name: str) -> None:
    audio = noise(40_000)
    soundfile.write(root / name, audio, 16_000, subtype="PCM_16")
    piece = read_piece(root, Piece(name, 12_345, 6_789))
    assert piece.dtype == np.float32
    np.testing.assert_array_equal(piece, audio[12_345 : 12_345 + 6_789, 0])


def test_a_crop_goes_across_pieces(root: Path) -> None:
    parts = [noise(1_000, seed=seed) for seed in range(3)]
    for number, part in enumerate(parts):
        soundfile.write(root / f"{number}.flac", part, 16_000)
    pieces = (Piece("0.flac", 900, 100), Piece("1.flac", 0, 1_000), Piece("2.flac", 0, 50))
    sequence = Sequence("1", pieces)
    joined = np.concatenate([parts[0][900:], parts[1], parts[2][:50]])[:, 0]
    np.testing.assert_array_equal(read_crop(root, sequence), joined)
    np.testing.assert_array_equal(read_crop(root, sequence, 90, 1_030), joined[90:1_120])
    np.testing.assert_array_equal(read_crop(root, sequence, 200, 10), joined[200:210])


def test_only_the_crop_is_decoded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(root / "a.flac", noise(160_000), 16_000)
    soundfile.write(root / "b.flac", noise(441_000), 44_100)
    decoded = []
    read = soundfile.SoundFile.read

    def spy(self: soundfile.SoundFile, frames: int, **options: object) -> object:
        decoded.append(frames)
        return read(self, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", spy)
    read_crop(root, Sequence("1", (Piece("a.flac", 1_000, 100_000),)), 50_000, 16_000)
    assert decoded == [16_000]
    read_crop(root, Sequence("1", (Piece("b.flac", 16_000, 16_000),)))
    assert 44_100 < decoded[1] <= 44_100 + 2 * 1_103 + 441


@pytest.mark.parametrize(
    ("rate", "channels"), [(44_100, 2), (8_000, 1), (48_000, 1), (22_050, 2), (11_127, 1)]
)
def test_pieces_agree_with_the_whole_file_resampled(root: Path, rate: int, channels: int) -> None:
    audio = noise(rate * 4 + 123, channels)
    soundfile.write(root / "a.wav", audio, rate, subtype="FLOAT")
    expected = soxr.resample(audio.mean(axis=1), rate, 16_000, quality="HQ")
    total = len(audio) * 16_000 // rate
    for start, samples in ((0, 16_000), (1, 777), (33_333, 12_001), (total - 5_000, 5_000)):
        piece = read_piece(root, Piece("a.wav", start, samples))
        assert piece.shape == (samples,)
        np.testing.assert_allclose(piece, expected[start : start + samples], atol=1e-5)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_a_recut_file_of_another_rate_is_read_to_its_last_sample(root: Path, rate: int) -> None:
    folder = root / "train-a" / "1" / "1"
    folder.mkdir(parents=True)
    soundfile.write(folder / "1-1-0.flac", noise(rate * 3 + 7, 2), rate)
    manifest = recut(find_utterances(root), 1.0)
    joined = np.concatenate([read_crop(manifest.root, each) for each in manifest.sequences])
    assert len(joined) == manifest.total_samples == (rate * 3 + 7) * 16_000 // rate


def test_stereo_is_mixed_by_its_mean(root: Path) -> None:
    audio = noise(1_000, 2)
    soundfile.write(root / "a.wav", audio, 16_000, subtype="FLOAT")
    np.testing.assert_array_equal(read_piece(root, Piece("a.wav", 0, 1_000)), audio.mean(axis=1))


def test_float_audio_is_never_clipped(root: Path) -> None:
    soundfile.write(root / "a.wav", noise(1_000) * 8, 16_000, subtype="FLOAT")
    assert np.abs(read_piece(root, Piece("a.wav", 0, 1_000))).max() > 2


def test_a_missing_file(root: Path) -> None:
    with pytest.raises(BadAudio, match=r"gone.flac: No such file") as caught:
        read_crop(root, whole("gone.flac", 5))
    assert (caught.value.reason, caught.value.path) == ("missing", "gone.flac")


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "empty"), (b"no audio in here", "unreadable")]
)
def test_a_file_without_audio(root: Path, content: bytes, reason: str) -> None:
    (root / "a.flac").write_bytes(content)
    with pytest.raises(BadAudio) as caught:
        read_crop(root, whole("a.flac", 5))
    assert caught.value.reason == reason


def test_a_header_without_samples_is_empty(root: Path) -> None:
    soundfile.write(root / "a.wav", [], 16_000)
    with pytest.raises(BadAudio) as caught:
        read_crop(root, whole("a.wav", 5))
    assert caught.value.reason == "empty"


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.9, 0.999])
def test_a_truncated_flac_is_read_up_to_its_end_only(
    root: Path, fraction: float, rate: int
) -> None:
    soundfile.write(root / "a.flac", noise(rate * 5), rate)
    content = (root / "a.flac").read_bytes()
    full = read_piece(root, Piece("a.flac", 0, 16_000))
    (root / "a.flac").write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(BadAudio) as caught:
        read_crop(root, whole("a.flac", 80_000))
    assert caught.value.reason == "truncated"
    with pytest.raises(BadAudio):
        read_piece(root, Piece("a.flac", 70_000, 10_000))
    if fraction >= 0.5:
        np.testing.assert_array_equal(read_piece(root, Piece("a.flac", 0, 16_000)), full)


def test_a_wav_shorter_than_its_header_states_is_truncated(root: Path) -> None:
    soundfile.write(root / "a.wav", noise(16_000), 16_000)
    content = (root / "a.wav").read_bytes()
    (root / "a.wav").write_bytes(content[:20_000])
    with pytest.raises(BadAudio) as caught:
        read_crop(root, whole("a.wav", 16_000))
    assert caught.value.reason == "truncated"


def test_a_clip_shorter_than_the_crop_is_truncated(root: Path) -> None:
    for rate in (16_000, 8_000):
        soundfile.write(root / "a.flac", noise(rate), rate)
        with pytest.raises(BadAudio) as caught:
            read_crop(root, whole("a.flac", 16_010))
        assert caught.value.reason == "truncated"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_samples_that_are_not_finite(root: Path, value: float, rate: int) -> None:
    audio = noise(rate)
    audio[rate // 2] = value
    soundfile.write(root / "a.wav", audio, rate, subtype="FLOAT")
    with pytest.raises(BadAudio) as caught:
        read_crop(root, whole("a.wav", 16_000))
    assert caught.value.reason == "not finite"


def test_silence_is_judged_over_the_whole_crop(root: Path) -> None:
    soundfile.write(root / "silent.wav", np.zeros(1_000), 16_000)
    soundfile.write(root / "faint.wav", np.full(1_000, 9e-6), 16_000, subtype="FLOAT")
    soundfile.write(root / "loud.wav", noise(1_000), 16_000)
    for name in ("silent.wav", "faint.wav"):
        with pytest.raises(BadAudio, match="only silence") as caught:
            read_crop(root, whole(name, 1_000))
        assert caught.value.reason == "silent"
    both = Sequence("1", (Piece("silent.wav", 0, 1_000), Piece("loud.wav", 0, 1_000)))
    assert len(read_crop(root, both)) == 2_000
    with pytest.raises(BadAudio):
        read_crop(root, both, 0, 1_000)


@pytest.mark.parametrize("path", ["../a.wav", "/a.wav", "x/../../a.wav"])
def test_no_path_leaves_the_root(root: Path, path: str) -> None:
    soundfile.write(root.parent / "a.wav", noise(1_000), 16_000)
    with pytest.raises(UsageError, match="cannot read"):
        read_crop(root, whole(path, 1_000))


@pytest.mark.parametrize(("offset", "samples"), [(-1, 5), (0, 0), (5, 6), (10, None), (0, -3)])
def test_a_crop_outside_its_sequence(root: Path, offset: int, samples: int | None) -> None:
    with pytest.raises(UsageError, match="does not lie in a sequence of 10 samples"):
        read_crop(root, whole("a.wav", 10), offset, samples)


def test_bad_audio_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(BadAudio("silent", "a.wav", "the crop holds only silence")))
    assert (error.reason, error.path) == ("silent", "a.wav")
    assert str(error) == "a.wav: the crop holds only silence"


def test_every_real_recording_can_be_read(librispeech: Path) -> None:
    manifest = recut(find_utterances(librispeech), 15.0)
    for sequence in itertools.islice(manifest.sequences, 0, None, 8):
        crop = read_crop(manifest.root, sequence)
        assert crop.shape == (sequence.samples,)
        assert 0.005 < crop.std() < 0.5
