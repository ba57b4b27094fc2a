"""Settings of the model to pretrain."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ssl_core.training.pretraining_recipe import RECIPES, Recipe
from ssl_core.wav2vec2.config import ModelConfig, preset


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Architecture and recipe."""

    model: str = "base"
    """Preset of architecture and recipe: `base` or `tiny`."""
    architecture: ModelConfig = ModelConfig()
    """Architecture; by default the preset's."""
    recipe: Recipe = Recipe()
    """Pretraining recipe; by default the preset's."""

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Architecture and recipe of the preset; raises `UsageError` for an unknown one."""
        name = str(given.get("model", cls.model))
        return {"architecture": preset(name), "recipe": RECIPES[name]}

    def differences(self) -> list[str]:
        """Fields of the architecture that differ from the preset: `name value (the preset's)`."""
        own, usual = vars(self.architecture), vars(preset(self.model))
        return [f"{name} {own[name]} ({usual[name]})" for name in own if own[name] != usual[name]]
