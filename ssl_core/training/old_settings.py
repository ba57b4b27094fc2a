"""Settings of runs made before version 0.2, in which `set` and `recipe` were texts."""

import shlex
from collections.abc import Mapping
from typing import Any

_RENAMED = {"keep_moments": "keep_optimizer_state"}
_SECTIONS = {"model": "architecture"}
_TEXTS = ("train", "valid", "test")
"""Names of subsets, where an empty text means none rather than the default."""


def upgraded(values: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """The settings as this version names them; those of this version stay as they are.

    Args:
        values: of a run's `config.yaml`.
        known: names of the settings that there are now.
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
