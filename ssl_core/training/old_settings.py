"""Converts settings of runs made before version 0.2, where `set` and `recipe` were texts."""

import shlex
from collections.abc import Mapping
from typing import Any

_RENAMED = {"keep_moments": "keep_optimizer_state"}
_SECTIONS = {"model": "architecture"}
_TEXTS = ("train", "valid", "test")
"""Settings of subsets, where an empty text means no subset rather than the default."""
_OF_RECIPE = ("batch", "epochs")
"""Settings of a task that override those of its recipe; 0 means the recipe's."""


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
    recipe = named.pop("recipe", None)
    if "rounds" in named and named.get("task"):  # `recipe` alone counted, a round was an epoch
        words = shlex.split(str(recipe or ""))
        assigned = [word for word in words if not word.startswith("epochs=")]
    result: dict[str, Any] = {}
    for name, value in named.items():
        unset = value == 0 if name in _OF_RECIPE else value == "" and name not in _TEXTS
        name = _RENAMED.get(name, name)
        if name in known and not unset:
            result[name] = value
    for word in assigned:
        name, _, text = word.partition("=")
        section, _, field = name.replace("-", "_").rpartition(".")
        section = _SECTIONS.get(section, section or "recipe")
        if section != "recipe" or field not in result.keys() & _OF_RECIPE:
            result.setdefault(section, {})[field] = text
    return result
