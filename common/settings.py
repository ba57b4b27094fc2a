"""Settings as frozen dataclasses, from a command line, YAML or a mapping.

A settings class documents each field in a docstring below it, which `--help` shows. It may have

- `defaults(given)`, a class method: defaults that depend on what was given, such as a preset's;
- `validate()`, which raises `UsageError` where values do not fit together;
- `SHORT`, names of nested settings that need no prefix: `{"batch": "recipe.batch"}`.
"""

import argparse
import dataclasses
import functools
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse.typing import PositiveInt

from common.errors import UsageError
from common.options import Parser, dashed, short_names, types_by_name, underscored
from common.units import Names, Seconds, Size

Settings = TypeVar("Settings")


def parse(
    kind: type[Settings], parser: Parser, arguments: Sequence[str] | None
) -> tuple[Settings, dict[str, Any]]:
    """Read settings from a command line, before that `--config`, before that the defaults.

    Args:
        kind: dataclass of the settings.
        parser: from `settings_parser`, with further options if wanted.
        arguments: words of the command line; None takes the process's own.

    Returns:
        The settings, validated, and those of the further options that were given, by name.

    Raises:
        UsageError: a bad file, or values that do not fit together.
    """
    given = parser.parse_args(arguments, defaults=False).as_dict()
    config, shown = given.pop("config", None), given.pop("print_config", False)
    names = {field.name for field in _fields(kind)}
    others = {name: given.pop(name) for name in given.keys() - names}
    if config is not None:
        listed = _checked(kind, read_yaml(config), str(config))
        given = _nested([*_flat(listed), *_flat(given)])
    settings = _complete(kind, given)
    if shown:
        print(to_yaml(settings), end="")
        raise SystemExit(0)
    return settings, others


def from_mapping(kind: type[Settings], values: Mapping[str, Any], where: str) -> Settings:
    """Build settings from a mapping such as YAML's; keys may be written with `-` or `_`.

    Args:
        kind: dataclass of the settings.
        values: by name, nested ones as mappings.
        where: source of the values, for errors.

    Raises:
        UsageError: an unknown name (the nearest is named), a value of the wrong type, or values
            that do not fit together.
    """
    given = _checked(kind, values, where)
    try:
        return _complete(kind, given)
    except argparse.ArgumentError as error:
        raise UsageError(
            f"{where}: {_silent_parser(typing.cast(Any, kind)).explain(error.message)}"
        ) from None
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _checked(kind: Any, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of a mapping, of the right types and by their full names."""
    parser, given = _silent_parser(kind), underscored(dict(values))
    for field in _fields(kind):
        nested = dataclasses.is_dataclass(field.default)
        if nested and not isinstance(given.get(field.name, {}), dict):
            raise UsageError(f"{where}: {field.name} must be a mapping of settings")
    for name in short_names(kind).keys() & given.keys():
        section, _, inner = short_names(kind)[name].partition(".")
        given[section] = {inner: given.pop(name)} | given.get(section, {})
    try:
        found: dict[str, Any] = parser.parse_object(given, defaults=False).as_dict()
    except argparse.ArgumentError as error:
        raise UsageError(f"{where}: {parser.explain(error.message)}") from None
    return found


def _complete(kind: type[Settings], given: Mapping[str, Any]) -> Settings:
    """Settings from the values given, and defaults that depend on them."""
    parser, find = _silent_parser(typing.cast(Any, kind)), getattr(kind, "defaults", None)
    defaults = find(given) if find is not None else {}
    merged = _nested([*_flat(defaults), *_flat(given)])
    values = parser.instantiate(parser.parse_object(merged))
    settings = kind(**{field.name: getattr(values, field.name) for field in _fields(kind)})
    found, hints = dict(_flat(vars(settings))), dict(types_by_name(kind))
    for name, value in found.items():
        if value is None and type(None) not in typing.get_args(hints[name]):
            raise UsageError(f"{dashed(name)}: a value is missing")
    validate = getattr(settings, "validate", None)
    if validate is not None:
        validate()
    return settings


@functools.cache
def _silent_parser(kind: Any) -> Parser:
    """A parser that raises rather than exits."""
    return Parser(kind, exit_on_error=False)


def _fields(kind: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted name; of nested settings each of their own."""
    for name, value in values.items():
        nested = vars(value) if dataclasses.is_dataclass(value) else value
        if isinstance(nested, dict):
            yield from _flat(nested, f"{prefix}{name}.")
        elif name != "__path__":  # where jsonargparse read a file
            yield prefix + name, value


def _nested(values: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The nested mapping of values by dotted name, of which later ones win."""
    result: dict[str, Any] = {}
    for name, value in values:
        *sections, last = name.split(".")
        functools.reduce(lambda place, each: place.setdefault(each, {}), sections, result)[last] = (
            value
        )
    return result


def flat(settings: Any) -> dict[str, str | int | float | bool]:
    """Settings as scalars by dotted name with dashes, as Flower's run config holds them.

    A tuple is a text of its values, None an empty text.
    """
    found = ((dashed(name), _plain(value)) for name, value in _flat(vars(settings)))
    return {
        name: "" if value is None else str(value) if isinstance(value, list) else value
        for name, value in found
    }


def _plain(value: Any) -> Any:
    """A value as YAML and JSON know it."""
    if isinstance(value, Seconds | Size | Names | Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return int(value) if isinstance(value, PositiveInt) else value


def unflat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The nested mapping of `flat`'s scalars; an empty text is a setting that was not given."""
    return _nested((name, value) for name, value in values.items() if value != "")


def to_yaml(settings: Any) -> str:
    """The YAML of settings, names as on the command line."""
    values = ((dashed(name), _plain(value)) for name, value in _flat(vars(settings)))
    return yaml.safe_dump(_nested(values), sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UsageError: missing, not YAML, or not a mapping at the top level.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded or {}, dict):
        kind = type(loaded).__name__
        raise UsageError(f"{path}: settings must be 'name: value' lines, not a {kind}")
    return loaded or {}
