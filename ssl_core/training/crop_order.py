"""The order of crops: a keyed permutation for each epoch, in constant time and memory.

A place in an epoch is written as two digits of base `side`, the rounded-up square root of the
number of places. Eight rounds of a Feistel network add to one digit, in turn, a keyed hash of the
other (Luby and Rackoff, 1988). A result beyond the last place is encrypted again until it is a
place: cycle walking. Both, for domains of any size, are of Black and Rogaway, "Ciphers with
Arbitrary Finite Domains" (2002), sections 4 and 5. The hash is the finalizer of SplitMix64 (Steele,
Lea and Flood, 2014).
"""

import functools
import math

from ssl_core.training.randomness import words

_ROUNDS = 8
"""More than the four that a large domain needs (Luby and Rackoff), for domains of a few places."""
_MASK = 2**64 - 1


class CropOrder:
    """An endless order of `size` places, each of which comes once in every epoch.

    It holds nothing that grows with `size`, and is the same in every process.
    """

    def __init__(self, size: int, seed: int, partition: int) -> None:
        """Choose the order.

        Args:
            size: number of places, at least 1.
            seed: of the run.
            partition: distinguishes clients that have the same seed.
        """
        self.size, self.seed, self.partition = size, seed, partition
        self.side = math.isqrt(size - 1) + 1

    def place(self, position: int) -> int:
        """The place, 0 to `size` - 1, at a position of the endless order."""
        epoch, place = divmod(position, self.size)
        swap, *keys = _keys(1 + _ROUNDS, "order", self.seed, self.partition, epoch)
        if place < 2 <= self.size:  # the network alone gives permutations of one parity
            place ^= swap & 1
        while True:
            left, right = divmod(place, self.side)
            for key in keys:
                left, right = right, (left + _mix(right + key)) % self.side
            place = left * self.side + right
            if place < self.size:
                return place

    def start(self, position: int, spare: int) -> int:
        """The first sample of the crop at a position, drawn evenly from 0 to `spare`."""
        (key,) = _keys(1, "start", self.seed, self.partition, 0)
        return _mix(position + key) * (spare + 1) >> 64


@functools.lru_cache(maxsize=64)
def _keys(count: int, purpose: str, seed: int, partition: int, epoch: int) -> tuple[int, ...]:
    """Keys of 64 bits."""
    return words(count, seed, purpose, partition, epoch)


def _mix(value: int) -> int:
    """A hash of 64 bits of a whole number."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)
