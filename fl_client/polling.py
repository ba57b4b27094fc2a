"""Looks for messages more often while a device is likely to get one.

Flower's SuperNode asks its SuperLink for messages every 3 s. A device that has just come, or just
answered, is soon asked something, and each question would wait for half of that.
"""

import logging
import time
from typing import Any

QUICK, BUSY = 0.3, 10.0
"""Seconds between two looks while busy, and for how long after a message."""
_EVENTS = ("SuperNode ID:", "Receiving:", "Sending:")


class Pace(logging.Handler):
    """Stands in for the module `time` in Flower's loop, whose pauses it shortens while busy."""

    def __init__(self) -> None:
        """Begin busy."""
        super().__init__(logging.INFO)
        self._until = time.monotonic() + BUSY

    def emit(self, record: logging.LogRecord) -> None:
        """Be busy after a message, which Flower logs."""
        if str(record.msg).startswith(_EVENTS):
            self._until = time.monotonic() + BUSY

    def sleep(self, seconds: float) -> None:
        """Pause, for a shorter time while busy."""
        busy = time.monotonic() < self._until
        time.sleep(min(seconds, QUICK) if busy else seconds)

    def __getattr__(self, name: str) -> Any:
        """Everything else of `time`."""
        return getattr(time, name)


def quicken() -> Pace:
    """Let the SuperNode of this process follow a `Pace`."""
    from flwr.supercore.logger import LOGGER_NAME
    from flwr.supernode import start_client_internal

    pace = Pace()
    logging.getLogger(LOGGER_NAME).addHandler(pace)
    start_client_internal.time = pace
    return pace
