"""Batches of fixed-length crops, decoded from a manifest as they are needed."""

import collections
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from common.errors import DataError
from partitions.audio import BadAudio, read_crop
from partitions.manifest import Manifest
from ssl_core.planning.work import Waveforms
from ssl_core.training.randomness import generator


class CropBatch(NamedTuple):
    """Crops of one batch."""

    waveforms: npt.NDArray[np.float32]
    """`[batch, sample]` at 16 kHz."""
    sequences: tuple[int, ...]
    """Indices of the manifest's sequences that the crops were cut from."""
    skips: dict[str, int]
    """Sequences skipped, by reason."""
    examples: tuple[str, ...]
    """A message for each sequence skipped."""


class _Reading:
    """Crops read so far, and the sequences skipped on the way."""

    def __init__(self, manifest: Manifest, samples: int) -> None:
        self.manifest, self.samples = manifest, samples
        self.waveforms: list[npt.NDArray[np.float32]] = []
        self.used: list[int] = []
        self.bad: set[int] = set()
        self.skips: collections.Counter[str] = collections.Counter()
        self.examples: list[str] = []

    def add(self, index: int, start: int) -> None:
        """Read the crop of a sequence at a sample, or count the sequence as skipped, once."""
        if index in self.bad:
            return
        sequence = self.manifest.sequences[index]
        try:
            crop = read_crop(self.manifest.root, sequence, start, self.samples)
        except BadAudio as error:
            self.bad.add(index)
            self.skips[error.reason] += 1
            self.examples.append(str(error))
            return
        self.waveforms.append(crop)
        self.used.append(index)

    def batch(self) -> CropBatch:
        """The crops read, of which there must be one."""
        stacked = np.stack(self.waveforms)
        return CropBatch(stacked, tuple(self.used), dict(self.skips), tuple(self.examples))


class Crops:
    """An endless, seeded order over some sequences of a manifest, cut to one length.

    Which crops a batch holds follows from (seed, partition, position) alone: a client that is
    asked for the same update twice, or after a restart, trains on the same audio.
    """

    def __init__(
        self,
        manifest: Manifest,
        indices: Sequence[int],
        samples: int,
        seed: int,
        partition: int = 0,
    ) -> None:
        """Take some sequences of a manifest.

        Args:
            manifest: the recut corpus.
            indices: of the sequences; those shorter than a crop are skipped.
            samples: in a crop.
            seed: of the order and of where crops start.
            partition: tells apart those who have the same seed, such as clients.

        Raises:
            DataError: no sequence is long enough.
        """
        self.manifest = manifest
        self.indices = [i for i in indices if manifest.sequences[i].samples >= samples]
        self.samples, self.seed, self.partition = samples, seed, partition
        if not self.indices:
            raise DataError(
                f"no audio for partition {partition}: none of its {len(indices)} sequences in "
                f"{manifest.root} holds {samples} samples"
            )

    def _entry(self, position: int) -> tuple[int, int]:
        """The sequence at a position of the endless order, and where its crop starts."""
        epoch, place = divmod(position, len(self.indices))
        order = generator(self.seed, "order", self.partition, epoch).permutation(len(self.indices))
        sequence = self.indices[int(order[place])]
        spare = self.manifest.sequences[sequence].samples - self.samples
        start = generator(self.seed, "window", self.partition, position).integers(spare + 1)
        return sequence, int(start)

    def batch(self, position: int, size: int) -> CropBatch:
        """The next `size` usable crops from a position on.

        Raises:
            DataError: none of the sequences is usable.
        """
        reading = _Reading(self.manifest, self.samples)
        while len(reading.waveforms) < size:
            reading.add(*self._entry(position))
            position += 1
            if len(reading.bad) == len(self.indices):
                raise DataError(
                    f"no usable audio for partition {self.partition}: all {len(reading.bad)} of "
                    f"its sequences are bad, such as: {reading.examples[0]}"
                )
        return reading.batch()

    def updates(
        self, numbers: Iterable[int], size: int, accumulation: int
    ) -> Iterator[tuple[int, list[CropBatch]]]:
        """The batches of updates.

        Args:
            numbers: of the updates, in turn.
            size: crops in a batch.
            accumulation: batches in an update.

        Yields:
            The number of an update and its batches.
        """
        for number in numbers:
            first = number * accumulation
            yield (
                number,
                [self.batch((first + part) * size, size) for part in range(accumulation)],
            )

    def fixed(self, count: int) -> CropBatch:
        """Up to `count` crops for evaluation: spread evenly, cut from the middle, always the same.

        Raises:
            DataError: none of them is usable.
        """
        chosen = np.unique(np.linspace(0, len(self.indices) - 1, count).round().astype(int))
        reading = _Reading(self.manifest, self.samples)
        for place in chosen:
            index = self.indices[int(place)]
            reading.add(index, (self.manifest.sequences[index].samples - self.samples) // 2)
        if not reading.waveforms:
            raise DataError(f"no usable audio to evaluate on, such as: {reading.examples[0]}")
        return reading.batch()


class UpdateBatches(NamedTuple):
    """The batches of an update by its number, `[batch, sample]` each; can be pickled."""

    crops: Crops
    batch: int
    accumulation: int

    def __call__(self, number: int) -> Iterator[Waveforms]:
        """Read them."""
        ((_, read),) = self.crops.updates([number], self.batch, self.accumulation)
        return (batch.waveforms for batch in read)


def describe(root: Path, is_demo: bool) -> str:
    """What a run trains on, in one line; says so when it is the demo corpus."""
    if not is_demo:
        return f"corpus: {root}"
    return (
        "corpus: the built-in demo corpus, synthetic voices (no --data was given). "
        "For real speech: python -m ssl_core.download --subset train-clean-100 --output DIR, "
        "then --data DIR"
    )
