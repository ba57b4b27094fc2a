"""The contrastive loss: identify a masked frame's own code among negatives.

Negatives are drawn with replacement, so a frame drawn n times adds n times its exponential to the
denominator. The loss therefore needs only a matrix of similarities, `[pool, masked, masked]`, and
one of multiplicities of the same shape. This equals the sum over 100 negatives gathered for each
frame, without copying any.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_core.wav2vec2.device_kernels import fused
from ssl_core.wav2vec2.keyed_bits import below, site_keys
from ssl_core.wav2vec2.precision import at_least_fp32


class Contrast(NamedTuple):
    """The loss and the number of correct frames, both summed over masked frames."""

    loss: Tensor
    """Cross-entropy in nats."""
    correct: Tensor
    """Frames that are more similar to their own code than to any negative."""


def sample_negatives(seeds: Tensor, site: int, pools: int, masked: int, negatives: int) -> Tensor:
    """Draw negatives: how often each masked frame is a negative of each other one.

    Args:
        seeds: `[batch]` int64, one per crop.
        site: number of the draws' site, see `keyed_bits`.
        pools: number of crops, or 1 if the whole batch is one pool.
        masked: masked frames in a pool, at least 2; equally many of each crop.
        negatives: negatives per frame, drawn uniformly from the other frames of its pool.

    Returns:
        Multiplicities, `[pool, masked, masked]` fp32; rows sum to `negatives`, the diagonal is 0.
    """
    if fused(seeds):
        from ssl_core.wav2vec2.cuda import drawing_kernels

        return drawing_kernels.sample_negatives(seeds, site, pools, masked, negatives)
    own = pools * masked // len(seeds)
    drawn = below(site_keys(seeds, site), own * negatives, masked - 1).view(
        pools, masked, negatives
    )
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
            _Normalised.apply(at_least_fp32(predictions)),
            _Normalised.apply(at_least_fp32(targets)).transpose(1, 2),
        ).div(temperature)
        return Contrast(*_CrossEntropy.apply(similarity, codes, multiplicity))


class _Normalised(torch.autograd.Function):
    """Vectors `[..., width]` divided by their norm, in few operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(1e-8)
        out = x / norm
        ctx.save_for_backward(out, norm)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        out, norm = ctx.saved_tensors
        along = (grad * out).sum(-1, keepdim=True)
        return torch.addcmul(grad, out, along, value=-1).div_(norm)


class _CrossEntropy(torch.autograd.Function):
    """Loss and number of correct frames from similarities `[pool, masked, masked]`.

    The gradient is a softmax less 1 for the frame's own code; it is saved instead of what it
    follows from.
    """

    @staticmethod
    def forward(
        ctx: Any, similarity: Tensor, codes: Tensor, multiplicity: Tensor
    ) -> tuple[Tensor, Tensor]:
        same = codes[:, :, None] == codes[:, None, :]
        weight = multiplicity.masked_fill(same, 0.0)
        own = similarity.diagonal(dim1=1, dim2=2)
        correct = (own > similarity.masked_fill(weight == 0, -torch.inf).amax(-1)).sum()
        weight.diagonal(dim1=1, dim2=2).fill_(1.0)
        logits = weight.log_().add_(similarity)
        total = torch.logsumexp(logits, dim=-1)
        loss = (total - own).sum()
        slope = logits.sub_(total[:, :, None]).exp_()
        slope.diagonal(dim1=1, dim2=2).sub_(1.0)
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * of_loss, None, None
