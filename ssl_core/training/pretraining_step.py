"""The pretraining step: crops, a plan and the global update number in, named loss parts out.

An update takes `accumulation` batches. The loss is divided once by all masked frames of the update.
A batch that does not fit in memory is computed in two stages: first the features and code
probabilities of all crops without a graph; then, for each micro-batch, the context network's
gradient down to the features, and the extractor's gradient with the features recomputed. The
diversity loss needs the mean code probabilities of the whole batch, which the first stage gives, so
the gradient is that of the whole batch, to rounding.
"""

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor

from ssl_core.planning.step_plan import Plan
from ssl_core.training import randomness, schedule
from ssl_core.training.adamw import AdamW
from ssl_core.training.applied_in_backward import AppliedInBackward
from ssl_core.training.gradient_functions import continue_backward, scale_gradient
from ssl_core.training.planned_step import PlannedStep
from ssl_core.training.pretraining_loss import Weights, combine
from ssl_core.training.pretraining_recipe import Recipe
from ssl_core.training.step_inputs import BatchInputs, Controls, Stage, Waveforms, with_last
from ssl_core.training.step_report import TOTALS, Counts, StepReport, totals
from ssl_core.training.step_runner import Taken, make_runner
from ssl_core.wav2vec2.chance import Chance, Draws, complete, draw_chance
from ssl_core.wav2vec2.cuda.launching import addresses
from ssl_core.wav2vec2.model import LossParts, PretrainingModel
from ssl_core.wav2vec2.precision import autocast
from ssl_core.wav2vec2.quantizer import diversity_loss
from ssl_core.wav2vec2.recompute import recomputed


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
        super().__init__(model, model.wav2vec2, plan, products=model)

    def reset(self) -> None:
        """Start with new optimizer state, as a client does between rounds."""
        super().reset()
        self._totals = torch.zeros(len(TOTALS), dtype=torch.float64, device=self.device)
        self._places: list[int] = []
        self._renew_runner()

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """See `PlannedStep.load_optimizer_state`; tensors `[...]`."""
        super().load_optimizer_state(state)
        self._renew_runner()

    def change_plan(self, plan: Plan) -> None:
        """See `PlannedStep.change_plan`."""
        super().change_plan(plan)
        self._renew_runner()

    def _renew_runner(self) -> None:
        """Forget all graphs."""
        # torch adds the gradients of several batches up wherever the first one's happen to be.
        graph = self.plan.graph and (self.fused or self.plan.accumulation == 1)
        self._runner = make_runner(self.compute, self.device, self.resident, graph, self._begin)

    def _begin(self, capture: bool) -> None:
        for optimizer in self.optimizers.values():
            (optimizer.begin_capture if capture else optimizer.begin_launches)()

    def validate(self, plan: Plan) -> None:
        """Check a plan against model and recipe; raises `UsageError`."""
        self.recipe.validate_plan(self.model.config, plan)

    def make_optimizers(self) -> dict[str, AdamW]:
        """Create one optimizer for all parameters."""
        return {"model": self.optimizer_of(self.model.named_parameters(), self.recipe)}

    def _features(self, waveforms: Tensor, recompute: bool) -> Tensor:
        if recompute:
            features = recomputed(self.model.features, waveforms)
        else:
            features = self.model.features(waveforms)
        return scale_gradient(features, self.recipe.feature_grad_scale)

    def accumulate(
        self,
        waveforms: Tensor,
        draws: Draws,
        weights: Weights,
        divisor: float | Tensor,
        ends: tuple[bool, bool] = (True, True),
    ) -> list[LossParts]:
        """Add the gradient of one batch's loss, divided by `divisor`, to the parameters' gradients.

        Args:
            waveforms: `[batch, sample]`.
            draws: random draws of this batch.
            weights: of the loss parts, and the Gumbel temperature.
            divisor: masked frames of the whole update.
            ends: whether this is the update's first batch, and whether it is the last.

        Returns:
            The parts of each micro-batch's loss, detached.
        """
        if self.plan.effective_micro_batch < len(waveforms):
            return self._accumulate_in_two_stages(waveforms, draws, weights, divisor, ends)
        with autocast(self.device, self.plan.precision):
            features = self._features(waveforms, self.plan.recompute_features)
            parts = self.model.loss_parts(features, draws, weights.temperature)
        masked = draws.masked.numel()
        (combine(parts, weights, masked) / divisor).backward()
        self._collect(*ends)
        return [LossParts(*(part.detach() for part in parts))]

    def _accumulate_in_two_stages(
        self,
        waveforms: Tensor,
        draws: Draws,
        weights: Weights,
        divisor: float | Tensor,
        ends: tuple[bool, bool],
    ) -> list[LossParts]:
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
            self._collect(ends[0] and number == 0, ends[1] and number == len(pieces) - 1)
        return done

    def take(self, batches: Iterable[Waveforms], update: int, key: int = 0) -> Taken:
        """Take one update; on a GPU, without waiting for it.

        Args:
            batches: `accumulation` batches, each `[batch, sample]`.
            update: global update number, from 0.
            key: distinguishes clients that take the same update.

        Returns:
            The update, from which the report is read when it is wanted; if the gradient is not
            finite the update is skipped.
        """
        config, recipe = self.model.config, self.recipe
        rate = schedule.learning_rate(recipe, update, self.total_updates)
        diversity = schedule.diversity_weight(config, recipe, update, self.total_updates)
        temperature = schedule.gumbel_temperature(recipe, update)
        controls = Controls(rate, diversity, temperature, self.loss_scale_growth(update))
        self._prepare()
        number, masked, frames, crops = 0, 0, 0, 0
        for batch, last in with_last(batches):
            rng = randomness.generator(self.seed, "draws", key, update, number)
            chance = draw_chance(config, len(batch), batch.shape[1], rng)
            masked += chance.masked.numel()
            frames += len(batch) * config.frames(batch.shape[1])
            crops += len(batch)
            self._runner.run(
                BatchInputs(torch.from_numpy(batch), chance.masked, chance.seeds, controls),
                Stage(number == 0, last, masked if last else 0, chance.layer_keep),
            )
            number += 1
        counts = Counts(
            update=update,
            batches=number,
            crops=crops,
            masked=masked,
            frames=frames,
            seconds=crops * self.plan.length,
            rate=rate,
            diversity=diversity,
            penalty=recipe.feature_penalty_weight,
            entropy=recipe.code_entropy_weight,
            temperature=temperature,
        )
        return Taken(counts, self._runner.totals())

    def update(self, batches: Iterable[Waveforms], update: int, key: int = 0) -> StepReport:
        """Take one update and wait for its report; arguments as of `take`."""
        return self.take(batches, update, key).report()

    def _prepare(self) -> None:
        """See to what graphs take for granted: weights stay where they are, copies are of them."""
        if self.halves is not None:
            self.halves.refresh()
        if self.device.type == "cuda":
            places = addresses(*self.model.parameters())
            if places != self._places:
                self._places = places
                self._renew_runner()

    def compute(self, inputs: BatchInputs, stage: Stage) -> Tensor:
        """Compute one batch, and after the last one the update.

        Args:
            inputs: on the step's device.
            stage: the place of the batch in the update.

        Returns:
            The update's totals up to here, `[10]` fp64 on the device, see `step_report.TOTALS`.
        """
        plan, recipe, controls = self.plan, self.recipe, inputs.controls
        weights = Weights(
            controls.diversity,
            recipe.feature_penalty_weight,
            controls.temperature,
            recipe.code_entropy_weight,
        )
        if stage.first:
            self._drop_gradients()
            self._totals.zero_()
        chance = Chance(inputs.masked, inputs.seeds, stage.keep)
        draws = complete(self.model.config, chance, pool=recipe.negative_pool)
        divisor = draws.masked.numel() * plan.accumulation
        scale = self.loss_scale
        in_backward = None
        if plan.apply_in_backward and not self.resident:
            in_backward = AppliedInBackward(
                self.optimizers, {"model": float(controls.rate)}, 1 / float(scale)
            )
        with in_backward or contextlib.nullcontext(), self._settling(), self.computing():
            parts = self.accumulate(inputs.waveforms, draws, weights, divisor / scale, stage.ends)
        self._totals[:7] += totals(parts, draws)
        del parts, draws
        if stage.last:
            self._totals[9] = scale
            norm: float | Tensor
            applied: bool | Tensor
            if in_backward is not None:
                norm, applied = in_backward.norm, in_backward.finite
            else:
                factor = divisor / stage.masked / scale
                norm, applied = self._apply({"model": controls.rate}, factor, recipe.clip_norm)
            if plan.precision == "fp16":
                self._adapt_loss_scale(controls.growth, applied)
            self._totals[7], self._totals[8] = norm, applied
            self._drop_gradients()
        return self._totals
