"""The training step: crops, a plan and the global update number in, named loss parts out.

An update takes `accumulation` batches. The loss of a batch is divided by all masked frames of the
update, once. When a batch does not fit in memory at once it is taken in two stages: first the
features and code probabilities of all its crops without a graph, then, a micro-batch at a time,
the context network's gradient down to the features and the extractor's gradient by running it
again. The diversity term needs the mean code probabilities of the whole batch; they are known after
the first stage, so the gradient is that of the whole batch, to rounding.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ssl_core import randomness, schedule
from ssl_core.memory.plan import Plan
from ssl_core.wav2vec2.config import Recipe
from ssl_core.wav2vec2.model import Draws, LossParts, PretrainingModel, draw
from ssl_core.wav2vec2.quantizer import diversity_loss, perplexity

Waveforms = npt.NDArray[np.float32]


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """What an update did. Losses are means over masked frames, in nats."""

    update: int
    loss: float
    """Contrastive loss + weighted diversity loss + weighted penalty."""
    contrastive: float
    diversity: float
    """Unused share of the codebook, in [0, 1]."""
    penalty: float
    """Mean square of the extractor's output."""
    accuracy: float
    """Share of masked frames whose code was found among the distractors."""
    perplexity: float
    """Effective number of codebook entries in use, all groups together."""
    masked_share: float
    distinct_negatives: float
    """Mean number of different frames among a frame's distractors."""
    gradient_norm: float
    learning_rate: float
    temperature: float
    applied: bool
    """False when the gradient was not finite and the update was left out."""
    crops: int
    seconds: float
    """Seconds of audio in the update."""

    def metrics(self) -> dict[str, float]:
        """All fields as numbers."""
        return {key: float(value) for key, value in dataclasses.asdict(self).items()}


class BatchSums(NamedTuple):
    """Sums over one batch, without a graph."""

    contrastive: float
    penalty: float
    correct: int
    masked: int
    probabilities: Tensor


class Weights(NamedTuple):
    """How the parts of the loss are weighed at an update, and the Gumbel temperature then."""

    diversity: float
    penalty: float
    temperature: float


def combine(parts: LossParts, weights: Weights, masked: int) -> Tensor:
    """The loss of a whole batch, summed over its masked frames (fairseq's weighting)."""
    diversity = diversity_loss(parts.probabilities / masked) * masked
    return parts.contrastive + weights.diversity * diversity + weights.penalty * parts.penalty


class TrainingStep:
    """Takes updates of a model by a plan; the one step of every way to train here."""

    def __init__(
        self, model: PretrainingModel, recipe: Recipe, plan: Plan, *, seed: int, total_updates: int
    ) -> None:
        """Prepare the optimiser; `total_updates` is the length of the learning-rate schedule."""
        recipe.validate()
        plan.validate(model.config, recipe)
        self.model, self.recipe, self.plan = model, recipe, plan
        self.seed, self.total_updates = seed, total_updates
        self.device = torch.device(plan.device)
        model.to(self.device).train()
        self.reset()

    def reset(self) -> None:
        """Forget the optimiser's moments, as a client does between rounds."""
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.recipe.learning_rate,
            betas=(self.recipe.beta1, self.recipe.beta2),
            eps=self.recipe.epsilon,
            weight_decay=self.recipe.weight_decay,
            fused=True,
        )

    def moments(self) -> dict[str, Tensor]:
        """The optimiser's state by `kind/parameter name`, for a checkpoint."""
        return {
            f"{kind}/{name}": value
            for name, parameter in self.model.named_parameters()
            for kind, value in self.optimizer.state.get(parameter, {}).items()
        }

    def load_moments(self, moments: dict[str, Tensor]) -> None:
        """Bring back what `moments` gave."""
        for name, parameter in self.model.named_parameters():
            for kind in ("step", "exp_avg", "exp_avg_sq"):
                if f"{kind}/{name}" in moments:
                    value = moments[f"{kind}/{name}"].clone()
                    self.optimizer.state[parameter][kind] = value.to(self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.plan.precision == "bf16"
        )

    def _features(self, waveforms: Tensor) -> Tensor:
        features = self.model.features(waveforms)
        scaled: Tensor = _ScaleGradient.apply(features, self.recipe.feature_grad_scale)
        return scaled

    def accumulate(
        self, waveforms: Tensor, draws: Draws, weights: Weights, divisor: int, key: int = 0
    ) -> BatchSums:
        """Add the gradient of one batch's loss, divided by `divisor`, to the parameters' gradients.

        Args:
            waveforms: `[batch, sample]`.
            draws: chance for this batch.
            weights: of the loss parts, and the Gumbel temperature.
            divisor: masked frames of the whole update.
            key: number that, with the seed, seeds dropout.
        """
        if self.plan.chunk < len(waveforms):
            return self._accumulate_in_two_stages(waveforms, draws, weights, divisor, key)
        with randomness.torch_seed(self.device, self.seed, "dropout", key, 0):
            with self._autocast():
                features = self._features(waveforms)
                parts = self.model.loss_parts(features, draws, weights.temperature)
            masked = draws.masked.numel()
            (combine(parts, weights, masked) / divisor).backward()
        return _sums([parts], masked)

    def _accumulate_in_two_stages(
        self, waveforms: Tensor, draws: Draws, weights: Weights, divisor: int, key: int
    ) -> BatchSums:
        chunk, masked = self.plan.chunk, draws.masked.numel()
        pieces = [
            (waveforms[first : first + chunk], draws.rows(first, first + chunk))
            for first in range(0, len(waveforms), chunk)
        ]
        kept, probabilities = [], None
        with torch.no_grad(), self._autocast():
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
            with randomness.torch_seed(self.device, self.seed, "dropout", key, number):
                with self._autocast():
                    parts = self.model.loss_parts(leaf, chance, weights.temperature)
                loss = (
                    parts.contrastive
                    + weights.diversity * (slope * parts.probabilities).sum()
                    + weights.penalty * parts.penalty
                )
                (loss / divisor).backward()
            done.append(LossParts(*(part.detach() for part in parts)))
            with self._autocast():
                features = self._features(rows)
            features.backward(leaf.grad)
            del leaf, features
        return _sums(done, masked)

    def update(self, batches: Iterable[Waveforms], update: int, key: int = 0) -> StepReport:
        """Take one update.

        Args:
            batches: `accumulation` batches, each `[batch, sample]`.
            update: global update number, from 0.
            key: tells apart those who take the same update, such as clients.

        Returns:
            What happened; when the gradient is not finite the weights stay as they were.
        """
        config, plan = self.model.config, self.plan
        rate = schedule.learning_rate(self.recipe, update, self.total_updates)
        weights = Weights(
            schedule.diversity_weight(config, self.recipe, update, self.total_updates),
            self.recipe.feature_penalty_weight,
            schedule.gumbel_temperature(self.recipe, update),
        )
        sums: list[BatchSums] = []
        distinct = 0.0
        divisor, frames, crops = 1, 0, 0
        self.optimizer.zero_grad(set_to_none=True)
        for number, batch in enumerate(batches):
            rng = randomness.generator(self.seed, "draws", key, update, number)
            chance = draw(config, len(batch), batch.shape[1], rng, pool=self.recipe.negative_pool)
            distinct += float((chance.multiplicity > 0).sum(-1).float().mean()) * len(batch)
            crops += len(batch)
            frames += len(batch) * config.frames(batch.shape[1])
            divisor = chance.masked.numel() * plan.accumulation
            seed = randomness.generator(self.seed, "seed", key, update, number).integers(2**31)
            waveforms = torch.from_numpy(batch).to(self.device)
            chance = chance.to(self.device)
            sums.append(self.accumulate(waveforms, chance, weights, divisor, int(seed)))
        masked = sum(part.masked for part in sums)
        if masked != divisor:
            factor = divisor / masked
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        norm = self._gradient_norm()
        applied = math.isfinite(norm)
        if applied:
            clip = self.recipe.clip_norm
            if clip and norm > clip:
                for parameter in self.model.parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(clip / norm)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        probabilities = [part.probabilities / part.masked for part in sums]
        contrastive = sum(part.contrastive for part in sums) / masked
        diversity = float(np.mean([float(diversity_loss(p)) for p in probabilities]))
        penalty = sum(part.penalty for part in sums) / masked
        return StepReport(
            update=update,
            loss=contrastive + weights.diversity * diversity + weights.penalty * penalty,
            contrastive=contrastive,
            diversity=diversity,
            penalty=penalty,
            accuracy=sum(part.correct for part in sums) / masked,
            perplexity=float(np.mean([float(perplexity(p)) for p in probabilities])),
            masked_share=masked / frames,
            distinct_negatives=distinct / crops,
            gradient_norm=norm,
            learning_rate=rate,
            temperature=weights.temperature,
            applied=applied,
            crops=crops,
            seconds=crops * plan.length,
        )

    def _gradient_norm(self) -> float:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))


def _sums(parts: list[LossParts], masked: int) -> BatchSums:
    return BatchSums(
        contrastive=float(sum(part.contrastive.detach() for part in parts)),
        penalty=float(sum(part.penalty.detach() for part in parts)),
        correct=int(sum(part.correct for part in parts)),
        masked=masked,
        probabilities=torch.stack([part.probabilities.detach() for part in parts]).sum(0).cpu(),
    )
