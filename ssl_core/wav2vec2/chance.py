"""All that chance decides in a step: masks, seeds, layerdrop, negatives and Gumbel noise."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.contrastive import sample_negatives
from ssl_core.wav2vec2.masking import sample_masks
from ssl_core.wav2vec2.quantizer import gumbel_noise

GUMBEL, NEGATIVES = 3, 4
"""Sites (see `keyed_bits`) of noise and of negatives."""


class Draws(NamedTuple):
    """All random draws of a step.

    They are drawn for a whole batch and sliced for micro-batches, so that how a batch is split does
    not change what is masked, compared or dropped.
    """

    masked: Tensor
    """`[batch, masked]` int64: indices of masked frames, ascending, equally many in each crop."""
    multiplicity: Tensor
    """`[pool, masked, masked]`: how often each frame is a negative, see `sample_negatives`."""
    noise: Tensor | None
    """`[batch, masked, group, entry]`: standard Gumbel noise; None in evaluation."""
    seeds: Tensor | None
    """`[batch]` int64: seed of each crop's dropout; None drops nothing."""
    layer_keep: tuple[bool, ...] | None
    """For each transformer layer, whether it runs (layerdrop); None runs all."""

    def rows(self, first: int, last: int) -> "Draws":
        """The draws of crops `first` to `last` (exclusive); each crop must be a pool of its own."""
        return Draws(
            self.masked[first:last],
            self.multiplicity[first:last],
            None if self.noise is None else self.noise[first:last],
            None if self.seeds is None else self.seeds[first:last],
            self.layer_keep,
        )

    def to(self, device: torch.device) -> "Draws":
        """The draws on `device`."""
        return Draws(
            self.masked.to(device),
            self.multiplicity.to(device),
            None if self.noise is None else self.noise.to(device),
            None if self.seeds is None else self.seeds.to(device),
            self.layer_keep,
        )


class Chance(NamedTuple):
    """What is drawn on the host for a batch; all other draws follow from the seeds."""

    masked: Tensor
    """`[batch, masked]` int64: indices of masked frames, ascending, equally many in each crop."""
    seeds: Tensor
    """`[batch]` int64: seed of each crop."""
    layer_keep: tuple[bool, ...]
    """For each transformer layer, whether it runs (layerdrop)."""


def draw_chance(config: ModelConfig, batch: int, samples: int, rng: np.random.Generator) -> Chance:
    """Draw masks, seeds and layerdrop for a batch of crops.

    Args:
        config: the architecture with its masking and dropout rates.
        batch: number of crops.
        samples: samples in each crop.
        rng: seeded by the caller from (seed, partition, global update).
    """
    masked = torch.from_numpy(sample_masks(config, batch, config.frames(samples), rng))
    seeds = torch.from_numpy(rng.integers(2**62, size=batch))
    layers = tuple(bool(x) for x in rng.random(config.num_hidden_layers) >= config.layerdrop)
    return Chance(masked, seeds, layers)


def complete(
    config: ModelConfig, chance: Chance, *, pool: str = "utterance", training: bool = True
) -> Draws:
    """Draw negatives and Gumbel noise from the crops' seeds, on the device of `chance`.

    Args:
        config: the architecture with its masking and dropout rates.
        chance: masks, seeds and layerdrop.
        pool: draw negatives from the same `utterance` or from the whole `batch`.
        training: whether there are noise, dropout and layerdrop.
    """
    batch, count = chance.masked.shape
    pools, pool_size = (1, batch * count) if pool == "batch" else (batch, count)
    negatives = sample_negatives(chance.seeds, NEGATIVES, pools, pool_size, config.num_negatives)
    if not training:
        return Draws(chance.masked, negatives, None, None, None)
    codes = (batch, count, config.num_codevector_groups, config.num_codevectors_per_group)
    noise = gumbel_noise(chance.seeds, GUMBEL, math.prod(codes[1:])).view(codes)
    return Draws(chance.masked, negatives, noise, chance.seeds, chance.layer_keep)


def draw(
    config: ModelConfig,
    batch: int,
    samples: int,
    rng: np.random.Generator,
    *,
    pool: str = "utterance",
    training: bool = True,
) -> Draws:
    """Draw masks, negatives, Gumbel noise, dropout and layerdrop for a batch of crops.

    Args:
        config: the architecture with its masking and dropout rates.
        batch: number of crops.
        samples: samples in each crop.
        rng: seeded by the caller from (seed, partition, global update).
        pool: draw negatives from the same `utterance` or from the whole `batch`.
        training: whether to draw noise, dropout and layerdrop.
    """
    chance = draw_chance(config, batch, samples, rng)
    return complete(config, chance, pool=pool, training=training)
