"""Launches Triton kernels, except on tensors without data, so that a step can be traced."""

from collections import Counter
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
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    if all(has_data(x) for x in tensors):
        # Triton launches on the current GPU, wherever the tensors are.
        with torch.cuda.device_of(tensors[0]):
            kernel[tuple(grid)](*arguments, **constants)


def blocks(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`."""
    return -(-count // size)


def addresses(*tensors: Tensor | None) -> list[int]:
    """Addresses of tensors `[...]` on their device; 0 for none or for one without data."""
    return [0 if x is None or not has_data(x) else x.data_ptr() for x in tensors]


class PinnedTables:
    """Copies tables of numbers to a device without waiting for it, also in a CUDA graph.

    A graph reads its tables again at every replay, from pinned memory that is kept here. That
    memory must be there before the graph is captured, so the tables of a batch that was launched
    kernel by kernel are counted first.
    """

    def __init__(self, device: torch.device) -> None:
        """`device`: where tables are wanted."""
        self._device = device
        self._used: Counter[torch.Size] = Counter()
        self._most: Counter[torch.Size] = Counter()
        self._ready: dict[torch.Size, list[Tensor]] = {}
        self._kept: list[Tensor] = []

    def begin(self) -> None:
        """Count the tables of a batch from here on."""
        self._used = Counter()

    def reserve(self) -> None:
        """Allocate memory for a graph that copies as many tables as any batch so far."""
        for shape, count in (self._most | self._used).items():
            ready = self._ready.setdefault(shape, [])
            while len(ready) < count:
                ready.append(torch.empty(shape, dtype=torch.int64, pin_memory=True))

    def copied(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Numbers `[row][column]` on the device, `[row, column]` int64."""
        source = torch.tensor(rows, dtype=torch.int64)
        if self._device.type != "cuda":
            return source
        if not has_data(source):
            return source.to(self._device)
        if not torch.cuda.is_current_stream_capturing():
            self._used[source.shape] += 1
            self._most |= self._used
            return source.pin_memory().to(self._device, non_blocking=True)
        pinned = self._ready[source.shape].pop()
        pinned.copy_(source)
        self._kept.append(pinned)
        return pinned.to(self._device, non_blocking=True)
