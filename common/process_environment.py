"""A command that begins again with what the C library reads only at a process's start.

glibc keeps some hundred small objects that a thread has freed for its next ones (`tcache`). Until
then they stand as walls between freed tensors, whose places cannot join to hold a larger one.
Without this cache a training step takes up to 5 % less memory and 14 % less time, as measured with
glibc 2.36.
"""

import os
import platform
import sys
from collections.abc import Mapping

VARIABLE = "GLIBC_TUNABLES"
_NAME, _VALUE = "glibc.malloc.tcache_count", "0"


def tuned(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a process that trains; what the user has set in it stays."""
    found = dict(environment)
    given = found.get(VARIABLE, "")
    if platform.libc_ver()[0] == "glibc" and f"{_NAME}=" not in given:
        found[VARIABLE] = ":".join([*filter(None, [given]), f"{_NAME}={_VALUE}"])
    return found


def restart() -> None:
    """Run this command again, in this process, unless its environment is `tuned`.

    To be called before anything large is imported, and only of a command line of its own.
    """
    wanted = tuned(os.environ)
    if wanted == dict(os.environ) or not sys.orig_argv:
        return
    try:
        os.execvpe(sys.orig_argv[0], sys.orig_argv, wanted)
    except OSError:
        os.environ[VARIABLE] = wanted[VARIABLE]  # for what this process starts
