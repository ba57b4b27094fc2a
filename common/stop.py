"""Handles Ctrl-C and SIGTERM, by which systemd, Slurm and Docker stop a command.

A training stops after its current step and saves a checkpoint; other commands stop at once. A
second Ctrl-C stops a training at once too. A second SIGTERM does not: `timeout` and some
supervisors send two, and those that cannot wait send SIGKILL.
"""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

_received = 0
"""Number of the first stop signal that this process has received; 0 for none."""


class Terminated(KeyboardInterrupt):
    """SIGTERM was received."""


class Stop:
    """A context manager that catches Ctrl-C and SIGTERM; call it to see whether one has come."""

    def __enter__(self) -> "Stop":
        """Catch both from now on."""
        self.asked = False
        self._before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _ask(self, number: int, _: Any) -> None:
        _note(number)
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: object) -> None:
        """Restore the previous handling."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Whether the command is to stop."""
        return self.asked


def stop_on_sigterm() -> None:
    """Let SIGTERM raise `Terminated`, as Ctrl-C raises KeyboardInterrupt, in the main thread."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, _: Any) -> None:
    if _received:
        return
    _note(number)
    raise Terminated


def _note(number: int) -> None:
    global _received
    _received = _received or number


@contextlib.contextmanager
def signals() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the stop signal that has come, whoever handled it, or 0.

    For libraries that install handlers of their own. Only in the main thread.
    """
    reading, writing = socket.socketpair()
    for end in (reading, writing):
        end.setblocking(False)
    before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)

    def received() -> int:
        try:
            numbers = reading.recv(4096)
        except BlockingIOError:
            return 0
        return next((each for each in numbers if each in (signal.SIGINT, signal.SIGTERM)), 0)

    try:
        yield received
    finally:
        signal.set_wakeup_fd(before)
        reading.close()
        writing.close()


def exit_code() -> int:
    """Exit code of a command that was stopped: 143 by SIGTERM, 130 by Ctrl-C."""
    return 128 + (_received or signal.SIGINT)
