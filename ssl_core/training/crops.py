"""Reads batches of fixed-length crops from a manifest, decoding only what they need."""

import collections
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from common.errors import DataError
from partitions.audio import BadAudio, read_crop
from partitions.manifest import Manifest
from ssl_core.planning.work import Waveforms
from ssl_core.training.crop_order import CropOrder


class CropBatch(NamedTuple):
    """The crops of one batch."""

    waveforms: npt.NDArray[np.float32]
    """`[batch, sample]` at 16 kHz."""
    sequences: tuple[int, ...]
    """For each crop, the index of its sequence in the manifest."""
    skips: dict[str, int]
    """Number of skipped sequences by reason."""
    examples: tuple[str, ...]
    """A message for each skipped sequence."""


class _Reading:
    """Collects crops for a batch and counts the sequences skipped."""

    def __init__(self, manifest: Manifest, samples: int) -> None:
        self.manifest, self.samples = manifest, samples
        self.waveforms: list[npt.NDArray[np.float32]] = []
        self.used: list[int] = []
        self.bad: set[int] = set()
        self.skips: collections.Counter[str] = collections.Counter()
        self.examples: list[str] = []

    def add(self, index: int, start: int) -> None:
        """Read the crop of a sequence that starts at sample `start`; skip a bad sequence."""
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
        """The crops read so far, at least one."""
        stacked = np.stack(self.waveforms)
        return CropBatch(stacked, tuple(self.used), dict(self.skips), tuple(self.examples))


class Crops:
    """An endless, seeded stream of crops of one length from some sequences of a manifest.

    The crops of a batch depend only on (seed, partition, position): a client that takes an update
    again, or after a restart, trains on the same audio.
    """

    def __init__(
        self,
        manifest: Manifest,
        indices: npt.ArrayLike,
        samples: int,
        seed: int,
        partition: int = 0,
    ) -> None:
        """Select sequences of a manifest.

        Args:
            manifest: the recut corpus.
            indices: `[sequence]`, of the sequences; those shorter than a crop are skipped.
            samples: samples in a crop.
            seed: of the order and the start of crops.
            partition: distinguishes clients that have the same seed.

        Raises:
            DataError: no sequence is long enough.
        """
        self.manifest = manifest
        chosen = np.asarray(indices, np.int32)
        enough = manifest.sequences.samples[chosen] >= samples
        self.indices = chosen if enough.all() else chosen[enough]
        self.samples, self.partition = samples, partition
        if not len(self.indices):
            raise DataError(
                f"no audio for partition {partition}: none of its {len(chosen)} sequences in "
                f"{manifest.root} holds {samples} samples"
            )
        self.order = CropOrder(len(self.indices), seed, partition)

    def _entry(self, position: int) -> tuple[int, int]:
        """The sequence at a position of the endless order, and the first sample of its crop."""
        sequence = int(self.indices[self.order.place(position)])
        spare = int(self.manifest.sequences.samples[sequence]) - self.samples
        return sequence, self.order.start(position, spare)

    def batch(self, position: int, size: int) -> CropBatch:
        """Read the next `size` usable crops from a position on.

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
        """Read the batches of updates.

        Args:
            numbers: of the updates, in order.
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
        """Read up to `count` crops for evaluation: evenly spread, from the middle, always the same.

        Raises:
            DataError: none of them is usable.
        """
        chosen = np.unique(np.linspace(0, len(self.indices) - 1, count).round().astype(int))
        reading = _Reading(self.manifest, self.samples)
        for place in chosen:
            index = int(self.indices[int(place)])
            length = int(self.manifest.sequences.samples[index])
            reading.add(index, (length - self.samples) // 2)
        if not reading.waveforms:
            raise DataError(f"no usable audio to evaluate on, such as: {reading.examples[0]}")
        return reading.batch()


class UpdateBatches(NamedTuple):
    """Reads the batches of an update, `[batch, sample]` each; picklable."""

    crops: Crops
    batch: int
    accumulation: int

    def __call__(self, number: int) -> Iterator[Waveforms]:
        """Read the batches `[batch, sample]` of update `number`."""
        ((_, read),) = self.crops.updates([number], self.batch, self.accumulation)
        return (batch.waveforms for batch in read)


def describe(root: Path, is_demo: bool) -> str:
    """Describe the corpus of a run in one line."""
    if not is_demo:
        return f"corpus: {root}"
    return (
        "corpus: the built-in demo corpus, synthetic voices (no --data was given). "
        "For real speech: python -m ssl_core.download --subset train-clean-100 --output DIR, "
        "then --data DIR"
    )
