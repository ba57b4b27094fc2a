"""Which frames of a crop are masked: spans as in fairseq, with the same count in every crop.

Policy: every frame is as likely a start; spans may overlap; their number is
`mask_time_prob * frames / mask_time_length`, at least `mask_time_min_masks`. fairseq then unmasks
frames at random until every crop of its batch has as few as the one with the fewest. Shapes must
not depend on chance or on how a batch is split, so here every crop gets the expectation of that
smallest count in a batch of six, which is what 1.4 million samples hold at the original's length:
a share of 0.39 at 1 s, 0.44 at 5 s and 0.46 from 10 s on.
"""

import functools

import numpy as np
import numpy.typing as npt

from ssl_core.wav2vec2.config import ModelConfig

Indices = npt.NDArray[np.int64]


EQUALISED_CROPS = 6
"""Crops of 15.6 s in a batch of the original base recipe (`max_tokens` 1.4 million samples)."""


def _starts(config: ModelConfig, frames: int, rng: np.random.Generator) -> tuple[Indices, int]:
    """All places for a span in random order, and how many of them to use (fairseq)."""
    wanted = config.mask_time_prob * frames / config.mask_time_length + rng.random()
    return rng.permutation(frames - config.mask_time_length), max(
        int(wanted), config.mask_time_min_masks
    )


def _cover(starts: Indices, length: int) -> Indices:
    """The frames that spans from these starts cover, ascending."""
    return np.unique(starts[:, None] + np.arange(length))


@functools.lru_cache(maxsize=256)
def masked_count(config: ModelConfig, frames: int) -> int:
    """Masked frames in every crop of so many frames: see the policy above.

    The expectation is taken over 300 batches drawn with a fixed seed.
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
    """Fewest frames that leave room for the least number of spans."""
    return config.mask_time_length + config.mask_time_min_masks + 1


def sample_masks(config: ModelConfig, batch: int, frames: int, rng: np.random.Generator) -> Indices:
    """Masked frames of each crop, ascending: `[batch, masked]`.

    Raises:
        ValueError: fewer frames than `minimum_frames`.
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
