"""The pretraining step: crops, a plan and the global update number in, named loss parts out.

An update takes `accumulation` batches. The loss is divided once by all masked frames of the update.
A batch that does not fit in memory is computed in two stages: first the features and code
probabilities of all crops without a graph; then, for each micro-batch, the context network's
gradient down to the features, and the extractor's gradient with the features recomputed. The
diversity loss needs the mean code probabilities of the whole batch, which the first stage gives, so
the gradient is that of the whole batch, to rounding.
"""

import contextlib
import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ssl_core.planning.step_plan import Plan
from ssl_core.training import randomness, schedule
from ssl_core.training.adamw import AdamW
from ssl_core.training.gradient_functions import continue_backward, scale_gradient
from ssl_core.training.planned_step import AppliedInBackward, PlannedStep
from ssl_core.training.pretraining_recipe import Recipe
from ssl_core.wav2vec2.model import Draws, LossParts, PretrainingModel, draw
from ssl_core.wav2vec2.precision import autocast
from ssl_core.wav2vec2.quantizer import diversity_loss, perplexity
from ssl_core.wav2vec2.recompute import recomputed

Waveforms = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """Results of an update. Losses are means over masked frames, in nats."""

    update: int
    loss: float
    """Contrastive loss plus weighted diversity loss, penalty and code entropy."""
    contrastive: float
    diversity: float
    """Unused fraction of the codebook."""
    penalty: float
    """Mean square of the extractor's output."""
    accuracy: float
    """Fraction of masked frames whose code was identified among the negatives."""
    perplexity: float
    """Effective number of codebook entries in use, over all groups."""
    code_entropy: float
    """Entropy of a frame's code distribution in nats, mean over frames and groups."""
    masked_fraction: float
    distinct_negatives: float
    """Mean number of distinct frames among a frame's negatives."""
    gradient_norm: float
    learning_rate: float
    temperature: float
    applied: bool
    """False if the gradient was not finite and the update was skipped."""
    loss_scale: float
    """By which the loss was multiplied for its gradient; 1 except in fp16."""
    crops: int
    seconds: float
    """Seconds of audio in the update."""

    def metrics(self) -> dict[str, float]:
        """All fields as numbers."""
        return {key: float(value) for key, value in dataclasses.asdict(self).items()}


class BatchSums(NamedTuple):
    """Sums over the masked frames of one batch, detached; `probabilities`: `[group, entry]`."""

    contrastive: float
    penalty: float
    entropy: float
    correct: int
    masked: int
    probabilities: Tensor


class Weights(NamedTuple):
    """Weights of the loss parts and the Gumbel temperature at an update."""

    diversity: float
    penalty: float
    temperature: float
    entropy: float = 0.0


def combine(parts: LossParts, weights: Weights, masked: int) -> Tensor:
    """Combine the loss parts of a whole batch, as in fairseq.

    Args:
        parts: sums over the masked frames of the batch.
        weights: of the parts.
        masked: number of masked frames.

    Returns:
        The loss summed over masked frames, `[]`.
    """
    diversity = diversity_loss(parts.probabilities / masked) * masked
    return (
        parts.contrastive
        + weights.diversity * diversity
        + weights.penalty * parts.penalty
        + weights.entropy * parts.entropy
    )


class PretrainingStep(PlannedStep):
    """Takes pretraining updates by a plan; shared by central runs, clients and simulations."""

    model: PretrainingModel

    def __init__(
        self, model: PretrainingModel, recipe: Recipe, plan: Plan, *, seed: int, total_updates: int
    ) -> None:
        """Set up the model and its optimizer.

        Args:
            model: to pretrain.
            recipe: hyperparameters.
            plan: how a step is taken.
            seed: of masks, negatives, noise and dropout.
            total_updates: length of the learning-rate schedule.
        """
        recipe.validate()
        recipe.validate_plan(model.config, plan)
        self.recipe, self.seed, self.total_updates = recipe, seed, total_updates
        super().__init__(model, model.wav2vec2, plan)

    def validate(self, plan: Plan) -> None:
        """Check a plan against model and recipe; raises `UsageError`."""
        self.recipe.validate_plan(self.model.config, plan)

    def make_optimizers(self) -> dict[str, AdamW]:
        """Create one optimizer for all parameters."""
        state = self.plan.optimizer_state
        return {"model": AdamW(self.model.named_parameters(), self.recipe, state)}

    def _features(self, waveforms: Tensor, recompute: bool) -> Tensor:
        if recompute:
            features = recomputed(self.model.features, waveforms)
        else:
            features = self.model.features(waveforms)
        return scale_gradient(features, self.recipe.feature_grad_scale)

    def accumulate(
        self, waveforms: Tensor, draws: Draws, weights: Weights, divisor: float
    ) -> BatchSums:
        """Add the gradient of one batch's loss, divided by `divisor`, to the parameters' gradients.

        Args:
            waveforms: `[batch, sample]`.
            draws: random draws of this batch.
            weights: of the loss parts, and the Gumbel temperature.
            divisor: masked frames of the whole update.
        """
        if self.plan.effective_micro_batch < len(waveforms):
            return self._accumulate_in_two_stages(waveforms, draws, weights, divisor)
        with autocast(self.device, self.plan.precision):
            features = self._features(waveforms, self.plan.recompute_features)
            parts = self.model.loss_parts(features, draws, weights.temperature)
        masked = draws.masked.numel()
        (combine(parts, weights, masked) / divisor).backward()
        return _sums([parts], masked)

    def _accumulate_in_two_stages(
        self, waveforms: Tensor, draws: Draws, weights: Weights, divisor: float
    ) -> BatchSums:
        size, masked = self.plan.effective_micro_batch, draws.masked.numel()
        pieces = [
            (waveforms[first : first + size], draws.rows(first, first + size))
            for first in range(0, len(waveforms), size)
        ]
        kept, probabilities = [], None
        with torch.no_grad(), autocast(self.device, self.plan.precision):
            for rows, chance in pieces:
                features = self.model.features(rows)
                summed = self.model.code_probabilities(features, chance)
                probabilities = summed if probabilities is None else probabilities + summed
                kept.append(features)
        assert probabilities is not None
        mean = (probabilities / masked).requires_grad_()
        (slope,) = torch.autograd.grad(diversity_loss(mean), mean)
        done = []
        for number, (rows, chance) in enumerate(pieces):
            leaf = kept[number].detach().requires_grad_()
            kept[number] = leaf[:0]
            with autocast(self.device, self.plan.precision):
                parts = self.model.loss_parts(leaf, chance, weights.temperature)
            loss = (
                parts.contrastive
                + weights.diversity * (slope * parts.probabilities).sum()
                + weights.penalty * parts.penalty
                + weights.entropy * parts.entropy
            )
            (loss / divisor).backward()
            done.append(LossParts(*(part.detach() for part in parts)))
            with autocast(self.device, self.plan.precision):
                features = self._features(rows, recompute=False)
            assert leaf.grad is not None
            continue_backward(features, leaf.grad)
            del leaf, features
        return _sums(done, masked)

    def update(self, batches: Iterable[Waveforms], update: int, key: int = 0) -> StepReport:
        """Take one update.

        Args:
            batches: `accumulation` batches, each `[batch, sample]`.
            update: global update number, from 0.
            key: distinguishes clients that take the same update.

        Returns:
            The report; if the gradient is not finite the update is skipped.
        """
        config, plan = self.model.config, self.plan
        rate = schedule.learning_rate(self.recipe, update, self.total_updates)
        rates = {"model": rate}
        weights = Weights(
            schedule.diversity_weight(config, self.recipe, update, self.total_updates),
            self.recipe.feature_penalty_weight,
            schedule.gumbel_temperature(self.recipe, update),
            self.recipe.code_entropy_weight,
        )
        sums: list[BatchSums] = []
        distinct = 0.0
        divisor, frames, crops = 1, 0, 0
        self._drop_gradients()
        in_backward = None
        if plan.apply_in_backward:
            in_backward = AppliedInBackward(self.optimizers, rates, 1 / self.loss_scale)
        for number, batch in enumerate(batches):
            rng = randomness.generator(self.seed, "draws", key, update, number)
            chance = draw(config, len(batch), batch.shape[1], rng, pool=self.recipe.negative_pool)
            distinct += float((chance.multiplicity > 0).sum(-1).float().mean()) * len(batch)
            crops += len(batch)
            frames += len(batch) * config.frames(batch.shape[1])
            divisor = chance.masked.numel() * plan.accumulation
            waveforms = torch.from_numpy(batch).to(self.device)
            chance = chance.to(self.device)
            with in_backward or contextlib.nullcontext(), self._settling():
                sums.append(self.accumulate(waveforms, chance, weights, divisor / self.loss_scale))
        masked = sum(part.masked for part in sums)
        if in_backward is not None:
            norm, applied = in_backward.norm, in_backward.finite
        else:
            factor = divisor / masked / self.loss_scale
            norm, applied = self._apply(rates, factor, self.recipe.clip_norm)
        scale = self.loss_scale
        if plan.precision == "fp16":
            self._adapt_loss_scale(update, applied)
        self._drop_gradients()
        probabilities = [part.probabilities / part.masked for part in sums]
        contrastive = sum(part.contrastive for part in sums) / masked
        diversity = float(np.mean([float(diversity_loss(p)) for p in probabilities]))
        penalty = sum(part.penalty for part in sums) / masked
        entropy = sum(part.entropy for part in sums) / masked
        return StepReport(
            update=update,
            loss=contrastive
            + weights.diversity * diversity
            + weights.penalty * penalty
            + weights.entropy * entropy,
            contrastive=contrastive,
            diversity=diversity,
            penalty=penalty,
            accuracy=sum(part.correct for part in sums) / masked,
            perplexity=float(np.mean([float(perplexity(p)) for p in probabilities])),
            code_entropy=entropy,
            masked_fraction=masked / frames,
            distinct_negatives=distinct / crops,
            gradient_norm=norm,
            learning_rate=rate,
            temperature=weights.temperature,
            applied=applied,
            loss_scale=scale,
            crops=crops,
            seconds=crops * plan.length,
        )


def _sums(parts: list[LossParts], masked: int) -> BatchSums:
    return BatchSums(
        contrastive=float(sum(part.contrastive.detach() for part in parts)),
        penalty=float(sum(part.penalty.detach() for part in parts)),
        entropy=float(sum(part.entropy.detach() for part in parts)),
        correct=int(sum(part.correct for part in parts)),
        masked=masked,
        probabilities=torch.stack([part.probabilities.detach() for part in parts]).sum(0).cpu(),
    )
