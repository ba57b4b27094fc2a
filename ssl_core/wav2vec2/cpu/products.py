"""All large products of matrices on a CPU, by the library that suits the processor.

Where torch's BLAS is chosen (see `product_library`), and for all types but fp32, these are torch's
own operations. oneDNN multiplies only pairs of matrices here: torch has no batched product by it,
and one matrix after another takes longer than MKL's batches even with AVX2 (benchmarks/README.md).
The products of attention and of spectra therefore stay with torch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_core.wav2vec2.cpu import onednn
from ssl_core.wav2vec2.cpu.product_library import ONEDNN, library
from ssl_core.wav2vec2.precision import compute_dtype

SMALLEST = 32
"""Rows, columns and inner size from which oneDNN is worth its start."""


def by_onednn(a: Tensor, *sizes: int) -> bool:
    """Whether oneDNN multiplies a matrix `[..., inner]` whose other sizes are these.

    A compiled layer is left to the compiler, which cannot read the choice.
    """
    return (
        not torch.compiler.is_compiling()
        and a.dtype is torch.float32
        and a.device.type == "cpu"
        and min(a.shape[-1], *sizes) >= SMALLEST
        and library() == ONEDNN
    )


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply two matrices, without a graph.

    Args:
        a: `[row, inner]`.
        b: `[inner, column]`.
        out: `[row, column]` to write to; None for a new one.

    Returns:
        The product, `[row, column]`.
    """
    if not by_onednn(a, len(a), b.shape[1]):
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    product = onednn.multiply(a, b)
    return product if out is None else out.copy_(product)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a product to a matrix in place, without a graph.

    Args:
        out: `[row, column]`.
        a: `[row, inner]`.
        b: `[inner, column]`.
    """
    if by_onednn(a, len(a), b.shape[1]):
        out += onednn.multiply(a, b)
    else:
        out.addmm_(a, b)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer without a graph.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`.
        bias: `[out]` or None.

    Returns:
        `[..., out]`.
    """
    if by_onednn(x, x.numel() // max(1, x.shape[-1]), len(weight)):
        return onednn.affine(x, weight, bias)
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """A linear layer in fp32 by oneDNN, with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return affine(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = multiply(rows, weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = multiply(rows.t(), x.reshape(-1, x.shape[-1]))
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer, like `F.linear`.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`.
        bias: `[out]` or None.

    Returns:
        `[..., out]`.
    """
    if compute_dtype(x) is torch.float32 and by_onednn(
        x, x.numel() // max(1, x.shape[-1]), len(weight)
    ):
        out: Tensor = _Linear.apply(x, weight, bias)
        return out
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` whose products go through this module."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        return linear(x, self.weight, self.bias)
