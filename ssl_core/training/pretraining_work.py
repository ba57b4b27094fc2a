"""Pretraining as `Work` for the planner."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from common.units import format_length
from ssl_core.planning.ladder import (
    RECOMPUTED_ATTENTION,
    SPLIT,
    gpu_rungs,
    splits,
    with_layers_recomputed,
    with_memory_given_back,
)
from ssl_core.planning.shape_tensors import count_parameters
from ssl_core.planning.step_plan import Plan, StepOptions
from ssl_core.planning.work import Batches, Rung, Started
from ssl_core.training.pretraining_recipe import Recipe
from ssl_core.training.pretraining_step import PretrainingStep
from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.model import PretrainingModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainingWork:
    """An architecture and its pretraining recipe; see `planning.work.Work`."""

    architecture: ModelConfig
    recipe: Recipe

    unit = "crops"
    convolves = True
    recurs = False
    graphed = True

    @property
    def clip_norm(self) -> float:
        """Largest gradient norm; 0 does not clip."""
        return self.recipe.clip_norm

    def validate(self, plan: Plan) -> None:
        """Check a plan; raises `UsageError`."""
        self.recipe.validate_plan(self.architecture, plan)

    def rungs(self, whole: Plan) -> list[Rung]:
        """See `Work.rungs`."""
        splits_exist = self.recipe.negative_pool == "utterance"
        if whole.on_gpu:
            return gpu_rungs(whole, features=True, layers=True, split=splits_exist, graph=True)
        first = [
            Rung(1.0, dataclasses.replace(whole, keep_attention=True)),
            Rung(RECOMPUTED_ATTENTION, whole),
        ]
        again = dataclasses.replace(whole, recompute_features=True)
        small = [Rung(RECOMPUTED_ATTENTION * SPLIT, again)]
        if splits_exist:
            small += [Rung(RECOMPUTED_ATTENTION * SPLIT, split) for split in splits(whole)]
        # A whole batch needs no memory for gradients, a split one less for activations.
        ends = [small[0], small[-1]][: len(small)]
        rungs = first + small + with_layers_recomputed(ends)
        return rungs + with_memory_given_back(rungs[-len(ends) :])

    def trained_parameters(self) -> int:
        """Number of parameters of the model, all of which a federation exchanges."""
        return _parameters(self.architecture)

    def options(self, plan: Plan) -> str:
        """Options of `ssl_core.train` and `simulation/run.py` that select a plan."""
        words = [
            f"--length {format_length(plan.length)} --batch {plan.batch}",
            f"--precision {plan.precision}",
            *step_options(plan),
        ]
        return " ".join(words)

    def start(
        self,
        plan: Plan,
        *,
        label: Callable[[str], None] = lambda _: None,
        fake: bool = False,
        batches: Batches | None = None,
    ) -> Started:
        """Build the model and its step; see `Work.start`.

        Args:
            plan: how a step is taken.
            label: called with the name of the part that is built next.
            fake: tensors have no data; batches are then zeros.
            batches: speech, `[batch, sample]` each; None for noise.
        """
        model = PretrainingModel(self.architecture)
        label("optimizer state")
        step = PretrainingStep(model, self.recipe, plan, seed=0, total_updates=100)
        label("activations")
        read = batches or (_zeros(plan) if fake else _noise(plan))
        return Started(model, lambda number: step.update(read(number), number).applied, step.copies)


def step_options(plan: Plan) -> list[str]:
    """Options for all settings in which a plan's step differs from the default."""
    default = Plan()
    words = [f"--micro-batch {plan.effective_micro_batch}"] if plan.is_split else []
    for field in dataclasses.fields(StepOptions):
        value = getattr(plan, field.name)
        if value != getattr(default, field.name):
            text = str(value).lower() if isinstance(value, bool) else value
            words.append(f"--plan.{field.name.replace('_', '-')} {text}")
    return words


@functools.lru_cache(maxsize=16)
def _parameters(architecture: ModelConfig) -> int:
    return count_parameters(lambda: PretrainingModel(architecture))


def _zeros(plan: Plan) -> Batches:
    batch = np.zeros((plan.batch, plan.samples), dtype=np.float32)
    return lambda _: [batch] * plan.accumulation


def _noise(plan: Plan) -> Batches:
    rng, shape = np.random.default_rng(0), (plan.batch, plan.samples)
    return lambda _: (
        rng.standard_normal(shape, dtype=np.float32) for _ in range(plan.accumulation)
    )
