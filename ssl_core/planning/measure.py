"""Measures memory and time of a training step in a separate process."""

import contextlib
import os
import pickle
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from common.errors import ShortwaveError
from common.process_environment import tuned
from ssl_core.planning.process_memory import peak_bytes, reset_peak, resident_bytes
from ssl_core.planning.step_plan import Plan
from ssl_core.planning.work import Batches, Work

GPU_UPDATES = 12
"""Updates that are measured at least on a GPU: with layerdrop, several are of a new kind."""


class Measurement(NamedTuple):
    """Memory and time of updates in a separate process."""

    imports: int
    """Bytes resident before the model was built; of a GPU, those of its CUDA context, and of other
    processes."""
    peak: int
    """Peak resident bytes; of a GPU, with what torch reserves of its memory at the peak."""
    seconds: float
    """Seconds of the last update; on a GPU, the median."""
    footprint: Sequence[tuple[float, int]] = ()
    """Samples of seconds since the start of building the model, and resident bytes."""
    allocated: int = 0
    """On a GPU: peak bytes of tensors and workspaces; the rest of `peak` is the allocator's."""


class Order(NamedTuple):
    """Arguments that the measuring process reads; see `measure`."""

    work: Work
    plan: Plan
    updates: int
    sample: float
    batches: Batches | None


def measure(
    work: Work,
    plan: Plan,
    *,
    updates: int = 2,
    cgroup: str = "",
    sample: float = 0.0,
    batches: Batches | None = None,
) -> Measurement:
    """Measure updates in a new process.

    Args:
        work: what is trained.
        plan: how a step is taken.
        updates: number of updates.
        cgroup: folder of a memory cgroup (v1 or v2) that the process joins at its start.
        sample: seconds between samples of resident memory; 0 takes none.
        batches: speech for pretraining, must be picklable; None for noise.

    Raises:
        ShortwaveError: the process failed or was killed.
    """
    order = Order(work, plan, updates, sample, batches)
    threads = plan.threads or os.cpu_count() or 1
    command = [sys.executable, "-m", "ssl_core.planning.measure"]
    if cgroup:  # before Python starts, so that its imports count
        command = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', cgroup, *command]
    done = subprocess.run(
        command,
        input=pickle.dumps(tuple(order)),
        capture_output=True,
        cwd=Path(__file__).parents[2],
        env=tuned(os.environ) | {"OMP_NUM_THREADS": str(threads)},
    )
    if done.returncode < 0:
        raise ShortwaveError(f"killed by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ShortwaveError((lines or ["failed"])[-1])
    return Measurement(*pickle.loads(done.stdout))


def _run_updates(order: Order) -> Measurement:
    from ssl_core.planning.processor import use_threads  # with torch

    use_threads(order.plan.threads)
    if order.plan.on_gpu:
        return _run_on_gpu(order)
    imports = resident_bytes()
    reset_peak()
    with _sampled(order.sample) as footprint:
        *_, seconds = _timed(order)
    return Measurement(imports, peak_bytes(), seconds, footprint)


def _timed(order: Order) -> list[float]:
    """Take the updates; return the seconds of each."""
    seconds = []
    update = order.work.start(order.plan, batches=order.batches).update
    for number in range(order.updates):
        start = time.perf_counter()
        applied = update(number)
        seconds.append(time.perf_counter() - start)
        if not applied:
            raise ShortwaveError(f"update {number} had a gradient that is not finite")
    return seconds


def _run_on_gpu(order: Order) -> Measurement:
    """Take at least `GPU_UPDATES` updates on a GPU, of which some are captured by graphs."""
    import torch

    device = torch.device(order.plan.device)
    torch.cuda.reset_peak_memory_stats(device)
    seconds = _timed(order._replace(updates=max(order.updates, GPU_UPDATES)))
    free, whole = torch.cuda.mem_get_info(device)
    context = whole - free - torch.cuda.memory_reserved(device)
    peak = context + torch.cuda.max_memory_reserved(device)
    allocated = torch.cuda.max_memory_allocated(device)
    return Measurement(context, peak, statistics.median(seconds), allocated=allocated)


@contextlib.contextmanager
def _sampled(interval: float) -> Iterator[list[tuple[float, int]]]:
    """Sample resident bytes every `interval` seconds; never for 0."""
    found: list[tuple[float, int]] = []
    done, start = threading.Event(), time.perf_counter()

    def sample() -> None:
        while not done.wait(interval):
            found.append((round(time.perf_counter() - start, 3), resident_bytes()))

    thread = threading.Thread(target=sample, daemon=True)
    if interval:
        thread.start()
    try:
        yield found
    finally:
        done.set()
        if interval:
            thread.join()


if __name__ == "__main__":
    result = _run_updates(Order(*pickle.loads(sys.stdin.buffer.read())))
    sys.stdout.buffer.write(pickle.dumps(tuple(result)))
