"""Batches of labelled clips, as waveforms or as cached features of the frozen part of a model."""

import collections
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from common.errors import DataError, Interrupted
from common.progress import track
from partitions.audio import SILENCE, BadAudio, read_piece
from partitions.fingerprints import Fingerprint, fingerprints, is_unchanged
from partitions.sampling import SAMPLE_RATE
from ssl_core.downstream.clips import Clip, TaskData
from ssl_core.downstream.feature_cache import LIMIT, FeatureCache, clip_key
from ssl_core.downstream.frozen_part import FrozenPart
from ssl_core.downstream.heads import BLANK
from ssl_core.downstream.task_recipe import TaskRecipe
from ssl_core.downstream.task_step import Batch
from ssl_core.training import randomness

SILENT_LABEL = "silence"
"""The only class whose clips may be silent."""
TOGETHER = 40 * SAMPLE_RATE
"""Samples per batch of the frozen part; a longer clip is a batch of its own."""


def check(data: TaskData, recipe: TaskRecipe) -> None:
    """Check that every clip has a text, or a label of the training set.

    Raises:
        DataError: no clips, a class that is not in the training set, or an empty text.
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
    """Targets of clips; symbols that are not in `labels` are skipped.

    Args:
        clips: with labels or texts.
        labels: classes, or symbols without the blank.
        recipe: says whether the task transcribes.

    Returns:
        Classes `[clip]`, or symbols `[clip, symbol]` padded with the blank.
    """
    places = {label: number for number, label in enumerate(labels)}
    if not recipe.transcribes:
        return torch.tensor([places.get(clip.label, 0) for clip in clips])
    texts = [[places[s] + 1 for s in clip.text if s in places] for clip in clips]
    longest = max(1, max(len(text) for text in texts))
    return torch.tensor([text + [BLANK] * (longest - len(text)) for text in texts])


class ClipLoader:
    """Makes batches of clips at the stage that a step trains from; skips unusable clips."""

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
            root: corpus root, to which paths of clips are relative.
            labels: classes or symbols of the training set.
            recipe: of the task.
            frozen: computes features that are not in the cache.
            limit: maximum bytes of the cache; 0 switches it off.
        """
        self.root, self.labels, self.recipe, self.frozen = root, labels, recipe, frozen
        limit = limit if frozen.makes_features else 0
        self.cache = FeatureCache(frozen.identity(), frozen.width, limit)
        self.bad: dict[str, str] = {}
        """Reason for each unusable clip, by name."""
        self.examples: list[str] = []
        """Messages of the first ten unusable clips."""
        self._keys: dict[Clip, bytes] = {}
        self._files: dict[str, Fingerprint] = {}

    @property
    def skips(self) -> collections.Counter[str]:
        """Number of skipped clips by reason."""
        return collections.Counter(self.bad.values())

    def waveform(self, clip: Clip) -> npt.NDArray[np.float32] | None:
        """The clip's model input `[sample]`, normalised if the model wants it; None if unusable."""
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
        """The clip's key in the cache."""
        if clip not in self._keys:
            self._look_at([clip])
            self._keys[clip] = clip_key(self._files[clip.piece.path].content, clip.piece)
        return self._keys[clip]

    def _look_at(self, clips: Sequence[Clip], show: bool = False) -> None:
        """Take the fingerprints of all these clips' files at once."""
        new = {clip.piece.path for clip in clips} - self._files.keys()
        if new:
            self._files |= fingerprints(self.root, sorted(new), show)

    def prepare(
        self,
        clips: Sequence[Clip],
        show: bool = True,
        stopped: Callable[[], bool] = lambda: False,
    ) -> int:
        """Compute missing features of the cache, longest clips first.

        Args:
            clips: all clips of the run.
            show: whether to show progress.
            stopped: whether the user wants to stop.

        Returns:
            Number of clips computed.

        Raises:
            Interrupted: the user stopped; computed features stay in the cache.
        """
        if not self.frozen.makes_features or self.cache.problem:
            return 0
        self._look_at(clips, show)
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
        """Compute features of the usable clips and put them into the cache."""
        read = [(clip, self.waveform(clip)) for clip in clips]
        usable = {clip: audio for clip, audio in read if audio is not None}
        result: dict[Clip, torch.Tensor] = {}
        for group in _groups(list(usable)):
            made = self.frozen([usable[clip] for clip in group])
            result |= dict(zip(group, made, strict=True))
        self.cache.put(
            [
                (self.key(clip), value.numpy())
                for clip, value in result.items()
                # Else they may be features of other audio than the key says.
                if is_unchanged(self.root, clip.piece.path, self._files[clip.piece.path])
            ]
        )
        return result

    def batch(self, clips: Sequence[Clip]) -> tuple[Batch, list[Clip]] | None:
        """A batch of the usable clips, and these clips; None if none is usable.

        Inputs of the batch are `[sample]` or `[frame, feature]`, by the stage.
        """
        found: dict[Clip, torch.Tensor] = {}
        stage = self.frozen.stage
        if stage == "waveform":
            for clip in clips:
                audio = self.waveform(clip)
                if audio is not None:
                    found[clip] = torch.from_numpy(audio)
        else:
            self._look_at(clips)
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
        """Shuffle clips for an epoch.

        Args:
            clips: to shuffle.
            seed: of the run.
            key: of the client; 0 for a central run.
            epoch: counted from 0.
        """
        order = randomness.generator(seed, "clips", key, epoch).permutation(len(clips))
        return [clips[int(row)] for row in order]

    def epoch(
        self, clips: Sequence[Clip], size: int, seed: int, epoch: int, first: int = 0
    ) -> Iterator[tuple[int, Batch]]:
        """Batches of an epoch in its own order; those without a usable clip are skipped.

        Args:
            clips: all clips of the epoch.
            size: clips per batch.
            seed: of the run.
            epoch: counted from 0.
            first: number of the first batch to make.

        Yields:
            The batch's number and the batch.

        Raises:
            DataError: no clip is usable.
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
        """One line per reason for skipping, then the first few messages."""
        lines = [f"skipped, {reason}: {count}" for reason, count in self.skips.items()]
        return lines + [f"  {example}" for example in self.examples[:3]]


def _groups(clips: Sequence[Clip]) -> Iterator[list[Clip]]:
    """Split into runs of clips that make at most `TOGETHER` padded samples."""
    group: list[Clip] = []
    for clip in clips:
        longest = max([clip.piece.samples, *(other.piece.samples for other in group)])
        if group and longest * (len(group) + 1) > TOGETHER:
            yield group
            group = []
        group.append(clip)
    if group:
        yield group
