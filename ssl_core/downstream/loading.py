"""Batches of labelled clips, from audio or from what a frozen part of the model made of it once."""

import collections
import threading
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
from ssl_core.downstream.heads import BLANK
from ssl_core.downstream.task_recipe import TaskRecipe
from ssl_core.downstream.task_step import Batch, TaskStep
from ssl_core.training import randomness
from ssl_core.wav2vec2.precision import autocast

SILENT_LABEL = "silence"
"""The one class whose clips may be silent."""
TOGETHER = 40 * SAMPLE_RATE
"""Samples that a frozen part of the model works on at a time, at least one clip."""


def check(data: TaskData, recipe: TaskRecipe) -> None:
    """Check that every clip says what is to be found in it, in the training set's terms.

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
    """`[clip]` classes, or `[clip, symbol]` padded with the blank; unknown symbols are left out."""
    places = {label: number for number, label in enumerate(labels)}
    if not recipe.transcribes:
        return torch.tensor([places.get(clip.label, 0) for clip in clips])
    texts = [[places[s] + 1 for s in clip.text if s in places] for clip in clips]
    longest = max(1, max(len(text) for text in texts))
    return torch.tensor([text + [BLANK] * (longest - len(text)) for text in texts])


class ClipLoader:
    """Makes batches of clips at the stage a step trains from; unusable clips are passed over."""

    def __init__(
        self, root: Path, labels: Sequence[str], step: TaskStep, limit: int = LIMIT
    ) -> None:
        """Batches for a step.

        Args:
            root: paths of clips are relative to it.
            labels: of the training set.
            step: its model makes what the cache does not hold.
            limit: bytes of the cache of features; 0 keeps none.
        """
        self.root, self.labels, self.step = root, labels, step
        stage = step.stage
        digest = step.model.upstream.digest(stage) if stage != "waveform" else ""
        identity = f"{digest[:24]}-{stage}-{step.plan.precision}"
        width = step.model.width(stage)
        self.cache = FeatureCache(identity, width, limit if stage != "waveform" else 0)
        self.bad: dict[str, str] = {}
        """Clips that cannot be used, by name, and why."""
        self.examples: list[str] = []
        self._keys: dict[Clip, bytes] = {}
        self._lock = threading.Lock()
        """The model makes features in the thread that decodes and in that which evaluates."""

    @property
    def skips(self) -> collections.Counter[str]:
        """Clips passed over, by reason."""
        return collections.Counter(self.bad.values())

    def waveform(self, clip: Clip) -> npt.NDArray[np.float32] | None:
        """The clip's samples `[sample]` as the model takes them; None when it cannot be used."""
        if clip.name in self.bad:
            return None
        upstream = self.step.model.upstream
        try:
            audio = read_piece(self.root, clip.piece)
            level = float(np.sqrt(np.mean(np.square(audio, dtype=np.float64))))
            if level < SILENCE and clip.label != SILENT_LABEL:
                raise BadAudio("silent", clip.piece.path, "the clip holds only silence")
            if upstream.frames(len(audio)) < 1:
                raise BadAudio("too short", clip.piece.path, f"{len(audio)} samples make no frame")
        except BadAudio as error:
            self.bad[clip.name] = error.reason
            if len(self.examples) < 10:
                self.examples.append(str(error))
            return None
        if upstream.normalise:
            audio = (audio - audio.mean()) / np.sqrt(audio.var() + 1e-7)
        return audio

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
        """Compute what the cache lacks, the longest clips first; how many were computed.

        Raises:
            Interrupted: `stopped` says so; what was computed is kept.
        """
        if self.step.stage == "waveform" or self.cache.problem:
            return 0
        by_key = {self.key(clip): clip for clip in clips}
        missing = self.cache.missing(by_key)
        todo = sorted((by_key[key] for key in missing), key=lambda c: (-c.piece.samples, c.name))
        bar = track(_groups(todo), len(todo), "clips through the frozen model", show, len)
        computed = 0
        for group in bar:
            if stopped():
                raise Interrupted(f"interrupted after {computed} clips of {len(todo)}")
            computed += len(self._made(group))
            if self.cache.problem:
                break
        return computed

    def _made(self, clips: Sequence[Clip]) -> dict[Clip, torch.Tensor]:
        """What the frozen part of the model makes of clips, kept in the cache too."""
        read = [(clip, self.waveform(clip)) for clip in clips]
        usable = [(clip, audio) for clip, audio in read if audio is not None]
        result: dict[Clip, torch.Tensor] = {}
        step, stage = self.step, self.step.stage
        for group in _groups([clip for clip, _ in usable]):
            chosen = {clip: audio for clip, audio in usable if clip in set(group)}
            samples = [len(audio) for audio in chosen.values()]
            waveforms = [torch.from_numpy(audio).to(step.device) for audio in chosen.values()]
            with self._lock, torch.no_grad(), autocast(step.device, step.plan.precision):
                made = step.model.advance(waveforms, samples, "waveform", stage)
            separate = step.model.separate(made.float().cpu(), samples, stage)
            for clip, frames in zip(chosen, separate, strict=True):
                result[clip] = frames.clone()
        self.cache.put([(self.key(clip), value.numpy()) for clip, value in result.items()])
        return result

    def batch(self, clips: Sequence[Clip]) -> tuple[Batch, list[Clip]] | None:
        """A batch of those of the clips that can be used, and which these are; None for none."""
        found: dict[Clip, torch.Tensor] = {}
        stage = self.step.stage
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
            found |= self._made([clip for clip in clips if clip not in found])
        used = [clip for clip in clips if clip in found]
        if not used:
            return None
        samples = [len(found[clip]) if stage == "waveform" else clip.piece.samples for clip in used]
        targets = targets_of(used, self.labels, self.step.model.recipe)
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
        """One line for each reason clips were passed over, then the first few of them."""
        lines = [f"passed over, {reason}: {count}" for reason, count in self.skips.items()]
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
