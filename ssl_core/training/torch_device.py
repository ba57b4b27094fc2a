"""Chooses the torch device and precision of this machine."""

from typing import Literal

import torch

from common.errors import UsageError
from ssl_core.planning.processor import cpu_precisions, product_speed, warn_once
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
    """Resolve `auto` to bf16 if the device multiplies faster in it than in fp32, else fp32.

    A warning names the factor by which a processor is slower in the precision that was asked for.

    Raises:
        UsageError: the processor cannot multiply in the precision.
    """
    if device.startswith("cuda"):
        if name != "auto":
            return name
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if name == "auto":
        return "bf16" if "bf16" in cpu_precisions() else "fp32"
    if name == "tf32":
        raise UsageError("precision tf32 is for GPUs: choose auto, fp32 or bf16")
    if name != "fp32":
        speed = product_speed(name)
        if not speed:
            raise UsageError(
                f"precision {name}: torch cannot multiply in {name} on this processor; choose auto "
                "or fp32"
            )
        if speed < 1:
            warn_once(
                f"in {name} a product takes this processor {1 / speed:.1f} times as long as in "
                "fp32: choose auto or fp32 for speed"
            )
    return name
