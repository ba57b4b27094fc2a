"""Settings as frozen dataclasses, from a mapping, YAML or options; what is unknown is refused."""

import argparse
import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from common.command import nearest
from common.errors import UsageError

Settings = TypeVar("Settings")


def from_mapping(kind: type[Settings], values: Mapping[str, Any], where: str) -> Settings:
    """Build a settings dataclass; `where` names the source of the values in errors.

    Keys may be written with `-` or `_`. A `validate()` method of the class is called.

    Raises:
        UsageError: an unknown key (the nearest known one is named) or a value of the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    chosen: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            known = [field.replace("_", "-") for field in fields]
            raise UsageError(
                f"{where}: unknown setting '{key}'{nearest(str(key).replace('_', '-'), known)}"
            )
        chosen[name] = _convert(value, hints[name], f"{where}: {key}")
    settings = kind(**chosen)
    validate = getattr(settings, "validate", None)
    if validate is not None:
        validate()
    return settings


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        remaining = [option for option in options if option is not type(None)]
        return _convert(value, remaining[0], where)
    if origin is typing.Literal:
        options = typing.get_args(hint)
        if value not in options:
            names = ", ".join(str(option) for option in options)
            raise UsageError(f"{where}: '{value}' is not one of {names}")
        return value
    if origin is tuple:
        inner = typing.get_args(hint)[0]
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(item, inner, where) for item in items)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    if hint is str and isinstance(value, int | float | Path) and not isinstance(value, bool):
        return str(value)
    raise UsageError(f"{where}: '{value}' is not of type {getattr(hint, '__name__', hint)}")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UsageError: missing, not YAML, or not a mapping at the top level.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(
            f"{path}: settings must be 'name: value' lines, not a {type(loaded).__name__}"
        )
    return loaded


def to_yaml(settings: Any) -> str:
    """The YAML of a settings dataclass, keys as on the command line."""
    values = {
        key.replace("_", "-"): list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(settings).items()
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def descriptions(kind: type[Any]) -> dict[str, str]:
    """The docstring below each field of a settings dataclass, by field name."""
    found: dict[str, str] = {}
    for part in reversed(kind.__mro__[:-1]):
        found |= _descriptions(part)
    return found


def _descriptions(kind: type[Any]) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for item, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(item, ast.AnnAssign)
            and isinstance(item.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            found[item.target.id] = " ".join(str(after.value.value).split())
    return found


def add_options(
    parser: argparse.ArgumentParser, kind: type[Any], skip: tuple[str, ...] = ()
) -> None:
    """Add an option for each field of a settings dataclass; only options given are in the result.

    Values stay text: `from_texts` converts them, with the same errors as YAML.
    """
    hints = typing.get_type_hints(kind)
    texts = descriptions(kind)
    for field in dataclasses.fields(kind):
        if field.name in skip:
            continue
        choices = typing.get_args(hints[field.name])
        is_choice = typing.get_origin(hints[field.name]) is typing.Literal
        shown = field.default if field.default != "" else "none"
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=field.name,
            default=argparse.SUPPRESS,
            choices=choices if is_choice else None,
            metavar=None if is_choice else getattr(hints[field.name], "__name__", "value").upper(),
            help=f"{texts.get(field.name, '')} (default: {shown})".replace("%", "%%"),
        )


def from_texts(kind: type[Any], values: Mapping[str, str]) -> dict[str, Any]:
    """Option texts as values of the fields' types, for `from_mapping`.

    Raises:
        UsageError: a text that is not of the field's type.
    """
    hints = typing.get_type_hints(kind)
    result: dict[str, Any] = {}
    for name, text in values.items():
        hint = hints[name]
        if hint in (int, float):
            try:
                result[name] = hint(text)
            except ValueError:
                what = "a whole number" if hint is int else "a number"
                option = "--" + name.replace("_", "-")
                raise UsageError(f"{option}: '{text}' is not {what}") from None
        else:
            result[name] = text
    return result
