"""Dropout whose mask follows from the crop's seed and the site in the network.

Masks follow from seeds, see `keyed_bits`: what is dropped depends neither on the device, nor on how
a batch is split, nor on which activations are recomputed. For the backward pass a CPU saves a bit
for each element, which it packs and unpacks in a twentieth of the time that a mask takes; a GPU
computes masks again.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
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


@operator("packed_mask")
def packed_mask(mask: Tensor) -> Tensor:
    """Pack a mask on a CPU, uint8 of any shape `[...]`: `[element / 8]` uint8, a bit each."""
    return torch.from_numpy(np.packbits(mask.numpy().reshape(-1)))


@packed_mask.shapes
def _(mask: Tensor) -> Tensor:
    return mask.new_empty(-(-mask.numel() // 8))


@operator("unpacked_mask")
def unpacked_mask(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack a mask of `shape` from `packed_mask`, uint8."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=math.prod(shape))).view(shape)


@unpacked_mask.shapes
def _(bits: Tensor, shape: Sequence[int]) -> Tensor:
    return bits.new_empty(shape)


@operator("drop")
def drop(
    x: Tensor, seeds: Tensor, site: int, rate: float, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Apply dropout.

    Args:
        x: `[batch, frame, ...]`, or `[1, frame, ...]` if packed.
        seeds: `[batch]` int64, one per crop.
        site: number of the dropout's site in the network.
        rate: fraction to drop.
        lengths: frames of each packed crop (see `packing`), else empty.

    Returns:
        The same shape as `x`, and the mask, a bit for each element, but on a GPU none.
    """
    mask = keep_mask(seeds, site, x.shape[1:], rate, lengths)
    out = torch.mul(x, mask).mul_(1 / (1 - rate))
    return out, mask.new_empty(0) if mask.is_cuda else packed_mask(mask)


@drop.shapes
def _(
    x: Tensor, seeds: Tensor, site: int, rate: float, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    size = 0 if x.is_cuda else -(-x.numel() // 8)
    return torch.empty_like(x), x.new_empty(size, dtype=torch.uint8)


@operator("drop_backward")
def _drop_backward(
    grad: Tensor, bits: Tensor, seeds: Tensor, site: int, rate: float, lengths: Sequence[int]
) -> Tensor:
    if len(bits):
        mask = unpacked_mask(bits, grad.shape)
    else:
        mask = keep_mask(seeds, site, grad.shape[1:], rate, lengths)
    return torch.mul(grad, mask).mul_(1 / (1 - rate))


@_drop_backward.shapes
def _(
    grad: Tensor, bits: Tensor, seeds: Tensor, site: int, rate: float, lengths: Sequence[int]
) -> Tensor:
    return torch.empty_like(grad)


def _keep_seeds(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, seeds, ctx.site, ctx.rate, ctx.lengths = inputs
    ctx.save_for_backward(output[1], seeds)
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dropped = _drop_backward(grad, *ctx.saved_tensors, ctx.site, ctx.rate, ctx.lengths)
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
        out: Tensor = drop(x, seeds, self.site, self.rate, lengths)[0]
        return out

    def at(self, seeds: Tensor | None, lengths: Sequence[int] = ()) -> "Drop | None":
        """Where a GPU's kernels drop; arguments as of `forward`, None for nowhere."""
        from ssl_core.wav2vec2.cuda.fused_dropout import drop_at

        return drop_at(seeds, self.site, self.rate, lengths)
