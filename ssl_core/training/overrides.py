"""Which model, recipe and plan a run uses: a preset with single settings changed."""

import dataclasses
import shlex
from typing import Any

import yaml

from common.command import nearest
from common.errors import UsageError
from common.settings import from_mapping
from ssl_core.planning.step_plan import Plan
from ssl_core.training.pretraining_recipe import RECIPES, Recipe
from ssl_core.wav2vec2.config import ModelConfig, preset

_SECTIONS = {"model": ModelConfig, "recipe": Recipe, "plan": Plan}
_OPTIONS = ("length", "batch", "micro_batch", "accumulation", "precision", "device", "threads")
"""Settings of a plan that have options of their own."""


def resolve(model: str, assignments: str) -> tuple[ModelConfig, Recipe]:
    """The architecture and recipe of a run.

    Args:
        model: a preset's name.
        assignments: `section.name=value` separated by spaces; sections are `model`, `recipe` and
            `plan`, names are fields of `ModelConfig`, `Recipe` and `Plan`.

    Raises:
        UsageError: an unknown preset, section or name (the nearest is named), or a bad value.
    """
    config, changed = preset(model), _changes(assignments)
    return (
        from_mapping(ModelConfig, dataclasses.asdict(config) | changed["model"], "--set model"),
        from_mapping(
            Recipe, dataclasses.asdict(RECIPES[model]) | changed["recipe"], "--set recipe"
        ),
    )


def change_plan(plan: Plan, assignments: str) -> Plan:
    """The plan with what the assignments change of it; see `resolve`."""
    changed = _changes(assignments)["plan"]
    for name in _OPTIONS:
        if name in changed:
            raise UsageError(f"--set plan.{name}: use --{name.replace('_', '-')}")
    return from_mapping(Plan, dataclasses.asdict(plan) | changed, "--set plan")


def _changes(assignments: str) -> dict[str, dict[str, Any]]:
    """Values by section and field name."""
    changed: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
    for word in words_of(assignments):
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
        changed[section][field.replace("-", "_")] = scalar(text)
    return changed


def words_of(assignments: str) -> list[str]:
    """The words of a text, quoted ones whole.

    Raises:
        UsageError: a quotation that does not end.
    """
    try:
        return shlex.split(assignments)
    except ValueError as error:
        raise UsageError(f"--set {assignments}: {error}") from None


def scalar(text: str) -> Any:
    """A YAML scalar; `5e-4`, which YAML takes for a word, is a number too."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
