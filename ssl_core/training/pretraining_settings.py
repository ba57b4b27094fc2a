"""The settings that central training, a device and a simulation have in common."""

import dataclasses
from typing import Literal

from common.settings import to_yaml
from common.units import parse_length, parse_names
from ssl_core.planning.step_plan import Plan
from ssl_core.training.overrides import change_plan, resolve
from ssl_core.training.pretraining_recipe import Recipe
from ssl_core.training.torch_device import choose_device, choose_precision
from ssl_core.wav2vec2.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What to train on, and how a step is taken. Scalars only, as Flower's run config needs."""

    data: str = ""
    """Corpus in LibriSpeech's layout; empty is the built-in demo corpus."""
    subset: str = ""
    """Subsets of the corpus, separated by commas; empty is all `train-*`."""
    length: str = "5s"
    """Length of every crop."""
    model: str = "base"
    """Preset: `base` or `tiny`."""
    checkpoint: str = ""
    """Directory of weights to start from, this project's or transformers'; empty starts fresh."""
    batch: int = 4
    """Crops in a batch, over which one loss is taken."""
    micro_batch: int = 0
    """Crops in memory at a time; 0 is the whole batch. Does not change the result."""
    accumulation: int = 1
    """Batches in an update: batch x accumulation x length is the effective batch."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """`bf16`, `fp16`: matrix products in 16 bits (not exact); `auto`: bf16 where the device is
    made for it."""
    device: str = "auto"
    """Torch device; `auto` is CUDA where there is one, else the CPU."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    held_out: float = 0.05
    """Share of speakers kept for evaluation."""
    eval_crops: int = 32
    """Held-out crops to evaluate on; 0 does not evaluate."""
    seed: int = 0
    """Seeds everything: weights, cohorts, crops, masks, dropout."""
    keep: int = 2
    """Checkpoints to keep."""
    output: str = ""
    """Run directory; empty makes one under `runs/`."""
    resume: str = ""
    """Run directory to go on with (its own settings are used)."""
    set: str = ""
    """Single settings of recipe, model and plan: `recipe.learning-rate=1e-3 model.layerdrop=0
    plan.recompute-layers=true`."""

    @property
    def seconds(self) -> float:
        """The crop length in seconds."""
        return parse_length(self.length)

    @property
    def subsets(self) -> tuple[str, ...]:
        """The chosen subsets."""
        return parse_names(self.subset)

    def as_config(self) -> str:
        """A run's `config.yaml`; says which settings of the plan are not exact."""
        inexact = self.resolved_plan().inexact
        note = f"# not exact: {', '.join(inexact)}\n" if inexact else ""
        return note + to_yaml(self)

    def model_and_recipe(self) -> tuple[ModelConfig, Recipe]:
        """The architecture and recipe."""
        return resolve(self.model, self.set)

    def resolved_plan(self) -> Plan:
        """How this machine takes a step.

        Raises:
            UsageError: settings that do not fit together or this machine.
        """
        device = choose_device(self.device)
        plan = Plan(
            length=self.seconds,
            batch=self.batch,
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
            precision=choose_precision(self.precision, device),
            device=device,
            threads=self.threads,
        )
        plan = change_plan(plan, self.set)
        config, recipe = self.model_and_recipe()
        plan.validate_for(config, recipe)
        return plan
