"""Runs commands: subcommands, errors and exit codes."""

import difflib
import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from common import stop
from common.errors import Interrupted, ShortwaveError


def nearest(word: str, known: Sequence[str]) -> str:
    """Return `; did you mean 'x' or 'y'?` for the known words nearest to `word`, or an empty text.

    The nearest, at most five, are those that equal `word` but for case and punctuation; without
    any, those that begin with it; then those that contain it; then the one spelled most alike.
    """
    sought = _letters(word)
    letters = {each: _letters(each) for each in known if _letters(each)}
    found = [each for each in letters if letters[each] == sought]
    if not found and sought:
        found = [each for each in letters if letters[each].startswith(sought)]
    if not found and len(sought) > 2:
        found = [each for each in letters if sought in letters[each]]
    if not found:
        alike = difflib.get_close_matches(sought, letters.values(), n=1, cutoff=0.5)
        found = [each for each in letters if letters[each] in alike][:1]
    names = [f"'{each}'" for each in found[:5]]
    listed = " or ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
    return f"; did you mean {listed}?" if listed else ""


def _letters(word: str) -> str:
    """The letters and digits of a word, in lower case."""
    return "".join(filter(str.isalnum, word)).lower()


Main = Callable[[Sequence[str] | None], int | None]
"""A command: takes the words of the command line (None for `sys.argv`), returns the exit code."""


def subcommand(
    prog: str, description: str, commands: Mapping[str, tuple[str, Main]], words: Sequence[str]
) -> int:
    """Run the subcommand that the first word names; returns the exit code.

    Args:
        prog: name of the command.
        description: of the command, for its help.
        commands: help and function of each subcommand, by name.
        words: words of the command line.
    """
    name = words[0] if words else ""
    if name in ("-h", "--help"):
        listed = "\n".join(f"  {each:14} {text}" for each, (text, _) in commands.items())
        print(f"usage: {prog} COMMAND [options]\n\n{description}\n\ncommands:\n{listed}")
        return 0
    if name not in commands:
        what = f"no command '{name}'{nearest(name, list(commands))}" if name else "no command given"
        print(f"{prog}: error: {what} (see {prog} --help)", file=sys.stderr)
        return 2
    _, main = commands[name]
    return main(words[1:]) or 0


def describe_os_error(error: OSError) -> str:
    """Describe an error such as a full disk or a missing permission in one line, with the path."""
    where = f": {error.filename}" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"no space left on the disk{where}; free some space, then resume the run"
    return f"{error.strerror or error}{where}"


def run(main: Main) -> NoReturn:
    """Run a command and exit with its code.

    0 done, 1 failed, 2 bad arguments, 130 stopped by Ctrl-C, 143 stopped by SIGTERM.

    `SHORTWAVE_TRACEBACK=1` shows the traceback of an error instead of one line.
    """
    code = 1
    stop.stop_on_sigterm()
    try:
        code = main(None) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = stop.exit_code()
    except Interrupted as error:
        print(error, file=sys.stderr)
        code = stop.exit_code()
    except (ShortwaveError, OSError) as error:
        if os.environ.get("SHORTWAVE_TRACEBACK"):
            raise
        text = describe_os_error(error) if isinstance(error, OSError) else str(error)
        print(f"error: {text}", file=sys.stderr)
        code = error.exit_code if isinstance(error, ShortwaveError) else 1
    sys.stdout.flush()
    sys.exit(code)
