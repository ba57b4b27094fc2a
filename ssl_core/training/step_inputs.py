"""What a batch is computed from, and its place in the update."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

Waveforms = npt.NDArray[np.float32]
_T = TypeVar("_T")


class Controls(NamedTuple):
    """What depends on the number of the update; `[]` fp32 each on the device if resident."""

    rate: float | Tensor
    """Learning rate."""
    diversity: float | Tensor
    """Weight of the diversity loss."""
    temperature: float | Tensor
    """Of the Gumbel softmax."""
    growth: float | Tensor
    """By which the loss scale (fp16) grows."""


class BatchInputs(NamedTuple):
    """All that one batch is computed from."""

    waveforms: Tensor
    """`[batch, sample]`."""
    masked: Tensor
    """`[batch, masked]` int64, see `model.Chance`."""
    seeds: Tensor
    """`[batch]` int64."""
    controls: Controls


class Stage(NamedTuple):
    """The place of a batch in its update, which decides what is computed."""

    first: bool
    last: bool
    masked: int
    """Masked frames of the update up to the end of this batch."""
    keep: tuple[bool, ...]
    """For each transformer layer, whether it runs."""

    @property
    def ends(self) -> tuple[bool, bool]:
        """`first` and `last`."""
        return self.first, self.last


Compute = Callable[[BatchInputs, Stage], Tensor]
"""Computes a batch on the device and returns the totals of the update so far."""


def with_last(items: Iterable[_T]) -> Iterator[tuple[_T, bool]]:
    """Each item and whether it is the last one."""
    iterator = iter(items)
    try:
        item = next(iterator)
    except StopIteration:
        return
    for following in iterator:
        yield item, False
        item = following
    yield item, True
