"""Precision: matrix products under autocast, sums and softmaxes in fp32 or above."""

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """`x`, `[...]`, converted to fp32 if it is bf16 or fp16."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with `x`, `[...]`: autocast's if enabled, else its own."""
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to a plan's precision: `bf16` or `fp16`; disabled for `fp32` and `tf32`."""
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, half, enabled=precision in ("bf16", "fp16"))
