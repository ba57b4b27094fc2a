"""Learning rates of fine-tuning by epoch."""

from collections.abc import Mapping
from typing import Any

from ssl_core.downstream.task_recipe import TaskRecipe
from ssl_core.downstream.task_step import BACKBONE, HEAD


class Rates:
    """Learning rates of head and backbone, on the schedule of a recipe."""

    def __init__(self, recipe: TaskRecipe) -> None:
        """Start from the rates of the recipe."""
        self.recipe = recipe
        self.factors = {HEAD: 1.0, BACKBONE: 1.0}
        self.last: float | None = None

    def at(self, epoch: int) -> dict[str, float]:
        """Learning rates by parameter group in an epoch, counted from 0."""
        recipe = self.recipe
        first = {HEAD: recipe.head_rate, BACKBONE: recipe.backbone_rate}
        if recipe.schedule == "newbob":
            return {group: rate * self.factors[group] for group, rate in first.items()}
        part = epoch / max(1, recipe.epochs - 1)
        factor = 1 + part * (recipe.final_rate / recipe.head_rate - 1)
        return {group: rate * factor for group, rate in first.items()}

    def after(self, error: float) -> None:
        """Record the validation error of an epoch; newbob compares it with the previous one."""
        recipe, before = self.recipe, self.last
        self.last = error
        if before is None:
            return
        gain = (before - error) / before if before else 0.0
        if gain < recipe.improvement:
            self.factors[HEAD] *= recipe.anneal
            self.factors[BACKBONE] *= recipe.backbone_anneal

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"factors": self.factors, "last": self.last}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.factors, self.last = dict(state["factors"]), state["last"]
