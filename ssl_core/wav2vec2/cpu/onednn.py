"""fp32 products of matrices by oneDNN, through the only operation of torch that reaches it."""

import torch
from torch import Tensor

LINEAR = torch.ops.mkldnn._linear_pointwise.default
TURNED = 64
"""Columns transposed at a time; torch's copy of a whole transposed matrix is half as fast."""


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[..., in]` by the transpose of `[out, in]`, plus `[out]`: `[..., out]`, fp32."""
    out: Tensor = LINEAR(x, weight, bias, "none", [], "")
    return out


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """`[row, inner]` by `[inner, column]`: `[row, column]`, fp32, both with any strides."""
    # oneDNN has no fast code for weights whose rows lie apart: a product takes thousands of times
    # as long.
    dense = b.is_contiguous() or b.t().is_contiguous()
    return affine(_by_rows(a), (b if dense else b.contiguous()).t(), None)


def _by_rows(a: Tensor) -> Tensor:
    """`[row, column]` with the elements of a row side by side, as the operation takes it."""
    if a.stride(1) == 1:
        return a
    out = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    for first in range(0, a.shape[1], TURNED):
        out[:, first : first + TURNED].copy_(a[:, first : first + TURNED])
    return out
