"""The fine-tuning step: takes labelled clips, a plan and learning rates; trains a task's model.

The loss of an update is the mean over its clips. Micro-batches are taken in order of clip length,
and each clip has its own dropout seed, so splitting a batch changes only the rounding.
"""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from partitions.sampling import SAMPLE_RATE
from ssl_core.downstream.heads import BLANK
from ssl_core.downstream.task_model import EXTRACTOR, Inputs, Stage, TaskModel
from ssl_core.planning import allocator
from ssl_core.planning.step_plan import Plan
from ssl_core.training import randomness
from ssl_core.training.adamw import AdamW
from ssl_core.training.applied_in_backward import AppliedInBackward
from ssl_core.training.planned_step import PlannedStep
from ssl_core.wav2vec2 import packing
from ssl_core.wav2vec2.precision import at_least_fp32, autocast
from ssl_core.wav2vec2.recompute import recomputed

HEAD, BACKBONE = "head", "backbone"
"""Parameter groups, each with its own learning rate."""


class Batch(NamedTuple):
    """Clips of an update, or of a batch to score."""

    inputs: Sequence[Tensor]
    """One tensor per clip: `[sample]`, or `[frame, feature]` at later stages."""
    stage: Stage
    """Stage of the inputs."""
    samples: Sequence[int]
    """Samples of each clip's waveform, at 16 kHz."""
    targets: Tensor
    """`[clip]` int64 classes, or `[clip, symbol]` int64 padded with the blank."""

    def rows(self, chosen: Sequence[int]) -> "Batch":
        """The chosen clips, targets `[clip, symbol]` padded to the longest of them."""
        targets = self.targets[list(chosen)]
        if targets.dim() == 2:
            targets = targets[:, : max(1, int((targets != BLANK).sum(1).max()))]
        return Batch(
            [self.inputs[row] for row in chosen],
            self.stage,
            [self.samples[row] for row in chosen],
            targets,
        )

    def on(self, device: torch.device) -> Inputs:
        """Inputs on a device, joined into one tensor except waveforms (see `Inputs`)."""
        if self.stage == "waveform":
            return [clip.to(device) for clip in self.inputs]
        if self.stage == "extracted":
            return packing.join(self.inputs).to(device)
        return torch.nn.utils.rnn.pad_sequence(list(self.inputs), batch_first=True).to(device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskReport:
    """What an update did."""

    loss: float
    """Mean over clips, in nats; nats per symbol for CTC."""
    correct: int
    """Clips classified correctly; 0 for transcription."""
    gradient_norm: float
    applied: bool
    """False if the gradient was not finite and the update was skipped."""
    loss_scale: float
    """By which the loss was multiplied for its gradient; 1 except in fp16."""
    clips: int
    seconds: float
    """Seconds of audio."""


class TaskStep(PlannedStep):
    """Trains a head, and an unfrozen backbone, by a plan."""

    model: TaskModel

    def __init__(
        self,
        model: TaskModel,
        plan: Plan,
        *,
        unfrozen: bool,
        seed: int,
        trained: Collection[str] | None = None,
    ) -> None:
        """Make optimizers of the trained parameters; no others get a gradient.

        Args:
            model: upstream and head.
            plan: how a step is taken; its length is ignored.
            unfrozen: whether the backbone is trained.
            seed: of dropout.
            trained: names of the parameters to train; overrides `unfrozen`.
        """
        self.seed, self.recipe = seed, model.recipe
        names = model.trainable(unfrozen) if trained is None else frozenset(trained)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        self.unfrozen = any(not name.startswith("head.") for name in names)
        self._extractor = any(name.startswith(EXTRACTOR) for name in names)
        plan.validate()
        products = model.wav2vec2 if self.unfrozen else None
        super().__init__(model, model.wav2vec2, plan, products)

    @property
    def stage(self) -> Stage:
        """The last stage that no trained parameter affects; its features can be cached."""
        if self.unfrozen:
            return "waveform" if self._extractor else "extracted"
        return "mean" if self.model.head.pools else "frames"

    def validate(self, plan: Plan) -> None:
        """Check a plan; raises `UsageError`."""
        plan.validate()

    def make_optimizers(self) -> dict[str, AdamW]:
        """One optimizer for the head, one for an unfrozen backbone."""
        groups: dict[str, list[tuple[str, torch.nn.Parameter]]] = {HEAD: [], BACKBONE: []}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups[HEAD if name.startswith("head.") else BACKBONE].append((name, parameter))
        return {
            key: self.optimizer_of(group, self.recipe) for key, group in groups.items() if group
        }

    @contextlib.contextmanager
    def _settling(self) -> Iterator[None]:
        """Return freed memory in the head's layers too."""
        head = self.model.head
        layers = [module for module in head.modules() if not any(module.children())]
        weights = [weight for weight in head.parameters() if weight.requires_grad]
        recurrent = [module for module in layers if isinstance(module, torch.nn.LSTM)]
        others = [module for module in layers if module not in recurrent]
        with super()._settling(), allocator.settling(others, weights, recurrent):
            yield

    def update(
        self, batch: Batch, update: int, rates: Mapping[str, float], key: int = 0
    ) -> TaskReport:
        """Take one update.

        Args:
            batch: clips at any stage up to `stage`.
            update: global update number, from 0.
            rates: learning rates of `HEAD` and `BACKBONE`.
            key: of the client; 0 for a central run.

        Returns:
            What happened; if the gradient is not finite, weights are unchanged.
        """
        plan, count = self.plan, len(batch.samples)
        rng = randomness.generator(self.seed, "dropout", key, update)
        seeds = torch.from_numpy(rng.integers(2**62, size=count)).to(self.device)
        keep = None
        if self.unfrozen:
            config = self.model.wav2vec2.config  # type: ignore[union-attr]
            keep = tuple(bool(x) for x in rng.random(config.num_hidden_layers) >= config.layerdrop)
        order = [int(row) for row in np.argsort(batch.samples, kind="stable")]
        chunk = min(plan.micro_batch or count, count)
        self._drop_gradients()
        in_backward = None
        if plan.apply_in_backward and chunk == count:
            in_backward = AppliedInBackward(self.optimizers, rates, 1 / float(self.loss_scale))
        done = []
        with in_backward or contextlib.nullcontext(), self._settling(), self.computing():
            for first in range(0, count, chunk):
                rows = order[first : first + chunk]
                losses, found = self._losses(batch.rows(rows), seeds[rows], keep)
                (losses.sum() * (self.loss_scale / count)).backward()
                done.append((losses.detach().sum(), found))
                self._collect(first == 0, first + chunk >= count)
        norm: float | Tensor
        applied: bool | Tensor
        if in_backward is not None:
            norm, applied = in_backward.norm, in_backward.finite
        else:
            norm, applied = self._apply(rates, 1 / self.loss_scale, self.recipe.clip_norm)
        scale = float(self.loss_scale)
        if plan.precision == "fp16":
            self._adapt_loss_scale(self.loss_scale_growth(update), applied)
        self._drop_gradients()
        return TaskReport(
            loss=sum(float(loss) for loss, _ in done) / count,
            correct=sum(int(found) for _, found in done),
            gradient_norm=float(norm),
            applied=bool(applied),
            loss_scale=scale,
            clips=count,
            seconds=sum(batch.samples) / SAMPLE_RATE,
        )

    def _losses(
        self, batch: Batch, seeds: Tensor, keep: Sequence[bool] | None
    ) -> tuple[Tensor, Tensor]:
        """Loss of each clip, `[clip]`, and number of clips classified correctly, `[]`."""
        model, stage = self.model, batch.stage
        inputs = batch.on(self.device)
        targets = batch.targets.to(self.device)
        with autocast(self.device, self.plan.precision):
            if self.unfrozen:
                x = model.contextualise(self._extracted(inputs, stage), batch.samples, seeds, keep)
            else:
                with torch.no_grad():
                    x = model.advance(inputs, batch.samples, stage, self.stage)
        lengths = model.head_lengths(batch.samples, "frames" if self.unfrozen else self.stage)
        with autocast(self.device, self.plan.precision if self.unfrozen else "fp32"):
            prediction = model.head(at_least_fp32(x), lengths, seeds)
        losses = model.head.losses(prediction, lengths, targets)
        found = torch.zeros((), device=self.device)
        if targets.dim() == 1:
            found = (prediction.logits.argmax(1) == targets).sum()
        return losses, found

    def _extracted(self, inputs: Inputs, stage: Stage) -> Tensor:
        if stage == "extracted":
            assert isinstance(inputs, Tensor)
            return inputs
        if not self._extractor:
            with torch.no_grad():
                return self.model.extract(inputs)
        if self.plan.recompute_features:
            extracted: Tensor = recomputed(self.model.extract, inputs)
            return extracted
        return self.model.extract(inputs)
