"""The quantiser: product quantisation of masked frames with a Gumbel softmax."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.cpu.products import Linear
from ssl_core.wav2vec2.device_kernels import fused
from ssl_core.wav2vec2.keyed_bits import site_keys, uniform
from ssl_core.wav2vec2.precision import at_least_fp32


class Quantized(NamedTuple):
    """Output of the quantiser."""

    vectors: Tensor
    """`[batch, masked, codevector_dim]`."""
    codes: Tensor
    """`[batch, masked]` integers; equal codes have equal vectors."""
    probabilities: Tensor
    """`[group, entry]`: softmax of the logits without noise, summed over frames."""
    entropy: Tensor
    """Entropy of each frame's softmax in nats, mean over groups, summed over frames."""


def gumbel_noise(seeds: Tensor, site: int, count: int) -> Tensor:
    """Standard Gumbel noise from the crops' seeds, `[batch]` int64: `[batch, count]` fp32."""
    if fused(seeds):
        from ssl_core.wav2vec2.cuda import drawing_kernels

        return drawing_kernels.gumbel_noise(seeds, site, count)
    return -torch.log(-torch.log(uniform(site_keys(seeds, site), count)))


class Quantizer(nn.Module):
    """Product quantisation with a straight-through Gumbel softmax (wav2vec 2.0, section 2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.groups = config.num_codevector_groups
        self.entries = config.num_codevectors_per_group
        width = config.codevector_dim // self.groups
        self.codevectors = nn.Parameter(torch.empty(1, self.groups * self.entries, width))
        self.weight_proj = Linear(config.conv_dim[-1], self.groups * self.entries)

    def logits(self, frames: Tensor) -> Tensor:
        """Logits of `[batch, masked, channel]` frames: fp32, `[batch, masked, group, entry]`."""
        logits = at_least_fp32(self.weight_proj(frames))
        return logits.unflatten(-1, (self.groups, self.entries))

    def forward(
        self, frames: Tensor, noise: Tensor | None, temperature: float | Tensor
    ) -> Quantized:
        """Quantise masked frames.

        Args:
            frames: `[batch, masked, channel]`.
            noise: standard Gumbel noise, `[batch, masked, group, entry]`; None, as in evaluation,
                chooses the most likely entry.
            temperature: temperature of the softmax that the gradient passes through.
        """
        logits = self.logits(frames)
        logarithms = torch.log_softmax(logits, dim=-1)
        likely = logarithms.exp()
        probabilities = likely.sum((0, 1))
        entropy = -(likely * logarithms).sum() / self.groups
        if noise is None:
            choice = logits.argmax(-1)
            weights = torch.zeros_like(logits).scatter(-1, choice[..., None], 1.0)
        else:
            soft = torch.softmax((logits + noise) / temperature, dim=-1)
            choice = soft.argmax(-1)
            hard = torch.zeros_like(soft).scatter(-1, choice[..., None], 1.0)
            weights = hard - soft.detach() + soft
        book = self.codevectors.view(self.groups, self.entries, -1)
        vectors = torch.einsum("bmgv,gvd->bmgd", weights, book).flatten(2)
        codes = choice[..., 0]
        for group in range(1, self.groups):
            codes = codes * self.entries + choice[..., group]
        return Quantized(vectors, codes, probabilities, entropy)


def perplexity(probabilities: Tensor) -> Tensor:
    """Effective number of entries in use, summed over groups (wav2vec 2.0, equation 4).

    `probabilities`: `[group, entry]`, summing to 1 in each group. The result is a scalar between
    the number of groups and the number of entries of all groups.
    """
    # The logarithm of an unused entry, with probability 0, would have no finite gradient.
    logarithm = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny)
    entropy = -torch.xlogy(probabilities, logarithm).sum(-1)
    return entropy.exp().sum()


def diversity_loss(probabilities: Tensor) -> Tensor:
    """Unused fraction of the codebook, (G V - perplexity) / (G V); `[group, entry]` to a scalar."""
    total = probabilities.numel()
    return (total - perplexity(probabilities)) / total
