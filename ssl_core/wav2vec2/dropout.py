"""Dropout whose mask follows from the crop's seed and the site in the network.

Masks are not saved: the backward pass computes them again, see `keyed_bits`. What is dropped
therefore depends neither on the device, nor on how a batch is split, nor on which activations are
recomputed, and costs no memory.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssl_core.wav2vec2.device_kernels import fused
from ssl_core.wav2vec2.keyed_bits import keep_elements, site_keys
from ssl_core.wav2vec2.operators import operator

if TYPE_CHECKING:
    from ssl_core.wav2vec2.cuda.fused_dropout import Drop


def _unfilled(seeds: Tensor, shape: Sequence[int], lengths: Sequence[int]) -> Tensor:
    batch = 1 if lengths else len(seeds)
    return torch.empty((batch, *shape), dtype=torch.uint8, device=seeds.device)


@operator("keep_mask")
def keep_mask(
    seeds: Tensor, site: int, shape: Sequence[int], rate: float, lengths: Sequence[int]
) -> Tensor:
    """Draw dropout masks.

    Args:
        seeds: `[batch]` int64, one per crop, on the device where the mask is wanted.
        site: number of the dropout's site in the network.
        shape: shape of a crop's mask; of all crops together if they are packed.
        rate: fraction to drop.
        lengths: frames of each packed crop, `shape[0]` in total (see `packing`), else empty.

    Returns:
        `[batch, *shape]` uint8, or `[1, *shape]` if packed; 1 where an element is kept.
    """
    width = math.prod(shape[1:])
    sizes = [own * width for own in lengths or [shape[0]] * len(seeds)]
    kept = keep_elements(site_keys(seeds, site), sizes, rate)
    return kept.view(torch.uint8).view(-1, *shape)


@keep_mask.shapes
def _(
    seeds: Tensor, site: int, shape: Sequence[int], rate: float, lengths: Sequence[int]
) -> Tensor:
    return _unfilled(seeds, shape, lengths)


@operator("drop")
def drop(x: Tensor, seeds: Tensor, site: int, rate: float, lengths: Sequence[int]) -> Tensor:
    """Apply dropout.

    Args:
        x: `[batch, frame, ...]`, or `[1, frame, ...]` if packed.
        seeds: `[batch]` int64, one per crop.
        site: number of the dropout's site in the network.
        rate: fraction to drop.
        lengths: frames of each packed crop (see `packing`), else empty.

    Returns:
        The same shape as `x`.
    """
    mask = keep_mask(seeds, site, x.shape[1:], rate, lengths)
    return torch.mul(x, mask).mul_(1 / (1 - rate))


@drop.shapes
def _(x: Tensor, seeds: Tensor, site: int, rate: float, lengths: Sequence[int]) -> Tensor:
    return torch.empty_like(x)


def _keep_seeds(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seeds, ctx.site, ctx.rate, ctx.lengths = inputs
    ctx.save_for_backward(seeds)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dropped = drop(grad, *ctx.saved_tensors, ctx.site, ctx.rate, ctx.lengths)
    return dropped, None, None, None, None


drop.gradient(_gradient, _keep_seeds)


class Dropout(nn.Module):
    """Dropout at one site of the network."""

    def __init__(self, rate: float, site: int) -> None:
        super().__init__()
        self.rate, self.site = rate, site

    def forward(self, x: Tensor, seeds: Tensor | None, lengths: Sequence[int] = ()) -> Tensor:
        """Apply dropout.

        Args:
            x: `[batch, frame, ...]`, or `[1, frame, ...]` if packed.
            seeds: `[batch]` int64, one per crop; None, as in evaluation, drops nothing.
            lengths: frames of each packed crop (see `packing`), else empty.

        Returns:
            The same shape as `x`.
        """
        if seeds is None or not self.rate:
            return x
        if fused(x):
            from ssl_core.wav2vec2.cuda.fused_dropout import fused_dropout

            where = self.at(seeds, lengths)
            return x if where is None else fused_dropout(x, where)
        return drop(x, seeds, self.site, self.rate, lengths)

    def at(self, seeds: Tensor | None, lengths: Sequence[int] = ()) -> "Drop | None":
        """Where a GPU's kernels drop; arguments as of `forward`, None for nowhere."""
        from ssl_core.wav2vec2.cuda.fused_dropout import drop_at

        return drop_at(seeds, self.site, self.rate, lengths)
