"""The contrastive loss: identify a masked frame's own code among negatives.

Negatives are drawn with replacement, so a frame drawn n times adds n times its exponential to the
denominator. The loss therefore needs only a matrix of similarities, `[pool, masked, masked]`, and
one of multiplicities of the same shape. This equals the sum over 100 negatives gathered for each
frame, without copying any.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_core.wav2vec2.keyed_bits import Keys, below
from ssl_core.wav2vec2.precision import at_least_fp32


class Contrast(NamedTuple):
    """The loss and the number of correct frames, both summed over masked frames."""

    loss: Tensor
    """Cross-entropy in nats."""
    correct: Tensor
    """Frames that are more similar to their own code than to any negative."""


def sample_negatives(keys: Keys, pools: int, masked: int, negatives: int) -> Tensor:
    """Draw negatives: how often each masked frame is a negative of each other one.

    Args:
        keys: of the site, for each crop.
        pools: number of crops, or 1 if the whole batch is one pool.
        masked: masked frames in a pool, at least 2; equally many of each crop.
        negatives: negatives per frame, drawn uniformly from the other frames of its pool.

    Returns:
        Multiplicities, `[pool, masked, masked]` fp32; rows sum to `negatives`, the diagonal is 0.
    """
    own = pools * masked // len(keys.first)
    drawn = below(keys, own * negatives, masked - 1).view(pools, masked, negatives)
    drawn = drawn + (drawn >= torch.arange(masked, device=drawn.device)[None, :, None])
    counts = torch.zeros(pools, masked, masked, device=drawn.device)
    return counts.scatter_add_(2, drawn, torch.ones((), device=drawn.device).expand(drawn.shape))


def contrastive_loss(
    predictions: Tensor, targets: Tensor, codes: Tensor, multiplicity: Tensor, temperature: float
) -> Contrast:
    """Equation 3 of wav2vec 2.0, summed over frames.

    Args:
        predictions: `[pool, masked, width]`, projected output of the context network.
        targets: `[pool, masked, width]`, projected code vectors; they receive a gradient.
        codes: `[pool, masked]` integers; negatives with the frame's own code are skipped.
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
        negatives = similarity + weight.log()
        eye = torch.eye(weight.shape[1], dtype=torch.bool, device=weight.device)
        everything = torch.where(eye, similarity, negatives)
        loss = (torch.logsumexp(everything, dim=-1) - own).sum()
        with torch.no_grad():
            best = similarity.masked_fill(weight == 0, -torch.inf).amax(-1)
            correct = (own > best).sum()
    return Contrast(loss, correct)
