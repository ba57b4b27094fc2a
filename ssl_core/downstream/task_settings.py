"""Settings of fine-tuning a task, central or federated."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from common.errors import UsageError
from common.options import underscored
from common.settings import read_yaml, to_yaml
from ssl_core.downstream.task_recipe import FOLDER, TaskRecipe, recipe_of
from ssl_core.planning.step_plan import Plan
from ssl_core.training.compute_settings import ComputeSettings
from ssl_core.training.stored_settings import stored_settings

_UNNAMED = TaskRecipe(**underscored(read_yaml(FOLDER / "kws12.yaml")))
"""Placeholder until the task is known; `recipe_of` would check it, a second on a board."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSettings(ComputeSettings):
    """Task, corpus, recipe and hardware."""

    task: str = ""
    """`kws12`, `kws35`, `slots`, `emotion`, `speaker`, `verification` or `asr`."""
    data: Path | None = None
    """Folder of the task's corpus, as distributed."""
    recipe: TaskRecipe = _UNNAMED
    """Also a YAML file; default: the recipe of the task."""

    SHORT: ClassVar[dict[str, str]] = {"batch": "recipe.batch"}

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of the resumed run, else the recipe of the task.

        Raises:
            UsageError: no such run, or no such task (the message names the nearest).
        """
        if given.get("resume"):
            return vars(stored_settings(cls, Path(given["resume"])))
        if not given.get("task"):
            raise UsageError("--task: say which, such as --task kws12")
        return {"recipe": recipe_of(str(given["task"]))}

    def validate(self) -> None:
        """Check values and that they fit together.

        Raises:
            UsageError: what is wrong.
        """
        if not self.task:
            raise UsageError("--task: say which, such as --task kws12")
        self.require_at_least(0, "seed")
        recipe, own = self.recipe, recipe_of(self.task)
        recipe.validate()
        if recipe.transcribes != own.transcribes:
            made = "transcribes" if recipe.transcribes else "classifies"
            needed = "transcribe" if own.transcribes else "classify"
            raise UsageError(f"the head {recipe.head} {made}; {self.task} needs one to {needed}")
        if self.task == "verification" and recipe.head != "x-vector":
            raise UsageError(f"verification needs the head x-vector, not {recipe.head}")
        if self.task != "verification" and recipe.metric == "eer":
            raise UsageError(f"{self.task} cannot be scored by eer: it has no trials")
        self.step_plan(to_check=True)

    def step_plan(self, to_check: bool = False) -> Plan:
        """How this machine takes a step; `to_check` as in `plan_for`.

        Raises:
            UsageError: invalid settings, or settings that this machine cannot run.
        """
        plan = self.plan_for(length=self.recipe.length, batch=self.recipe.batch, to_check=to_check)
        plan.validate()
        plan.validate_clipping(self.recipe.clip_norm)
        return plan

    def corpus(self) -> Path:
        """Folder of the corpus; raises `UsageError` if none was given."""
        if self.data is None:
            raise UsageError(f"--data: give the corpus of {self.task}")
        return self.data

    def as_config(self) -> str:
        """Contents of a run's `config.yaml`."""
        return to_yaml(self)
