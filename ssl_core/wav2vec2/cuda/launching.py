"""Launches Triton kernels, except on tensors without data, so that a step can be traced."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

launched: list[str] | None = None
"""Names of all kernels launched, where something counts them."""


def has_data(x: Tensor) -> bool:
    """Whether a tensor `[...]` has data; those of a trace have none."""
    return type(x) in (Tensor, torch.nn.Parameter)


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **constants: Any) -> None:
    """Run a Triton kernel.

    Args:
        kernel: made by `triton.jit`.
        grid: programs along up to three axes; none may be 0.
        arguments: of the kernel; at least one is a tensor.
        constants: its compile-time arguments, `num_warps` and `num_stages`.
    """
    if launched is not None:
        launched.append(kernel.__name__)
    if all(has_data(x) for x in arguments if isinstance(x, Tensor)):
        kernel[tuple(grid)](*arguments, **constants)


def blocks(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`."""
    return -(-count // size)


def addresses(*tensors: Tensor | None) -> list[int]:
    """Addresses of tensors `[...]` on their device; 0 for none or for one without data."""
    return [0 if x is None or not has_data(x) else x.data_ptr() for x in tensors]


def to_device(rows: Sequence[Sequence[int]], device: torch.device, kept: list[Tensor]) -> Tensor:
    """Copy numbers to a device without waiting for it.

    Args:
        rows: `[row][column]`.
        device: where to.
        kept: where the copy's source is added if a CUDA graph is captured, since the graph reads
            it again at every replay.

    Returns:
        `[row, column]` int64.
    """
    source = torch.tensor(rows, dtype=torch.int64)
    if device.type != "cuda" or not has_data(source):
        return source
    source = source.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        kept.append(source)
    return source.to(device, non_blocking=True)
