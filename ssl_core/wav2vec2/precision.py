"""Sums and softmaxes are taken in fp32 at least, whatever matrix products are taken in."""

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` itself, or in fp32 when it is of lower precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products with `x` are taken in: autocast's dtype, or its own."""
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Matrix products in a plan's precision: `fp32`, `bf16` or `fp16`."""
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, half, enabled=precision != "fp32")
