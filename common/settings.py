"""Settings as frozen dataclasses, from a command line, YAML or a mapping, by jsonargparse.

A settings class documents each field in a docstring below it, which `--help` shows. It may have

- `defaults(given)`, a class method: defaults that depend on what was given, such as a preset's;
- `validate()`, which raises `UsageError` where values do not fit together;
- `SHORT`, names of nested settings that need no prefix: `{"batch": "recipe.batch"}`.

Names are written with dashes, nested ones with dots: `--recipe.learning-rate 1e-3`.
"""

import argparse
import dataclasses
import functools
import itertools
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jsonargparse
import yaml
from jsonargparse.typing import register_type

from common.command import nearest
from common.errors import UsageError
from common.units import Names, Seconds, Size

Settings = TypeVar("Settings")

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
for _kind in (Seconds, Size, Names):
    register_type(_kind, str, _kind.parse, deserializer_exceptions=UsageError)


def _underscored(values: Any) -> Any:
    """A mapping with `_` for every `-` in its keys, nested ones too."""
    if not isinstance(values, dict):
        return values
    return {str(key).replace("-", "_"): _underscored(value) for key, value in values.items()}


_load_yaml: Callable[[str], Any] = jsonargparse.get_loader("yaml")
jsonargparse.set_loader("yaml", lambda text: _underscored(_load_yaml(text)))


class Parser(jsonargparse.ArgumentParser):
    """A parser that takes dashes in names, no abbreviations, and names the nearest option."""

    def __init__(
        self,
        *,
        short: Mapping[str, str] | None = None,
        hints: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """Make a parser.

        Args:
            short: options that stand for others, such as `{"--frozen": "--backbone=frozen"}`.
            hints: types by dotted name: a `bool` needs no value, a tuple takes several words.
            settings: of `argparse.ArgumentParser`.
        """
        settings.setdefault("allow_abbrev", False)
        settings.setdefault("usage", "%(prog)s [options]")
        super().__init__(**settings)
        self.short, self.hints = dict(short or {}), dict(hints or {})

    def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Any:
        """See `jsonargparse.ArgumentParser`; options are written as a person writes them."""
        words = sys.argv[1:] if args is None else args
        return super().parse_args(self._canonical(list(words)), *others, **options)

    def _canonical(self, words: list[str]) -> list[str]:
        """The words as jsonargparse knows them."""
        result = []
        while words:
            word = words.pop(0)
            if not word.startswith("--"):
                result.append(word)
                continue
            name, equals, value = word.partition("=")
            name, *preset = self.short.get(name, name).split("=", 1)
            full, hint = "--" + name[2:].replace("-", "_"), self.hints.get(_field(name))
            if preset:
                equals, value = "=", preset[0]
            elif _is_optional(hint) and not equals and words[:1] == [""]:
                equals, value = "=", words.pop(0) or "null"  # not the path "."
            elif hint is bool and not equals and (not words or words[0].startswith("--")):
                equals, value = "=", "true"
            elif _takes_several(hint) and not equals:
                several = list(itertools.takewhile(lambda each: not each.startswith("--"), words))
                del words[: len(several)]
                if several:
                    equals, value = "=", ",".join(several)
            if _takes_several(hint) and hint is not Names and not value.startswith("["):
                value = f"[{value}]"
            result.append(full + equals + value)
        return result

    def options(self) -> list[str]:
        """All options as a person writes them."""
        known = {text for action in self._actions for text in action.option_strings}
        return sorted({_dashed(text) for text in known} | self.short.keys())

    def format_help(self, formatter: Any = None) -> str:
        """The help text, options with dashes."""
        text = super().format_help(formatter)
        return re.sub(r"--[a-z][a-z0-9_.]*", lambda match: _dashed(match[0]), text)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line that says what and where, and exit with 2."""
        if not self.exit_on_error:
            raise argparse.ArgumentError(None, message) from ex
        text = _explained(message, self.options())
        self.exit(2, f"{self.prog}: error: {text} (see {self.prog} --help)\n")


def _field(option: str) -> str:
    """The dotted name of a field, from its option."""
    return option[2:].replace("-", "_")


def _is_optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _takes_several(hint: Any) -> bool:
    return hint is Names or typing.get_origin(hint) is tuple


def _hints(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Types of all fields by dotted name, nested ones too."""
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from _hints(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield prefix + name, hint


def _dashed(option: str) -> str:
    return option if option == "--print_config" else option.replace("_", "-")


def _explained(message: str, known: Sequence[str]) -> str:
    """An error of jsonargparse in one line, with the nearest known name."""
    text = " ".join(message.split())
    found = re.match(r"Parser key \"([\w.]+)\": (.*)", text)
    if found is not None:
        reason = re.sub(r"^Not of type \w+: ", "", found[2])
        wrong = re.fullmatch(r"Expected an? (.*)\. Got value: (.*)", reason)
        if wrong is not None:
            reason = f"'{wrong[2]}' is not {_readable(wrong[1], wrong[2])}"
        reason = re.sub(
            r"(\S+) does not conform to restriction v>0", r"\1 is not above zero", reason
        )
        return f"{_dashed('--' + found[1])}: {reason}"
    unknown = re.match(r"unrecognized arguments: ([^\s=]+)", text)
    if unknown is not None:
        return f"unrecognized arguments: {_dashed(unknown[1])}{nearest(_dashed(unknown[1]), known)}"
    group = re.fullmatch(r"(?:Group '([\w.]+)' does not accept o|O)ption '([\w.]+)'.*", text)
    if group is not None:
        name = _dashed(".".join(filter(None, [group[1], group[2]])))
        return f"unknown setting '{name}'{nearest(name, [each[2:] for each in known])}"
    return text


def _readable(kind: str, value: str) -> str:
    """A type in words, for `'x' is not ...`."""
    choices = re.findall(r"'([^']*)'", kind) if "Literal" in kind else []
    if choices:
        return f"one of {', '.join(choices)}{nearest(value, choices)}"
    name = re.sub(r"<class '([\w.]+)'>|typing\.", r"\1", kind).rpartition(".")[2]
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
    return words.get(name, f"of type {name}")


def settings_parser(kind: type[Any], **options: Any) -> Parser:
    """A parser of a settings class, with `--config FILE` and `--print_config`.

    Args:
        kind: dataclass of the settings.
        options: of `Parser`.
    """
    short = {f"--{name}": f"--{full}" for name, full in getattr(kind, "SHORT", {}).items()}
    parser = Parser(
        **options | {"short": short | options.get("short", {}), "hints": dict(_hints(kind))}
    )
    parser.add_argument("--config", action="config", help="YAML file of any of the options below")
    _add_fields(parser, kind)
    return parser


def _add_fields(parser: Parser, kind: type[Any]) -> None:
    parser.add_class_arguments(kind, as_group=False)
    for action in parser._actions:
        if "." in action.dest:  # nested settings have defaults, also of fields without
            action.required = False


def parse(
    kind: type[Settings], parser: Parser, arguments: Sequence[str] | None
) -> tuple[Settings, argparse.Namespace]:
    """Read settings from a command line, before that `--config`, before that the defaults.

    Args:
        kind: dataclass of the settings.
        parser: from `settings_parser`, with further options if wanted.
        arguments: words of the command line; None takes the process's own.

    Returns:
        The settings, validated, and the values of the further options.

    Raises:
        UsageError: values that do not fit together.
    """
    given = _nested(parser.parse_args(arguments, defaults=False))
    parser.set_defaults(dict(_flat(_defaults(kind, given))))
    values = parser.instantiate(parser.parse_args(arguments))
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    settings = kind(**{name: getattr(values, name) for name in names})
    _validate(settings)
    others = {name: value for name, value in vars(values).items() if name not in names}
    return settings, argparse.Namespace(**others)


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
    silent: Any = _silent_parser
    parser, given = silent(kind), _underscored(dict(values))
    for name, full in getattr(kind, "SHORT", {}).items():
        if name in given:
            section, _, inner = full.partition(".")
            given[section] = {inner: given.pop(name)} | dict(given.get(section) or {})
    for field in _fields(kind):
        if dataclasses.is_dataclass(field.default) and not isinstance(
            given.get(field.name, {}), dict
        ):
            raise UsageError(f"{where}: {field.name} must be a mapping of settings")
    try:
        known = _nested(parser.parse_object(given, defaults=False))
        defaults = dict(_flat(_defaults(kind, known)))
        chosen = parser.instantiate(parser.parse_object(defaults_under(defaults, known)))
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        text = error.message if isinstance(error, argparse.ArgumentError) else str(error)
        raise UsageError(f"{where}: {_explained(text, parser.options())}") from None
    settings = kind(**{field.name: getattr(chosen, field.name) for field in _fields(kind)})
    try:
        _validate(settings)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    return settings


def defaults_under(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values given, and below them defaults by dotted name, as one nested mapping."""
    merged: dict[str, Any] = {}
    for name, value in (*defaults.items(), *_flat(given)):
        *sections, last = name.split(".")
        place = merged
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return merged


@functools.cache
def _silent_parser(kind: Any) -> Parser:
    parser = Parser(exit_on_error=False)
    _add_fields(parser, kind)
    return parser


def _fields(kind: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)


def _defaults(kind: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    found = getattr(kind, "defaults", None)
    return dict(found(given)) if found is not None else {}


def _validate(settings: Any) -> None:
    validate = getattr(settings, "validate", None)
    if validate is not None:
        validate()


def _nested(namespace: Any) -> dict[str, Any]:
    values: dict[str, Any] = namespace.as_dict()
    return {name: value for name, value in values.items() if name != "config"}


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted name; of nested settings each of their own."""
    for name, value in values.items():
        if dataclasses.is_dataclass(value):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif name != "__path__":
            yield prefix + name, value


def plain(settings: Any) -> dict[str, Any]:
    """Settings as nested mappings of scalars and lists, names with dashes, for YAML and JSON."""
    return {
        field.name.replace("_", "-"): _plain(getattr(settings, field.name))
        for field in _fields(settings)
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return plain(value)
    if isinstance(value, Seconds | Size | Names | Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def flat(settings: Any) -> dict[str, str | int | float | bool]:
    """Settings as scalars by dotted name with dashes, as Flower's run config holds them.

    What is not set (None) is an empty text.
    """
    found = _flat(plain(settings))
    return {
        name: "" if value is None else str(value) if isinstance(value, list) else value
        for name, value in found
    }


def unflat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The nested mapping of `flat`'s scalars; an empty text is a setting that was not given."""
    given = {name: value for name, value in values.items() if value != ""}
    return defaults_under({}, given)


def to_yaml(settings: Any) -> str:
    """The YAML of settings, names as on the command line."""
    return yaml.safe_dump(plain(settings), sort_keys=False, allow_unicode=True)


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
