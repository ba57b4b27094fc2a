"""The feed-forward network of a transformer layer."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.cpu import products
from ssl_core.wav2vec2.cpu.products import Linear
from ssl_core.wav2vec2.device_kernels import fused
from ssl_core.wav2vec2.dropout import Dropout
from ssl_core.wav2vec2.residual import Biased, linear


class _ActivatedLinear(torch.autograd.Function):
    """GELU, then a linear layer; saves the input for the backward pass, not its GELU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return products.affine(F.gelu(x), weight.to(x.dtype), bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_x = torch.empty_like(x)  # holds the GELU first, then the gradient
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            torch.ops.aten.gelu(x, out=grad_x)
            grad_weight = products.multiply(rows.t(), grad_x.flatten(0, -2)).to(weight.dtype)
            grad_bias = rows.sum(0, dtype=weight.dtype)
        products.multiply(rows, weight.to(rows.dtype), out=grad_x.view(-1, grad_x.shape[-1]))
        torch.ops.aten.gelu_backward(grad_x, x, grad_input=grad_x)
        return grad_x, grad_weight, grad_bias


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: ModelConfig, site: int) -> None:
        """`site`: number of the dropout's site in the network."""
        super().__init__()
        self.intermediate_dense = Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_dropout = Dropout(config.activation_dropout, site)
        self.output_dense = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, seeds: Tensor | None, lengths: Sequence[int] = ()) -> Biased:
        """Apply the feed-forward network.

        Args:
            x: `[batch, frame, hidden]`.
            seeds: `[batch]` int64, one per crop, for dropout; None drops nothing.
            lengths: frames of each packed crop (see `packing`), else empty.

        Returns:
            `[batch, frame, hidden]`, perhaps without the last bias.
        """
        inner, outer = self.intermediate_dense, self.output_dense
        are_plain = type(inner) is Linear and type(outer) is Linear
        drops = seeds is not None and self.intermediate_dropout.rate
        if fused(x) and are_plain and not drops:
            from ssl_core.wav2vec2.cuda.fused_feed_forward import fused_feed_forward

            weights = (inner.weight.to(x.dtype), inner.bias, outer.weight.to(x.dtype))
            return Biased(fused_feed_forward(x, *weights), outer.bias)
        x = inner(x)
        if drops or type(outer) is not Linear:
            return linear(outer, self.intermediate_dropout(F.gelu(x), seeds, lengths))
        return Biased(_ActivatedLinear.apply(x, outer.weight, outer.bias), None)
