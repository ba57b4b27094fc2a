"""Chooses the torch device and precision of this machine."""

from typing import Literal

import torch

from common.errors import UsageError
from ssl_core.planning.step_plan import Precision


def choose_device(name: str) -> str:
    """Resolve `auto` to CUDA if available, else the CPU; check other names.

    Raises:
        UsageError: no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"'{name}' is not a torch device: use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device '{name}' is not supported: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device '{name}' is not there: torch sees {torch.cuda.device_count()} GPUs"
        )
    return name


def choose_precision(name: Literal["auto"] | Precision, device: str) -> Precision:
    """Resolve `auto` to bf16 if the device has matrix units for it, else fp32."""
    if name != "auto":
        return name
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"
