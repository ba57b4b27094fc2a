"""Federated averaging one update at a time; exact, so the order of the updates does not matter.

Each update is multiplied by its weight and rounded to a multiple of 2**-22 before it is added, as a
64-bit integer. Integer addition is associative, so the mean has the same bits whichever update
comes first and however many workers there are. The rounding is finer than that of fp32: with the
80,000 samples of a 5 s crop as weight, the mean is exact to about 3e-12.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from common.errors import ShortwaveError
from fl_client.updates import Floats
from ssl_core.training.randomness import generator

Update = Mapping[str, Floats]
"""Local minus global weights by parameter name, each fp32 `[...]`."""

FRACTION_BITS = 22
LARGEST_CHANGE = 16.0
"""Largest absolute value of an update; anything larger is not the result of training."""
_CAPACITY = 2.0 ** (62 - FRACTION_BITS)
_BLOCK = 2**16
"""Values added at a time, so that intermediate results stay in the processor's cache."""
SKETCH = 2**16
"""Values of a sketch: 256 KiB a client, and cosines to 0.004."""


class RejectedUpdate(ShortwaveError):
    """An update that must not reach the model."""


class Measured(NamedTuple):
    """What the guards know of an update; see `fl_server.guards`."""

    largest: float
    """Largest absolute value."""
    norm: float
    """Euclidean norm over all tensors."""
    sketch: Floats
    """fp32 `[SKETCH]`: sums of the update's values with signs that only depend on their place. Its
    inner products are those of the whole update to about `1 / sqrt(SKETCH)`, and exact for a model
    of at most `SKETCH` weights."""


class Fold:
    """A running weighted sum of any number of updates, in 8 bytes a weight."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Start an empty sum over tensors of these shapes."""
        self.sums = {name: np.zeros(shape, dtype=np.int64) for name, shape in shapes.items()}
        self.weight = 0
        self.count = 0
        self._largest = 0.0

    def check(self, update: Update, partial: bool = False) -> Measured:
        """Measure an update, or reject it.

        Args:
            update: local minus global weights by parameter name, each fp32 `[...]` and read once.
            partial: whether tensors may be missing; they count as zero.

        Raises:
            RejectedUpdate: wrong names or shapes, values not finite or too large.
        """
        wrong = sorted(
            set(update) - set(self.sums) if partial else update.keys() ^ self.sums.keys()
        )
        if wrong:
            raise RejectedUpdate(f"{len(wrong)} tensors missing or unknown, such as {wrong[0]}")
        largest, square, place = 0.0, 0.0, 0
        sketch = np.zeros(SKETCH)
        for name, total in self.sums.items():
            if name in update:
                value = update[name]
                if value.shape != total.shape or value.dtype != np.float32:
                    raise RejectedUpdate(
                        f"{name} is {value.dtype} {value.shape}, not float32 {total.shape}"
                    )
                flat = value.reshape(-1)
                largest = max(largest, _peak(name, flat))
                square += _add_to_sketch(sketch, flat, place)
            place += total.size
        return Measured(largest, math.sqrt(square), sketch.astype(np.float32))

    def add(
        self,
        update: Update,
        weight: int,
        partial: bool = False,
        *,
        scale: float = 1.0,
        measured: Measured | None = None,
    ) -> None:
        """Add one client's whole update, or reject it whole.

        Args:
            update: local minus global weights by parameter name, each fp32 `[...]`.
            weight: samples of audio, above zero.
            partial: whether tensors may be missing; they count as zero.
            scale: multiplies the update, at most 1.
            measured: what `check` returned; None checks here.

        Raises:
            RejectedUpdate: no audio, an overflow, or as `check`.
        """
        if weight <= 0:
            raise RejectedUpdate("the update comes from no audio")
        largest = (measured or self.check(update, partial)).largest * scale
        if (self._largest + largest * weight) >= _CAPACITY:
            raise RejectedUpdate("the sum of this round's updates would overflow")
        factor = float(weight) * scale * 2.0**FRACTION_BITS
        for name in update:
            value, total = update[name].reshape(-1), self.sums[name].reshape(-1)
            for first in range(0, value.size, _BLOCK):
                part = slice(first, first + _BLOCK)
                scaled = np.multiply(value[part], factor, dtype=np.float64)
                total[part] += np.rint(scaled, out=scaled).astype(np.int64)
        self._largest += largest * weight
        self.weight += weight
        self.count += 1

    def mean(self) -> Iterable[tuple[str, Floats]]:
        """Yield the weighted mean update by parameter name, each `[...]`; empties the sum."""
        divisor = self.weight * 2.0**FRACTION_BITS
        for name in list(self.sums):
            yield name, np.asarray(self.sums.pop(name) / divisor, np.float32)


def _peak(name: str, flat: Floats) -> float:
    """The largest absolute value of a tensor `[value]`; raises `RejectedUpdate`."""
    if not flat.size:
        return 0.0
    peak = float(max(flat.max(), -flat.min()))  # NaN if there is one
    if not peak <= LARGEST_CHANGE:
        what = "not finite" if not np.isfinite(peak) else f"as large as {peak:.3g}"
        raise RejectedUpdate(f"{name} has values {what}")
    return peak


def _add_to_sketch(sketch: npt.NDArray[np.float64], flat: Floats, place: int) -> float:
    """Add a tensor to a sketch; returns the sum of its squares.

    All tensors of a model make one long vector, cut into rows of `SKETCH` values. The sketch is the
    sum of the rows, each with a random sign (a count sketch; Charikar et al., 2002).

    Args:
        sketch: `[SKETCH]`.
        flat: the tensor, fp32 `[value]`.
        place: of its first value in the vector.
    """
    square, first = 0.0, 0
    while first < flat.size:
        row, column = divmod(place + first, SKETCH)
        part = flat[first : first + SKETCH - column].astype(np.float64)
        first += part.size
        target = sketch[column : column + part.size]
        if _is_negative(row):
            target -= part
        else:
            target += part
        square += float(np.square(part, out=part).sum())
    return square


@functools.lru_cache(maxsize=2**16)
def _is_negative(row: int) -> bool:
    """The sign of a row, the same in every run, as sketches are kept in checkpoints."""
    return bool(generator(0, "sketch", row).integers(2))
