"""Measure what a process takes: its memory now and at its peak, and that of a training step.

A step, of pretraining or of fine-tuning a task, is measured in a process of its own,
`python -m ssl_core.planning.measure`, so that nothing else is in the figure.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.errors import ShortwaveError
from common.process_environment import tuned
from ssl_core.planning.process_memory import peak_bytes, reset_peak, resident_bytes

if TYPE_CHECKING:
    from ssl_core.planning.step_plan import Plan
    from ssl_core.training.pretraining_step import Waveforms

Batches = Callable[[int], Iterable["Waveforms"]]
"""The batches of an update."""
Update = Callable[[int], bool]
"""Takes the update of a number; whether it was applied."""


class Measurement(NamedTuple):
    """What two updates took in a process of their own."""

    imports: int
    """Bytes resident before the model was made."""
    peak: int
    """Bytes resident at most."""
    seconds: float
    """Of the last update."""
    footprint: Sequence[tuple[float, int]] = ()
    """Seconds since the model began to be made, and bytes resident then, where it was sampled."""


def measure(
    model: str,
    settings: str,
    plan: dict[str, object],
    *,
    updates: int = 2,
    cgroup: str = "",
    data: str = "",
    task: str = "",
    unfrozen: bool = False,
    cached: bool = False,
    sample: float = 0.0,
) -> Measurement:
    """Take updates in a new process, on noise or on speech.

    Args:
        model: preset.
        settings: as of `--set`.
        plan: fields of `Plan`.
        updates: how many.
        cgroup: folder of a memory cgroup (v1 or v2) that the process enters first.
        data: corpus in LibriSpeech's layout, its `train-*` subsets; empty is noise.
        task: fine-tune this one, on noise, rather than pretrain.
        unfrozen: whether the task's backbone is trained.
        cached: whether the task's clips go through what is frozen once, before.
        sample: seconds between samples of the memory; 0 takes none.

    Raises:
        ShortwaveError: the process failed or was killed.
    """
    order = json.dumps(
        {
            "model": model,
            "settings": settings,
            "plan": plan,
            "updates": updates,
            "cgroup": cgroup,
            "data": data,
            "task": task,
            "unfrozen": unfrozen,
            "cached": cached,
            "sample": sample,
        }
    )
    done = subprocess.run(
        [sys.executable, "-m", "ssl_core.planning.measure", order],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=tuned(os.environ)
        | {"OMP_NUM_THREADS": str(plan.get("threads") or os.cpu_count() or 1)},
    )
    if done.returncode < 0:
        raise ShortwaveError(f"killed by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        raise ShortwaveError((done.stderr.strip().splitlines() or ["failed"])[-1])
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def _work(order: dict[str, Any]) -> Measurement:
    if order["cgroup"]:
        Path(order["cgroup"], "cgroup.procs").write_text(str(os.getpid()))
    import torch

    from ssl_core.planning.step_plan import Plan

    plan = Plan(**order["plan"])
    if plan.threads:
        torch.set_num_threads(plan.threads)
    prepare = _finetuning if order["task"] else _pretraining
    begin = prepare(order, plan)
    imports = resident_bytes()
    reset_peak()
    seconds = 0.0
    with _sampled(order["sample"]) as footprint:
        update = begin()
        for number in range(order["updates"]):
            start = time.perf_counter()
            applied = update(number)
            seconds = time.perf_counter() - start
            if not applied:
                raise ShortwaveError(f"update {number} had a gradient that is not finite")
    return Measurement(imports, peak_bytes(), seconds, footprint)


@contextlib.contextmanager
def _sampled(interval: float) -> Iterator[list[tuple[float, int]]]:
    """Collect what is resident, every so many seconds; nothing for 0."""
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


def _pretraining(order: dict[str, Any], plan: "Plan") -> Callable[[], Update]:
    """Import what a step takes; what makes it."""
    from ssl_core.training.overrides import resolve
    from ssl_core.training.pretraining_step import TrainingStep
    from ssl_core.wav2vec2.model import PretrainingModel

    def begin() -> Update:
        config, recipe = resolve(order["model"], order["settings"])
        model, total = PretrainingModel(config), order["updates"]
        step = TrainingStep(model, recipe, plan, seed=0, total_updates=total)
        batches = _speech(order["data"], plan) if order["data"] else _noise(plan)
        return lambda number: step.update(batches(number), number).applied

    return begin


def _finetuning(order: dict[str, Any], plan: "Plan") -> Callable[[], Update]:
    """Import what a step takes; what makes it."""
    import torch

    from ssl_core.downstream import task_work
    from ssl_core.training.overrides import resolve

    def begin() -> Update:
        config, _ = resolve(order["model"], order["settings"])
        work = task_work.task_work(
            order["task"], unfrozen=order["unfrozen"], cached=order["cached"]
        )
        step = task_work.make_step(task_work.make_model(config, work), work, plan)
        rates = task_work.rates(work)
        if work.cached:
            task_work.compute_features(step, torch.randn)

        def update(number: int) -> bool:
            batch = task_work.make_batch(step, work, torch.randn)
            return step.update(batch, number, rates).applied

        return update

    return begin


def _noise(plan: "Plan") -> Batches:
    import numpy as np

    rng = np.random.default_rng(0)
    shape = (plan.batch, plan.samples)
    return lambda number: (
        rng.standard_normal(shape, dtype=np.float32) for _ in range(plan.accumulation)
    )


def _speech(data: str, plan: "Plan") -> Batches:
    from partitions.prepared import prepare
    from ssl_core.training.crops import Crops

    root = Path(data)
    manifest = prepare(root, (), plan.length)
    crops = Crops(manifest, range(len(manifest.sequences)), plan.samples, 0)

    def batches(number: int) -> Iterator["Waveforms"]:
        ((_, read),) = crops.updates([number], plan.batch, plan.accumulation)
        return (batch.waveforms for batch in read)

    return batches


if __name__ == "__main__":
    print(json.dumps(_work(json.loads(sys.argv[1]))._asdict()))
