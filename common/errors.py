"""Errors that a user can act on, each with its exit code on the command line."""


class ShortwaveError(Exception):
    """Base class of the errors shown without a traceback.

    The message says what was wrong, where, and what to do.
    """

    exit_code = 1


class UsageError(ShortwaveError):
    """A wrong argument, setting or YAML key (exit code 2)."""

    exit_code = 2


class DataError(ShortwaveError):
    """Unusable audio, manifest or corpus (exit code 1)."""


class Interrupted(ShortwaveError):
    """The run was stopped and can be resumed (exit code 130 after Ctrl-C, 143 after SIGTERM)."""

    exit_code = 130
