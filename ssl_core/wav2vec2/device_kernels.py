"""The seam for devices: which kernels compute what the model is made of.

The model reads the same on every device. Its parts ask `fused` whether the kernels of `cuda`, in
Triton, serve a tensor. Where they do not, the operators of `cpu` and plain torch do, on any device.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

Kernels = Literal["fused", "plain"]
"""`fused`: Triton's; `plain`: those of `cpu` on a CPU, and plain torch on a GPU without Triton."""

ARCHITECTURE = (8, 0)
"""Oldest CUDA architecture whose kernels Triton makes well (Ampere), which is also that of bf16."""

_forced: Kernels | None = None


@functools.cache
def available(device: str) -> Kernels:
    """The best kernels for a device, `cuda:1` for example, by what it and this machine can do."""
    where = torch.device(device)
    if where.type != "cuda" or not has_triton():
        return "plain"
    return "fused" if torch.cuda.get_device_capability(where) >= ARCHITECTURE else "plain"


def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def capability(device: str) -> float | None:
    """Compute capability of a GPU, such as 8.6; None if there is none here."""
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return float(f"{major}.{minor}")


def fused(x: Tensor) -> bool:
    """Whether Triton's kernels serve a tensor `[...]`."""
    if _forced is not None:
        return _forced == "fused"
    return x.device.type == "cuda" and available(str(x.device)) == "fused"


def force(kernels: Kernels | None) -> None:
    """Take these kernels in this process, whatever the device; None chooses by device."""
    global _forced
    _forced = kernels


@contextlib.contextmanager
def forced(kernels: Kernels | None) -> Iterator[None]:
    """Take these kernels meanwhile, whatever the device: for plans, traces and tests."""
    before = _forced
    force(kernels)
    try:
        yield
    finally:
        force(before)
