"""Ctrl-C as a wish to stop after the work at hand; a second one stops at once."""

import signal
from typing import Any


class Stop:
    """Whether the user wants to stop; a context manager that looks out for Ctrl-C."""

    def __enter__(self) -> "Stop":
        """Begin to look out."""
        self.asked = False
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: object) -> None:
        """Handle Ctrl-C as before."""
        signal.signal(signal.SIGINT, self._before)

    def __call__(self) -> bool:
        """Whether the user wants to stop."""
        return self.asked
