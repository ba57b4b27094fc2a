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
from ssl_core.training.randomness import generator


class CropBatch(NamedTuple):
    """Crops of one batch."""

    waveforms: npt.NDArray[np.float32]
    """`[batch, sample]` at 16 kHz."""
    sequences: tuple[int, ...]
    """The manifest's sequences they were cut from."""
    skips: dict[str, int]
    """Sequences left out, by reason."""
    examples: tuple[str, ...]
    """A message for each sequence left out."""


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
        """Take the given sequences of a manifest in crops of `samples`.

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
        """The crops at positions `position` to `position + size`; unusable ones are passed over.

        Raises:
            DataError: no usable crop in a whole pass over the sequences.
        """
        waveforms: list[npt.NDArray[np.float32]] = []
        used: list[int] = []
        skips: collections.Counter[str] = collections.Counter()
        examples: list[str] = []
        bad: set[int] = set()
        while len(waveforms) < size:
            sequence, start = self._entry(position)
            position += 1
            if sequence in bad:
                continue
            try:
                crop = read_crop(
                    self.manifest.root, self.manifest.sequences[sequence], start, self.samples
                )
            except BadAudio as error:
                bad.add(sequence)
                skips[error.reason] += 1
                examples.append(str(error))
                if len(bad) == len(self.indices):
                    raise DataError(
                        f"no usable audio for partition {self.partition}: all {len(bad)} of its "
                        f"sequences are bad, such as: {examples[0]}"
                    ) from None
                continue
            waveforms.append(crop)
            used.append(sequence)
        return CropBatch(np.stack(waveforms), tuple(used), dict(skips), tuple(examples))

    def updates(
        self, numbers: Iterable[int], size: int, accumulation: int
    ) -> Iterator[tuple[int, list[CropBatch]]]:
        """The batches of each of the given updates, `accumulation` of `size` crops, in turn."""
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
        waveforms: list[npt.NDArray[np.float32]] = []
        used: list[int] = []
        skips: collections.Counter[str] = collections.Counter()
        examples: list[str] = []
        for place in chosen:
            index = self.indices[int(place)]
            sequence = self.manifest.sequences[index]
            try:
                start = (sequence.samples - self.samples) // 2
                waveforms.append(read_crop(self.manifest.root, sequence, start, self.samples))
            except BadAudio as error:
                skips[error.reason] += 1
                examples.append(str(error))
                continue
            used.append(index)
        if not waveforms:
            raise DataError(f"no usable audio to evaluate on, such as: {examples[0]}")
        return CropBatch(np.stack(waveforms), tuple(used), dict(skips), tuple(examples))


def describe(root: Path, is_demo: bool) -> str:
    """What a run trains on, in one line; says so when it is the demo corpus."""
    if not is_demo:
        return f"corpus: {root}"
    return (
        "corpus: the built-in demo corpus, synthetic voices (no --data was given). "
        "For real speech: python -m ssl_core.download --subset train-clean-100 --output DIR, "
        "then --data DIR"
    )
