"""Crops: fixed lengths, seeded order, bad audio skipped and counted."""

import collections
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

from common.errors import DataError
from partitions.manifest import Manifest, Piece, Sequence, Sequences
from ssl_core.training.crops import Crops
from ssl_core.training.loader import ahead


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Ten sequences of 1.5 s: a ramp whose value tells the sequence and the sample."""
    sequences = []
    for number in range(10):
        ramp = (number + np.arange(24_000) / 24_000) / 16
        soundfile.write(tmp_path / f"{number}.wav", ramp, 16_000, subtype="FLOAT")
        sequences.append(Sequence(str(number), (Piece(f"{number}.wav", 0, 24_000),)))
    return Manifest(tmp_path, 1.5, Sequences.of(sequences), 240_000)


def test_every_sequence_comes_once_an_epoch_and_crops_lie_inside(manifest: Manifest) -> None:
    crops = Crops(manifest, range(10), 16_000, seed=1)
    batch = crops.batch(0, 10)
    assert batch.waveforms.shape == (10, 16_000)
    assert batch.waveforms.dtype == np.float32
    assert sorted(batch.sequences) == list(range(10))
    for waveform, sequence in zip(batch.waveforms, batch.sequences, strict=True):
        values = waveform * 16
        assert np.all(np.floor(values) == sequence)
        assert np.allclose(np.diff(values), 1 / 24_000, atol=1e-5)
    other = crops.batch(10, 10)
    assert sorted(other.sequences) == list(range(10))
    assert other.sequences != batch.sequences


def test_a_position_always_gives_the_same_crop(manifest: Manifest) -> None:
    one = Crops(manifest, range(10), 16_000, seed=1, partition=4)
    two = Crops(manifest, range(10), 16_000, seed=1, partition=4)
    one.batch(0, 3)
    assert np.array_equal(one.batch(7, 5).waveforms, two.batch(7, 5).waveforms)
    other = Crops(manifest, range(10), 16_000, seed=1, partition=5)
    assert not np.array_equal(two.batch(7, 5).waveforms, other.batch(7, 5).waveforms)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_are_the_same_whoever_reads_them(manifest: Manifest, workers: int) -> None:
    alone = Crops(manifest, range(10), 16_000, seed=3)
    expected = [alone.batch(4 * number, 4) for number in range(12)]
    copies = [pickle.loads(pickle.dumps(alone)) for _ in range(workers)]
    for number in reversed(range(12)):
        batch = copies[number % workers].batch(4 * number, 4)
        assert batch.sequences == expected[number].sequences
        assert np.array_equal(batch.waveforms, expected[number].waveforms)


def test_fewer_crops_than_a_batch_are_repeated(manifest: Manifest) -> None:
    batch = Crops(manifest, [3, 4], 16_000, seed=0).batch(0, 6)
    assert collections.Counter(batch.sequences) == {3: 3, 4: 3}


def test_bad_audio_is_skipped_and_counted(manifest: Manifest) -> None:
    soundfile.write(manifest.root / "2.wav", np.zeros(24_000), 16_000)
    (manifest.root / "5.wav").unlink()
    soundfile.write(
        manifest.root / "7.wav", np.full(24_000, np.nan, np.float32), 16_000, subtype="FLOAT"
    )
    batch = Crops(manifest, range(10), 16_000, seed=0).batch(0, 7)
    assert sorted(batch.sequences) == [0, 1, 3, 4, 6, 8, 9]
    assert np.isfinite(batch.waveforms).all()
    found = Crops(manifest, range(10), 16_000, seed=0).batch(0, 10).skips
    assert found == {"silent": 1, "missing": 1, "not finite": 1}


def test_nothing_usable_is_an_error_that_says_where(manifest: Manifest) -> None:
    for number in range(10):
        (manifest.root / f"{number}.wav").write_bytes(b"")
    with pytest.raises(DataError, match="all 10 of its sequences are bad"):
        Crops(manifest, range(10), 16_000, seed=0).batch(0, 2)
    with pytest.raises(DataError, match="no usable audio to evaluate on"):
        Crops(manifest, range(10), 16_000, seed=0).fixed(4)
    with pytest.raises(DataError, match="holds 32000 samples"):
        Crops(manifest, range(10), 32_000, seed=0)


def test_evaluation_crops_are_spread_and_from_the_middle(manifest: Manifest) -> None:
    fixed = Crops(manifest, range(10), 16_000, seed=0).fixed(4)
    assert fixed.sequences == (0, 3, 6, 9)
    assert fixed.waveforms[0, 0] * 16 == pytest.approx(4_000 / 24_000, abs=1e-5)


def test_ahead_keeps_order_bounds_and_errors() -> None:
    made: list[int] = []

    def items() -> collections.abc.Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number
        raise ValueError("the end")

    stream = ahead(items(), depth=2)
    assert next(stream) == 0
    assert len(made) <= 5
    with pytest.raises(ValueError, match="the end"):
        assert list(stream) == list(range(1, 20))
    before = threading.active_count()
    unfinished = ahead(iter(range(100)))
    assert next(unfinished) == 0
    unfinished.close()
    for thread in threading.enumerate():
        if thread.name == "decode-ahead":
            thread.join(timeout=5)
    assert threading.active_count() <= before
