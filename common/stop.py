"""Handles Ctrl-C as a request to stop after the current step; a second one stops at once."""

import signal
from typing import Any


class Stop:
    """A context manager that catches Ctrl-C; call it to see whether the user asked to stop."""

    def __enter__(self) -> "Stop":
        """Catch Ctrl-C from now on."""
        self.asked = False
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: object) -> None:
        """Restore the previous handling of Ctrl-C."""
        signal.signal(signal.SIGINT, self._before)

    def __call__(self) -> bool:
        """Whether the user asked to stop."""
        return self.asked
