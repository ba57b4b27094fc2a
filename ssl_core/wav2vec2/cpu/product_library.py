"""Which library multiplies fp32 matrices: torch's BLAS, or oneDNN where that is clearly faster.

torch takes its BLAS, MKL on x86-64. On processors of AMD, MKL does not use the widest instructions,
oneDNN does: on Zen 5 a product takes 0.44 times as long. On processors of Intel both are as fast.
Both are timed once on each machine, and the choice is remembered on disk, so that every run adds in
the same order and its results are reproducible.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import statistics
from pathlib import Path

import torch

from common import strict_json
from common.atomic import write_text
from common.cache_folder import cache_folder
from common.errors import UsageError
from common.lock import Locked, lock
from ssl_core.wav2vec2.cpu import onednn
from ssl_core.wav2vec2.cpu.timing import one_thread, seconds_in_turn

BLAS, ONEDNN = "blas", "onednn"
VARIABLE = "SHORTWAVE_PRODUCTS"
"""Environment variable that names the library instead, for tests and benchmarks."""
FASTER = 1.2
"""oneDNN is chosen if it is at least so many times as fast, in the median of `TRIALS`."""
TRIALS, ROWS, WIDTH = 7, 192, 768
"""A trial is a linear layer of `base` with its gradients, for frames of 4 s."""
WAIT = 10.0
"""Seconds to wait for another process that is timing."""
_SWITCHES = ("MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Variables that withhold instructions from a library."""
_IDENTITY = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")


@functools.cache
def library() -> str:
    """The library that multiplies fp32 matrices on this machine's CPU, `blas` or `onednn`.

    One thread is timed: the choice holds for any number, so results do not depend on when and how
    busily it was made. If it cannot be remembered, each process times again.

    Raises:
        UsageError: the environment names a library that is not known.
    """
    forced = os.environ.get(VARIABLE)
    if forced:
        if forced not in (BLAS, ONEDNN):
            raise UsageError(f"{VARIABLE} must be {BLAS} or {ONEDNN}, not '{forced}'")
        return forced
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return BLAS
    path = cache_folder() / "products" / f"{_machine_digest()}.json"
    known = _remembered(path)
    if known:
        return known
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = lock(path.with_suffix(".lock"), WAIT)
    except (OSError, Locked):
        return faster_library()[0]
    try:
        # Another process may have timed meanwhile.
        return _remembered(path) or _measured(path)
    finally:
        if held is not None:
            held.close()


def faster_library() -> tuple[str, float]:
    """Time both libraries: the one to take, and how many times as fast oneDNN is."""
    with one_thread():
        x, grad = torch.ones(2, ROWS, WIDTH, device="cpu")
        weight = torch.ones(WIDTH, WIDTH, device="cpu")

        def layer(multiply: object) -> None:
            assert callable(multiply)
            multiply(x, weight.t())
            multiply(grad, weight)
            multiply(grad.t(), x)

        calls = [lambda: layer(torch.mm), lambda: layer(onednn.multiply)]
        try:
            for call in calls:
                call()
            trials = seconds_in_turn(calls, TRIALS)
        except RuntimeError:  # oneDNN has no such product for this processor
            return BLAS, 0.0
    ratio = statistics.median(blas / other for blas, other in trials)
    return (ONEDNN if ratio >= FASTER else BLAS), ratio


def _measured(path: Path) -> str:
    chosen, ratio = faster_library()
    with contextlib.suppress(OSError):  # a full or read-only disk costs time only
        write_text(
            path, strict_json.dumps({"library": chosen, "onednn_times_as_fast": round(ratio, 3)})
        )
    return chosen


def _remembered(path: Path) -> str | None:
    """The choice in a file; None if it is missing or broken."""
    try:
        chosen = json.loads(path.read_text(encoding="utf-8"))["library"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return chosen if chosen in (BLAS, ONEDNN) else None


def _machine_digest() -> str:
    """What the choice follows from: processor, libraries and switches."""
    processor = [platform.machine(), platform.processor()]
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
        fields = (line.partition(":") for line in first.splitlines())
        processor += [value for name, _, value in fields if name.strip() in _IDENTITY]
    except OSError:
        pass  # not on Linux
    switches = [os.environ.get(name, "") for name in _SWITCHES]
    values = [processor, torch.__version__, torch.__config__.show(), switches]
    return hashlib.sha256(strict_json.dumps(values).encode()).hexdigest()[:32]
