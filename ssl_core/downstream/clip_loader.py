"""Batches of labelled clips, from audio or from what a frozen part of the model made of it once."""

import collections
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from common.errors import DataError, Interrupted
from common.progress import track
from partitions.audio import SILENCE, BadAudio, read_piece
from partitions.sampling import SAMPLE_RATE
from ssl_core.downstream.clips import Clip, TaskData
from ssl_core.downstream.feature_cache import LIMIT, FeatureCache, clip_key
from ssl_core.downstream.frozen_part import FrozenPart
from ssl_core.downstream.heads import BLANK
from ssl_core.downstream.task_recipe import TaskRecipe
from ssl_core.downstream.task_step import Batch
from ssl_core.training import randomness

SILENT_LABEL = "silence"
"""The one class whose clips may be silent."""
TOGETHER = 40 * SAMPLE_RATE
"""Samples that a frozen part of the model works on at a time, at least one clip."""


def check(data: TaskData, recipe: TaskRecipe) -> None:
    """Check that every clip has a text, or a label that the training set has.

    Raises:
        DataError: no clips, a class that the training set does not have, or no text.
    """
    for name in ("train", "valid", "test"):
        clips: tuple[Clip, ...] = getattr(data, name)
        if not clips:
            raise DataError(f"{data.root}: no usable clips to {name}")
        for clip in clips:
            if recipe.transcribes and not clip.text.strip():
                raise DataError(f"{clip.name}: its transcript is empty")
            if recipe.transcribes or (name == "test" and data.trials):
                continue
            if clip.label not in data.labels:
                known = ", ".join(data.labels[:8]) + (", ..." if len(data.labels) > 8 else "")
                raise DataError(
                    f"{clip.name} ({name}): its label '{clip.label}' is not in the training set "
                    f"({known})"
                )


def targets_of(clips: Sequence[Clip], labels: Sequence[str], recipe: TaskRecipe) -> torch.Tensor:
    """`[clip]` classes, or `[clip, symbol]` padded with the blank; unknown symbols are skipped."""
    places = {label: number for number, label in enumerate(labels)}
    if not recipe.transcribes:
        return torch.tensor([places.get(clip.label, 0) for clip in clips])
    texts = [[places[s] + 1 for s in clip.text if s in places] for clip in clips]
    longest = max(1, max(len(text) for text in texts))
    return torch.tensor([text + [BLANK] * (longest - len(text)) for text in texts])


class ClipLoader:
    """Makes batches of clips at the stage that a step trains from; unusable clips are skipped."""

    def __init__(
        self,
        root: Path,
        labels: Sequence[str],
        recipe: TaskRecipe,
        frozen: FrozenPart,
        limit: int = LIMIT,
    ) -> None:
        """Open the cache of features.

        Args:
            root: paths of clips are relative to it.
            labels: of the training set.
            recipe: of the task.
            frozen: computes the features that the cache does not hold.
            limit: bytes of the cache; 0 keeps none.
        """
        self.root, self.labels, self.recipe, self.frozen = root, labels, recipe, frozen
        limit = limit if frozen.makes_features else 0
        self.cache = FeatureCache(frozen.identity(), frozen.width, limit)
        self.bad: dict[str, str] = {}
        """Clips that cannot be used, by name, and why."""
        self.examples: list[str] = []
        """A message for each of the first few of them."""
        self._keys: dict[Clip, bytes] = {}

    @property
    def skips(self) -> collections.Counter[str]:
        """Clips skipped, by reason."""
        return collections.Counter(self.bad.values())

    def waveform(self, clip: Clip) -> npt.NDArray[np.float32] | None:
        """The clip's samples `[sample]` as the model takes them; None when it cannot be used."""
        if clip.name in self.bad:
            return None
        try:
            audio = read_piece(self.root, clip.piece)
            level = float(np.sqrt(np.mean(np.square(audio, dtype=np.float64))))
            if level < SILENCE and clip.label != SILENT_LABEL:
                raise BadAudio("silent", clip.piece.path, "the clip holds only silence")
            if self.frozen.frames(len(audio)) < 1:
                raise BadAudio("too short", clip.piece.path, f"{len(audio)} samples make no frame")
        except BadAudio as error:
            self.bad[clip.name] = error.reason
            if len(self.examples) < 10:
                self.examples.append(str(error))
            return None
        return self.frozen.normalised(audio)

    def key(self, clip: Clip) -> bytes:
        """Of the clip in the cache."""
        if clip not in self._keys:
            self._keys[clip] = clip_key(self.root, clip.piece)
        return self._keys[clip]

    def prepare(
        self,
        clips: Sequence[Clip],
        show: bool = True,
        stopped: Callable[[], bool] = lambda: False,
    ) -> int:
        """Compute the features that the cache lacks, the longest clips first.

        Args:
            clips: all that will be needed.
            show: whether to show progress.
            stopped: whether the user wants to stop.

        Returns:
            How many clips were computed.

        Raises:
            Interrupted: stopped; what was computed is kept.
        """
        if not self.frozen.makes_features or self.cache.problem:
            return 0
        by_key = {self.key(clip): clip for clip in clips}
        missing = self.cache.missing(by_key)
        todo = sorted((by_key[key] for key in missing), key=lambda c: (-c.piece.samples, c.name))
        bar = track(_groups(todo), len(todo), "clips through the frozen model", show, len)
        computed = 0
        for group in bar:
            if stopped():
                raise Interrupted(f"interrupted after {computed} clips of {len(todo)}")
            computed += len(self._features(group))
            if self.cache.problem:
                break
        return computed

    def _features(self, clips: Sequence[Clip]) -> dict[Clip, torch.Tensor]:
        """Features of the clips that can be used, kept in the cache too."""
        read = [(clip, self.waveform(clip)) for clip in clips]
        usable = {clip: audio for clip, audio in read if audio is not None}
        result: dict[Clip, torch.Tensor] = {}
        for group in _groups(list(usable)):
            made = self.frozen([usable[clip] for clip in group])
            result |= dict(zip(group, made, strict=True))
        self.cache.put([(self.key(clip), value.numpy()) for clip, value in result.items()])
        return result

    def batch(self, clips: Sequence[Clip]) -> tuple[Batch, list[Clip]] | None:
        """A batch of those of the clips that can be used, and which these are; None for none."""
        found: dict[Clip, torch.Tensor] = {}
        stage = self.frozen.stage
        if stage == "waveform":
            for clip in clips:
                audio = self.waveform(clip)
                if audio is not None:
                    found[clip] = torch.from_numpy(audio)
        else:
            kept = self.cache.get([self.key(clip) for clip in clips])
            for clip in clips:
                if self.key(clip) in kept:
                    found[clip] = torch.from_numpy(kept[self.key(clip)].copy())
            found |= self._features([clip for clip in clips if clip not in found])
        used = [clip for clip in clips if clip in found]
        if not used:
            return None
        samples = [len(found[clip]) if stage == "waveform" else clip.piece.samples for clip in used]
        targets = targets_of(used, self.labels, self.recipe)
        return Batch([found[clip] for clip in used], stage, samples, targets), used

    @staticmethod
    def order(clips: Sequence[Clip], seed: int, key: int, epoch: int) -> list[Clip]:
        """The clips in an epoch's order; `key` tells apart those who train on their own."""
        order = randomness.generator(seed, "clips", key, epoch).permutation(len(clips))
        return [clips[int(row)] for row in order]

    def epoch(
        self, clips: Sequence[Clip], size: int, seed: int, epoch: int, first: int = 0
    ) -> Iterator[tuple[int, Batch]]:
        """The batches of an epoch from number `first` on, in an order of its own.

        Raises:
            DataError: none of the clips can be used.
        """
        order = self.order(clips, seed, 0, epoch)
        usable = bool(first)
        for number in range(first, -(-len(clips) // size)):
            made = self.batch(order[number * size : (number + 1) * size])
            if made is not None:
                usable = True
                yield number, made[0]
        if not usable:
            raise DataError(f"none of the clips can be used, such as: {self.examples[0]}")

    def describe_skips(self) -> list[str]:
        """One line for each reason clips were skipped, then the first few of them."""
        lines = [f"skipped, {reason}: {count}" for reason, count in self.skips.items()]
        return lines + [f"  {example}" for example in self.examples[:3]]


def _groups(clips: Sequence[Clip]) -> Iterator[list[Clip]]:
    """Neighbouring clips that are worked on together."""
    group: list[Clip] = []
    for clip in clips:
        longest = max([clip.piece.samples, *(other.piece.samples for other in group)])
        if group and longest * (len(group) + 1) > TOGETHER:
            yield group
            group = []
        group.append(clip)
    if group:
        yield group
