"""Sums, layer norms and dropouts around the parts of the transformer.

On a GPU each is one kernel forward and one backward. It also writes the sum in the precision of
products, for the product that follows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ssl_core.wav2vec2.cpu.products import Linear
from ssl_core.wav2vec2.device_kernels import fused
from ssl_core.wav2vec2.dropout import Dropout
from ssl_core.wav2vec2.precision import compute_dtype


def normed(x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Layer norm of `[batch, frame, channel]`: in fp32, and as products want it."""
    if fused(x):
        from ssl_core.wav2vec2.cuda.fused_norm import Norm, normed_sum

        return normed_sum(x, None, Norm(norm, compute_dtype(x)))
    whole = norm(x)
    return whole, whole


class Biased(NamedTuple):
    """A linear layer's output, and the bias that is still to be added to it, if any."""

    product: Tensor
    """`[batch, frame, hidden]`."""
    bias: Tensor | None
    """`[hidden]`."""

    def whole(self) -> Tensor:
        """The sum."""
        return self.product if self.bias is None else self.product + self.bias


def linear(layer: nn.Module, x: Tensor) -> Biased:
    """A linear layer of `[batch, frame, feature]`; on a GPU a later kernel adds its bias."""
    if fused(x) and type(layer) is Linear:
        return Biased(F.linear(x, layer.weight), layer.bias)
    return Biased(layer(x), None)


def added_and_normed(
    x: Tensor,
    y: Biased,
    dropout: Dropout,
    norm: nn.LayerNorm,
    seeds: Tensor | None,
    lengths: Sequence[int] = (),
) -> tuple[Tensor, Tensor | None]:
    """Layer norm of `x` plus the dropout of `y`.

    Args:
        x: `[batch, frame, hidden]`, at least fp32.
        y: `[batch, frame, hidden]`, with its bias.
        dropout: of `y`.
        norm: of the sum.
        seeds: `[batch]` int64, one per crop; None drops nothing.
        lengths: frames of each packed crop (see `packing`), else empty.

    Returns:
        `[batch, frame, hidden]`, in the precision of `x`, and in that of products if a kernel wrote
        it, else None.
    """
    if fused(x):
        from ssl_core.wav2vec2.cuda.fused_norm import Norm, normed_sum

        how = Norm(norm, compute_dtype(x), before=dropout.at(seeds, lengths))
        return normed_sum(x, y.product, how, y.bias)
    return norm(x + dropout(y.whole(), seeds, lengths)), None


def normed_and_dropped(
    x: Tensor,
    y: Tensor,
    norm: nn.LayerNorm,
    dropout: Dropout,
    seeds: Tensor | None,
    lengths: Sequence[int] = (),
) -> tuple[Tensor, Tensor | None]:
    """Dropout of the layer norm of `x + y`; arguments and results as of `added_and_normed`."""
    if fused(x):
        from ssl_core.wav2vec2.cuda.fused_norm import Norm, normed_sum

        how = Norm(norm, compute_dtype(x), after=dropout.at(seeds, lengths))
        return normed_sum(x, y, how)
    return dropout(norm(x + y), seeds, lengths), None
