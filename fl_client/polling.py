"""Looks for messages more often while a device is likely to get one, and tells when it is idle.

Flower's SuperNode asks its SuperLink for messages every 3 s. A device that has just come, or just
answered, is soon asked something, and each question would wait for half of that.
"""

import logging
import time
from typing import Any, Protocol

QUICK, BUSY = 0.3, 10.0
"""Seconds between two looks while busy, and for how long after a message."""
REPLY = 0.05
"""Seconds between two looks for a ClientApp's reply, in this process's memory, while busy."""
_EVENTS = ("SuperNode ID:", "Receiving:", "Sending:")
_TASK, _IDLE = "Received successfully", ("Sent successfully", "Connection attempt failed")


class Forks(Protocol):
    """Who starts ClientApps, see `warm_start`."""

    def task(self) -> None:
        """Be told that there is a task."""

    def idle(self) -> None:
        """Be told that nothing needs the processor now."""


class Pace(logging.Handler):
    """Stands in for the module `time` in Flower's loop, whose pauses it shortens while busy."""

    def __init__(self, forks: Forks | None = None) -> None:
        """Begin busy.

        Args:
            forks: to tell of tasks, and when the device is idle.
        """
        super().__init__(logging.INFO)
        self._forks = forks
        self._until = time.monotonic() + BUSY

    def emit(self, record: logging.LogRecord) -> None:
        """Be busy after a message, which Flower logs."""
        text = str(record.msg)
        if text.startswith(_EVENTS):
            self._until = time.monotonic() + BUSY
        if self._forks is not None:
            if text.startswith(_TASK):
                self._forks.task()
            elif text.startswith(_IDLE):
                self._forks.idle()

    def sleep(self, seconds: float) -> None:
        """Pause, for a shorter time while busy."""
        busy = time.monotonic() < self._until
        if not busy and seconds > 1 and self._forks is not None:
            self._forks.idle()
        time.sleep(min(seconds, QUICK if seconds > 1 else REPLY) if busy else seconds)

    def __getattr__(self, name: str) -> Any:
        """Everything else of `time`."""
        return getattr(time, name)


def quicken(forks: Forks | None = None) -> Pace:
    """Let the SuperNode of this process follow a `Pace`; `forks` as there."""
    from flwr.supercore.logger import LOGGER_NAME
    from flwr.supernode import start_client_internal

    pace = Pace(forks)
    logging.getLogger(LOGGER_NAME).addHandler(pace)
    start_client_internal.time = pace
    return pace
