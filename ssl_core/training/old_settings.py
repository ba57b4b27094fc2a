"""Converts settings of runs made before version 0.2, where `set` and `recipe` were texts."""

import shlex
from collections.abc import Mapping
from typing import Any

_RENAMED = {"keep_moments": "keep_optimizer_state"}
_SECTIONS = {"model": "architecture"}
_TEXTS = ("train", "valid", "test")
"""Settings of subsets, where an empty text means no subset rather than the default."""


def upgraded(values: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """Rename the settings of an older run; settings of this version stay unchanged.

    Args:
        values: contents of a run's `config.yaml`.
        known: names of this version's settings.
    """
    named = {str(name).replace("-", "_"): value for name, value in values.items()}
    if "set" not in named:
        return named
    assigned = shlex.split(str(named.pop("set") or ""))
    if isinstance(named.get("recipe"), str):
        assigned = [f"recipe.{word}" for word in shlex.split(named.pop("recipe"))] + assigned
    result: dict[str, Any] = {}
    for name, value in named.items():
        name = _RENAMED.get(name, name)
        if name in known and (value != "" or name in _TEXTS):
            result[name] = value
    for word in assigned:
        name, _, text = word.partition("=")
        section, _, field = name.rpartition(".")
        section = _SECTIONS.get(section, section or "recipe")
        result.setdefault(section, {})[field.replace("-", "_")] = text
    return result
