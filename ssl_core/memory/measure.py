"""Measure what a process takes: its memory now and at its peak, and that of a training step.

A step is measured in a process of its own, `python -m ssl_core.memory.measure`, so that nothing
else is in the figure.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

from partitions.errors import ShortwaveError

if TYPE_CHECKING:
    from ssl_core.memory.plan import Plan
    from ssl_core.step import Waveforms

Batches = Callable[[int], Iterable["Waveforms"]]
"""The batches of an update."""


def resident_bytes() -> int:
    """Memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def reset_peak() -> None:
    """Let the kernel count the peak from here on, where it can; else it is that of the process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Largest memory of this process since `reset_peak`, or since it began."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Measurement(NamedTuple):
    """What two updates took in a process of their own."""

    imports: int
    """Bytes resident before the model was made."""
    peak: int
    """Bytes resident at most."""
    seconds: float
    """Of the last update."""


def measure(
    model: str,
    settings: str,
    plan: dict[str, object],
    *,
    updates: int = 2,
    cgroup: str = "",
    data: str = "",
) -> Measurement:
    """Take updates in a new process, on noise or on speech.

    Args:
        model: preset.
        settings: as of `--set`.
        plan: fields of `Plan`.
        updates: how many.
        cgroup: folder of a memory cgroup (v1 or v2) that the process enters first.
        data: corpus in LibriSpeech's layout, its `train-*` subsets; empty is noise.

    Raises:
        ShortwaveError: the process failed or was killed.
    """
    task = json.dumps(
        {
            "model": model,
            "settings": settings,
            "plan": plan,
            "updates": updates,
            "cgroup": cgroup,
            "data": data,
        }
    )
    done = subprocess.run(
        [sys.executable, "-m", "ssl_core.memory.measure", task],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": str(plan.get("threads") or os.cpu_count() or 1)},
    )
    if done.returncode < 0:
        raise ShortwaveError(f"killed by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        raise ShortwaveError((done.stderr.strip().splitlines() or ["failed"])[-1])
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def _work(task: dict[str, object]) -> Measurement:
    if task["cgroup"]:
        Path(str(task["cgroup"]), "cgroup.procs").write_text(str(os.getpid()))
    import torch

    from ssl_core.memory.plan import Plan
    from ssl_core.overrides import resolve
    from ssl_core.step import TrainingStep
    from ssl_core.wav2vec2.model import PretrainingModel

    plan = Plan(**task["plan"])  # type: ignore[arg-type]
    if plan.threads:
        torch.set_num_threads(plan.threads)
    imports = resident_bytes()
    reset_peak()
    config, recipe = resolve(str(task["model"]), str(task["settings"]))
    updates = int(str(task["updates"]))
    step = TrainingStep(PretrainingModel(config), recipe, plan, seed=0, total_updates=updates)
    batches = _speech(str(task["data"]), plan) if task["data"] else _noise(plan)
    seconds = 0.0
    for number in range(updates):
        start = time.perf_counter()
        report = step.update(batches(number), number)
        seconds = time.perf_counter() - start
        if not report.applied:
            raise ShortwaveError(f"update {number} had a gradient that is not finite")
    return Measurement(imports, peak_bytes(), seconds)


def _noise(plan: "Plan") -> Batches:
    import numpy as np

    rng = np.random.default_rng(0)
    shape = (plan.batch, plan.samples)
    return lambda number: (
        rng.standard_normal(shape, dtype=np.float32) for _ in range(plan.accumulation)
    )


def _speech(data: str, plan: "Plan") -> Batches:
    from partitions.manifest import prepare
    from ssl_core.crops import Crops

    root = Path(data)
    manifest = prepare(root, (), plan.length)
    crops = Crops(manifest, range(len(manifest.sequences)), plan.samples, 0)

    def batches(number: int) -> Iterator["Waveforms"]:
        ((_, read),) = crops.updates([number], plan.batch, plan.accumulation)
        return (batch.waveforms for batch in read)

    return batches


if __name__ == "__main__":
    print(json.dumps(_work(json.loads(sys.argv[1]))._asdict()))
