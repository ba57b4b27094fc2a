"""Which model and recipe a run uses: a preset with single settings changed."""

import dataclasses
import shlex
from typing import Any

import yaml

from partitions.command import nearest
from partitions.errors import UsageError
from partitions.settings import from_mapping
from ssl_core.wav2vec2.config import RECIPES, ModelConfig, Recipe, preset

_SECTIONS = {"model": ModelConfig, "recipe": Recipe}


def resolve(model: str, assignments: str) -> tuple[ModelConfig, Recipe]:
    """The architecture and recipe of a run.

    Args:
        model: a preset's name.
        assignments: `section.name=value` separated by spaces; sections are `model` and `recipe`,
            names are fields of `ModelConfig` and `Recipe`.

    Raises:
        UsageError: an unknown preset, section or name (the nearest is named), or a bad value.
    """
    config = preset(model)
    changed: dict[str, dict[str, Any]] = {"model": {}, "recipe": {}}
    for word in shlex.split(assignments):
        name, equals, text = word.partition("=")
        section, _, field = name.partition(".")
        if not equals or section not in _SECTIONS:
            known = [
                f"{s}.{f.name.replace('_', '-')}"
                for s, kind in _SECTIONS.items()
                for f in dataclasses.fields(kind)
            ]
            hint = nearest(name, known) or "; write recipe.NAME=VALUE or model.NAME=VALUE"
            raise UsageError(f"--set {word}: not a setting{hint}")
        changed[section][field] = _value(text)
    architecture = dataclasses.asdict(config) | {
        key.replace("-", "_"): value for key, value in changed["model"].items()
    }
    recipe = dataclasses.asdict(RECIPES[model]) | {
        key.replace("-", "_"): value for key, value in changed["recipe"].items()
    }
    return (
        from_mapping(ModelConfig, architecture, "--set model"),
        from_mapping(Recipe, recipe, "--set recipe"),
    )


def _value(text: str) -> Any:
    """A YAML scalar; `5e-4`, which YAML takes for a word, is a number too."""
    try:
        return float(text) if "e" in text.lower() else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text
