"""Options of a settings class on a command line, by jsonargparse.

Names are written with dashes, nested ones with dots: `--recipe.learning-rate 1e-3`. A `bool` needs
no value, a tuple takes several words.
"""

import argparse
import dataclasses
import itertools
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml
from jsonargparse.typing import register_type

from common.command import nearest
from common.errors import UsageError
from common.units import Names, Seconds, Size

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
for _kind in (Seconds, Size, Names):
    register_type(_kind, str, _kind.parse, deserializer_exceptions=UsageError)


def underscored(values: Any) -> Any:
    """A mapping with `_` for every `-` in its keys, nested ones too."""
    if not isinstance(values, dict):
        return values
    return {str(key).replace("-", "_"): underscored(value) for key, value in values.items()}


_load_yaml: Any = jsonargparse.get_loader("yaml")
jsonargparse.set_loader("yaml", lambda text: underscored(_load_yaml(text)), (yaml.YAMLError,))


class Parser(jsonargparse.ArgumentParser):
    """A parser of options as a person writes them, which names the nearest one in errors."""

    def __init__(
        self, kind: Any = None, *, short: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        """Add an option for each field of a settings class.

        Args:
            kind: the class; None for a command without settings.
            short: options that stand for others, such as `{"--frozen": "--backbone=frozen"}`.
            options: of `argparse.ArgumentParser`.
        """
        usage: dict[str, Any] = {
            "allow_abbrev": False,
            "usage": "%(prog)s [options]",
            "print_config": None,
        }
        super().__init__(**usage | options)
        self.short = dict(short or {})
        self.hints: dict[str, Any] = {"print_config": bool}
        if kind is None:
            return
        self.short |= {f"--{name}": f"--{full}" for name, full in short_names(kind).items()}
        self.hints |= types_by_name(kind)
        self.add_class_arguments(kind, as_group=False)
        for action in self._actions:
            if "." in action.dest:  # nested settings have defaults, whatever their class says
                action.required = False

    def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Any:
        """See `jsonargparse.ArgumentParser`."""
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_args(list(self._canonical(words)), *others, **options)

    def _canonical(self, words: list[str]) -> Iterator[str]:
        """The words as jsonargparse knows them: underscores, and one value for each option."""
        lists: dict[str, list[str]] = {}
        while words:
            word = words.pop(0)
            if not word.startswith("--"):
                yield word
                continue
            name, equals, value = word.partition("=")
            name, *preset = self.short.get(name, name).split("=", 1)
            name = name[2:].replace("-", "_")
            hint = self.hints.get(name)
            if hint is Names or typing.get_origin(hint) is tuple:
                follow = itertools.takewhile(lambda each: not each.startswith("--"), words)
                values = [value] if equals else list(follow)
                if not equals:
                    del words[: len(values)]
                if values:
                    lists.setdefault(name, []).extend(values)
                else:
                    yield f"--{name}"  # an error names it
                continue
            if preset:
                equals, value = "=", preset[0]
            elif hint is bool and not equals:
                flag = not words or words[0].startswith("--")
                equals, value = "=", "true" if flag else words.pop(0)
            elif not equals and words[:1] == [""]:
                equals, value = "=", words.pop(0)
            if equals and not value and type(None) in typing.get_args(hint):
                value = "null"  # not the path "."
            yield f"--{name}{equals}{value}"
        for name, values in lists.items():
            value = ",".join(values)
            listed = self.hints[name] is Names or value.startswith("[")
            yield f"--{name}={value if listed else f'[{value}]'}"

    def format_help(self, formatter: Any = None) -> str:
        """The help text, options with dashes."""
        text = super().format_help(formatter)
        return re.sub(r"--[a-z][a-z0-9_.]*", lambda match: dashed(match[0]), text)

    def explain(self, message: str) -> str:
        """An error of jsonargparse in one line, with the nearest known name."""
        text = " ".join(message.split())
        unknown = _UNKNOWN.search(text)
        if unknown is not None:
            name = ".".join(filter(None, unknown.groups()))
            known = [*self.hints, *(each[2:] for each in self.short)]
            known += [text[2:] for action in self._actions for text in action.option_strings]
            listed = [dashed(each) for each in known]
            return f"unknown setting '{dashed(name)}'{nearest(dashed(name), listed)}"
        alone = re.match(r"argument --([\w.]+): (.*)", text)
        if alone is not None:
            return f"--{dashed(alone[1])}: {alone[2]}"
        # Of several types the first is meant; others are None.
        wrong = re.match(r"Parser key \"([\w.]+)\": (?:Does not validate.*?Errors: - )?(.*)", text)
        if wrong is None:
            return text
        name, reason = dashed(wrong[1]), re.sub(r"^Not of type \w+: | - Expected .*", "", wrong[2])
        reason = re.sub(r"^Unable to load config '(.*?)' - ", r"cannot read \1: ", reason)
        reason = reason.partition(": Parser key")[0]
        value = re.search(r"(?:Given value|Got value): (.*)", text)
        found = value[1] if value else ""
        choices = re.findall(r"'([^']*)'", reason) if "Literal" in reason else []
        if choices:
            close = nearest(found, choices)
            return f"--{name}: '{found}' is not one of {', '.join(choices)}{close}"
        kind = re.match(r"Expected an? (?:<class ')?(?:\w+\.)*(\w+)", reason)
        if kind is not None:
            return f"--{name}: '{found}' is not {_WORDS.get(kind[1], f'of type {kind[1]}')}"
        if reason.startswith("does not conform"):
            reason = f"{found} {reason}"
        reason = reason.replace("does not conform to restriction v>0", "is not above zero")
        reason = re.sub(r"invalid literal for int.*: ('.*')", r"\1 is not a whole number", reason)
        return f"--{name}: {reason}"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line that says what and where, and exit with 2."""
        if not self.exit_on_error:
            raise argparse.ArgumentError(None, message) from ex
        text = self.explain(message)
        self.exit(2, f"{self.prog}: error: {text} (see {self.prog} --help)\n")


_UNKNOWN = re.compile(
    r"(?:unrecognized arguments: --|(?:Group '([\w.]+)' does not accept o|O)ption ')([\w.]+)"
)
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "tuple": "a list",
    "Mapping": "a mapping",
}


def dashed(name: str) -> str:
    """The name as it is written on a command line."""
    return name if name.endswith("print_config") else name.replace("_", "-")


def short_names(kind: Any) -> dict[str, str]:
    """Dotted names of nested settings by the short name that stands for them."""
    return dict(getattr(kind, "SHORT", {}))


def types_by_name(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Types of all fields by dotted name, nested ones too."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from types_by_name(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hints[field.name]


def settings_parser(kind: type[Any], **options: Any) -> Parser:
    """A parser of a settings class, with `--config FILE` and `--print_config`.

    Args:
        kind: dataclass of the settings.
        options: of `Parser`.
    """
    parser = Parser(kind, **options)
    parser.add_argument("--config", type=Path, help="YAML file of any of these options")
    parser.add_argument(
        "--print_config", type=bool, default=False, help="print all settings as YAML and exit"
    )
    return parser
