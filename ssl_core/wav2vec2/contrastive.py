"""The contrastive loss: find a masked frame's own code among distractors.

Distractors are drawn with replacement, so a frame that is drawn n times adds n times its
exponential to the denominator. The loss is therefore computed from one matrix of similarities
`[crop, masked, masked]` and a matrix of multiplicities of the same shape; no vector of a
distractor is ever copied. It is the same sum as gathering 100 vectors a frame.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_core.wav2vec2.precision import at_least_fp32


class Contrast(NamedTuple):
    """Sums over all masked frames given."""

    loss: Tensor
    """Cross-entropy in nats, summed."""
    correct: Tensor
    """Frames whose own code is more similar than every distractor."""


def sample_negatives(
    pools: int, masked: int, negatives: int, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """How often each masked frame is a distractor of each other one.

    Args:
        pools: crops, or 1 when the whole batch is one pool.
        masked: masked frames in a pool, at least 2.
        negatives: distractors of each frame, drawn uniformly from the others of its pool.
        rng: source of chance.

    Returns:
        `[pool, masked, masked]` multiplicities; rows sum to `negatives`, the diagonal is 0.
    """
    drawn = rng.integers(0, masked - 1, (pools, masked, negatives))
    drawn += drawn >= np.arange(masked)[None, :, None]
    rows = np.arange(pools * masked).reshape(pools, masked, 1) * masked
    counts = np.bincount((rows + drawn).ravel(), minlength=pools * masked * masked)
    return counts.reshape(pools, masked, masked).astype(np.float32)


def contrastive_loss(
    predictions: Tensor, targets: Tensor, codes: Tensor, multiplicity: Tensor, temperature: float
) -> Contrast:
    """Wav2vec 2.0's equation 3, summed over frames.

    Args:
        predictions: `[pool, masked, width]`, from the context network.
        targets: `[pool, masked, width]`, projected code vectors; the gradient reaches them.
        codes: `[pool, masked]` integers; a distractor with the frame's own code does not count.
        multiplicity: `[pool, masked, masked]` from `sample_negatives`.
        temperature: divides the cosine similarities.
    """
    with torch.autocast(predictions.device.type, enabled=False):
        similarity = torch.bmm(
            F.normalize(at_least_fp32(predictions), dim=-1, eps=1e-8),
            F.normalize(at_least_fp32(targets), dim=-1, eps=1e-8).transpose(1, 2),
        ).div(temperature)
        same = codes[:, :, None] == codes[:, None, :]
        weight = multiplicity.masked_fill(same, 0.0)
        own = similarity.diagonal(dim1=1, dim2=2)
        distractors = similarity + weight.log()
        eye = torch.eye(weight.shape[1], dtype=torch.bool, device=weight.device)
        everything = torch.where(eye, similarity, distractors)
        loss = (torch.logsumexp(everything, dim=-1) - own).sum()
        with torch.no_grad():
            best = similarity.masked_fill(weight == 0, -torch.inf).amax(-1)
            correct = (own > best).sum()
    return Contrast(loss, correct)
