"""What every command line here shares: its parser, its errors and its exit codes."""

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from common.errors import ShortwaveError, UsageError


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` for the known word closest to `word`, or nothing."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{found[0]}'?" if found else ""


class Parser(argparse.ArgumentParser):
    """A parser that shows defaults, takes no abbreviations and names the nearest option."""

    def __init__(self, **settings: object) -> None:
        settings.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        settings.setdefault("allow_abbrev", False)
        super().__init__(**settings)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Print one line that names the nearest known option, and exit with 2."""
        marker = "unrecognized arguments: "
        if message.startswith(marker):
            word = message.removeprefix(marker).split()[0].split("=")[0]
            message += nearest(word, list(self._option_string_actions))
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def argument(parse: Callable[[str], object]) -> Callable[[str], object]:
    """Let argparse report the `UsageError` of a parsing function as a bad argument."""

    def convert(text: str) -> object:
        try:
            return parse(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def positive(text: str) -> int:
    """A whole number above zero, for `argument`."""
    try:
        number = int(text)
    except ValueError:
        raise UsageError(f"'{text}' is not a whole number") from None
    if number < 1:
        raise UsageError(f"{number} is not above zero")
    return number


def describe_os_error(error: OSError) -> str:
    """One line for a full disk, a missing permission and the like, with the path."""
    where = f": {error.filename}" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"no space left on the disk{where}; free some space, then resume the run"
    return f"{error.strerror or error}{where}"


def run(main: Callable[[Sequence[str] | None], int | None]) -> NoReturn:
    """Run a command and leave with its exit code: 0 done, 1 failed, 2 bad arguments, 130 stopped.

    Set `SHORTWAVE_TRACEBACK=1` to see the traceback of an error that is otherwise one line.
    """
    code = 1
    try:
        code = main(None) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except (ShortwaveError, OSError) as error:
        if os.environ.get("SHORTWAVE_TRACEBACK"):
            raise
        text = describe_os_error(error) if isinstance(error, OSError) else str(error)
        print(f"error: {text}", file=sys.stderr)
        code = error.exit_code if isinstance(error, ShortwaveError) else 1
    sys.stdout.flush()
    sys.exit(code)
