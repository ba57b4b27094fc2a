"""Times operations against one another on one thread, to choose between them."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils._mode_utils import no_dispatch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run on one thread, without a graph, autocast or tracing, whatever is going on outside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(), torch.autocast("cpu", enabled=False), no_dispatch():
            yield
    finally:
        torch.set_num_threads(threads)


def seconds_in_turn(calls: Sequence[Callable[[], object]], trials: int) -> list[list[float]]:
    """Call each function in turn, so that what else runs on the machine slows all of them.

    Args:
        calls: functions to time, already called once.
        trials: how often each is called.

    Returns:
        Seconds of each call, `[trial][function]`.
    """
    found = []
    for _ in range(trials):
        row = []
        for call in calls:
            started = time.perf_counter()
            call()
            row.append(time.perf_counter() - started)
        found.append(row)
    return found
