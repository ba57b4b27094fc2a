"""Masks of frames: spans as in fairseq, with the same number of masked frames in every crop.

Spans start at random frames and may overlap; there are
`mask_time_prob * frames / mask_time_length` of them, at least `mask_time_min_masks`. fairseq then
unmasks random frames until each crop has as few masked frames as the crop of the batch with the
fewest. Here shapes must depend neither on chance nor on how a batch is split, so every crop gets
the expected value of that minimum for a batch of `EQUALISED_CROPS`. The fraction of masked frames
is 0.39 at 1 s, 0.44 at 5 s, 0.45 at 10 s and 0.46 at 15 s.
"""

import functools

import numpy as np
import numpy.typing as npt

from ssl_core.wav2vec2.config import ModelConfig

Indices = npt.NDArray[np.int64]

EQUALISED_CROPS = 6
"""Crops of 15.6 s in a batch of the original base recipe (`max_tokens`: 1.4 million samples)."""


def _starts(config: ModelConfig, frames: int, rng: np.random.Generator) -> tuple[Indices, int]:
    """All possible starts of spans in random order, and how many of them to use (fairseq)."""
    wanted = config.mask_time_prob * frames / config.mask_time_length + rng.random()
    return rng.permutation(frames - config.mask_time_length), max(
        int(wanted), config.mask_time_min_masks
    )


def _cover(starts: Indices, length: int) -> Indices:
    """Frames covered by spans of `length` frames at `starts`, ascending."""
    return np.unique(starts[:, None] + np.arange(length))


@functools.lru_cache(maxsize=256)
def masked_count(config: ModelConfig, frames: int) -> int:
    """Number of masked frames in each crop of `frames` frames.

    The expected minimum (see above) is a mean over 300 batches drawn with a fixed seed.
    """
    rng = np.random.default_rng(0)
    smallest = []
    for _ in range(300):
        counts = []
        for _ in range(EQUALISED_CROPS):
            starts, used = _starts(config, frames, rng)
            counts.append(len(_cover(starts[:used], config.mask_time_length)))
        smallest.append(min(counts))
    return max(2, round(float(np.mean(smallest))))


def minimum_frames(config: ModelConfig) -> int:
    """Fewest frames of a crop that has room for the minimum number of spans."""
    return config.mask_time_length + config.mask_time_min_masks + 1


def sample_masks(config: ModelConfig, batch: int, frames: int, rng: np.random.Generator) -> Indices:
    """Draw the masked frames of a batch of crops.

    Args:
        config: the masking rates.
        batch: number of crops.
        frames: frames in each crop.
        rng: random generator.

    Returns:
        Indices of masked frames, `[batch, masked]`, ascending in each crop.

    Raises:
        ValueError: `frames` is less than `minimum_frames`.
    """
    length = config.mask_time_length
    if frames < minimum_frames(config):
        raise ValueError(f"{frames} frames are too few to mask; at least {minimum_frames(config)}")
    count = masked_count(config, frames)
    rows = np.empty((batch, count), dtype=np.int64)
    for row in rows:
        starts, used = _starts(config, frames, rng)
        masked = _cover(starts[:used], length)
        while len(masked) < count:
            used += 1
            masked = _cover(starts[:used], length)
        row[:] = np.sort(rng.permutation(masked)[:count])
    return rows
