"""Sums and softmaxes are taken in fp32 at least, whatever matrix products are taken in."""

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` itself, or in fp32 when it is of lower precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
