"""Errors a user can act on; each carries the exit code of the command line."""


class ShortwaveError(Exception):
    """Base of every error that is shown without a traceback.

    The message says what was wrong, where, and what to do.
    """

    exit_code = 1


class UsageError(ShortwaveError):
    """A wrong argument, setting or YAML key (exit code 2)."""

    exit_code = 2


class DataError(ShortwaveError):
    """Audio, a manifest or a corpus that cannot be used (exit code 1)."""


class Interrupted(ShortwaveError):
    """The user stopped the run; what was done so far can be resumed (exit code 130)."""

    exit_code = 130
