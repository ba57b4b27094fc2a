"""Settings that central pretraining, a device and a simulation have in common."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.settings import to_yaml
from common.units import Names, Seconds
from ssl_core.planning.step_plan import Plan
from ssl_core.training.compute_settings import ComputeSettings
from ssl_core.training.pretraining_recipe import RECIPES, Recipe
from ssl_core.training.run_directory import stored_settings
from ssl_core.wav2vec2.config import ModelConfig, preset


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainingSettings(ComputeSettings):
    """What to pretrain on, and how."""

    data: Path | None = None
    """Corpus in LibriSpeech's layout; without it the built-in demo corpus."""
    subset: Names = Names()
    """Subsets of the corpus, separated by commas; none is all `train-*`."""
    length: Seconds = Seconds(5.0)
    """Length of every crop."""
    model: str = "base"
    """Preset of architecture and recipe: `base` or `tiny`."""
    checkpoint: Path | None = None
    """Directory of weights to start from, this project's or transformers'; else fresh ones."""
    batch: int = 4
    """Crops in a batch, over which one loss is taken."""
    accumulation: int = 1
    """Batches in an update: batch x accumulation x length is the effective batch."""
    held_out: float = 0.05
    """Fraction of the speakers kept for evaluation."""
    eval_crops: int = 32
    """Held-out crops to evaluate on; 0 does not evaluate."""
    keep: int = 2
    """Checkpoints to keep."""
    output: Path | None = None
    """Run directory; without it one is made under `runs/`."""
    resume: Path | None = None
    """Run directory to go on with (its own settings are used)."""
    architecture: ModelConfig = ModelConfig()
    """Architecture; the preset's unless given."""
    recipe: Recipe = Recipe()
    """Recipe; the preset's unless given."""

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """A resumed run's settings, else architecture and recipe of the preset.

        Raises:
            UsageError: no such run or preset.
        """
        if given.get("resume"):
            return vars(stored_settings(cls, Path(given["resume"])))
        name = str(given.get("model", cls.model))
        return {"architecture": preset(name), "recipe": RECIPES[name]}

    def validate(self) -> None:
        """Check values and that they fit together.

        Raises:
            UsageError: what is wrong.
        """
        self.require_at_least(1, "keep")
        self.require_at_least(0, "eval_crops", "seed")
        self.architecture.validate()
        self.recipe.validate()
        self.step_plan()

    def step_plan(self) -> Plan:
        """How this machine takes a step.

        Raises:
            UsageError: settings that do not fit together or this machine.
        """
        plan = self.plan_for(length=self.length, batch=self.batch, accumulation=self.accumulation)
        self.recipe.validate_plan(self.architecture, plan)
        return plan

    def as_config(self) -> str:
        """A run's `config.yaml`; says which settings of the plan are not exact."""
        inexact = self.step_plan().inexact
        note = f"# not exact: {', '.join(inexact)}\n" if inexact else ""
        return note + to_yaml(self)
