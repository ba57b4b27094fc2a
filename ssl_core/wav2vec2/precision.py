"""Sums and softmaxes are taken in fp32 at least, whatever matrix products are taken in."""

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` itself, or in fp32 when it is of lower precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in a dtype.

    `x.to(dtype)` is `x` itself where nothing changes, which torch.compile (2.11) takes for a
    constant when a custom function returns it: the gradient is then zero.
    """
    return x if x.dtype == dtype else x.to(dtype)
