"""Lets processes take training steps in turn, and collects what they measure."""

import contextlib
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workers import OURS, ROOT, Job, noise
from common.process_environment import tuned
from common.progress import track
from common.units import format_length
from partitions.prepared import prepare
from partitions.sampling import SAMPLE_RATE
from ssl_core.training.crops import Crops

WARM_UP = 2
"""Steps that are not timed: they touch memory for the first time and compile code."""
OTHERS_FRACTION = 0.1
"""Fraction of CPU time used by other processes above which times are doubtful."""


class Worker:
    """A child process that does a job, and what it has measured."""

    def __init__(self, job: Job) -> None:
        """Start the process."""
        self.job = job
        self.seconds: list[float] = []
        self.others_fraction: list[float] = []
        """Fraction of the machine's CPU time that other processes used, for each timed step."""
        self.imports_mib = self.peak_mib = 0.0
        self.failure: str | None = None
        quiet = {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "SB_LOG_LEVEL": "ERROR",
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": str(job.threads),
        }
        words = [sys.executable, "-m", "benchmarks.workers"]
        self.process = subprocess.Popen(
            [*words, json.dumps(dataclasses.asdict(job))],
            cwd=ROOT,
            env=(tuned(os.environ) if job.name == OURS else os.environ) | quiet,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ask(self, path: Path | None = None) -> dict[str, Any]:
        """Ask for a step on a file, or wait for the first reply; the reply, empty after a failure.

        Args:
            path: of waveforms `[batch, sample]`; None only waits.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if path is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps(str(path)) + "\n")
                self.process.stdin.flush()
        line = self.process.stdout.readline()
        reply = json.loads(line) if line else {}
        self.failure = reply.get("failure")
        if not line:
            code = self.process.wait()
            # SIGKILL: the kernel, when memory ran out.
            self.failure = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
        return {} if self.failure else reply

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()

    def median(self) -> float | None:
        """Median seconds of a step; None after a failure."""
        return None if self.failure else statistics.median(self.seconds)

    def peak(self) -> float | None:
        """Peak resident MiB over all steps; None after a failure."""
        return None if self.failure else self.peak_mib

    def peak_above_imports(self) -> float | None:
        """Peak resident MiB over all steps, minus imports; None after a failure."""
        return None if self.failure else self.peak_mib - self.imports_mib


def compare(
    jobs: Sequence[Job],
    batches: Sequence[Path],
    warm_up: int = WARM_UP,
    enough: float = float("inf"),
    show: bool = True,
) -> dict[str, Worker]:
    """Let workers take steps in turn: each takes one on the first batch, then on the second, ...

    Args:
        jobs: one for each worker.
        batches: a file of waveforms `[batch, sample]` for each step.
        warm_up: first steps, which count in the peak and are not timed.
        enough: stop after a timed step that takes longer than this many seconds.
        show: whether to show progress.
    """
    workers = {}
    try:
        for job in jobs:
            worker = workers[job.name] = Worker(job)
            worker.imports_mib = worker.ask().get("imports_mib", 0.0)
        text = f"{format_length(jobs[0].length)} x {jobs[0].batch}"
        for number, path in enumerate(track(batches, len(batches), text, show)):
            for worker in workers.values():
                reply = {} if worker.failure else worker.ask(path)
                worker.peak_mib = reply.get("peak_mib", worker.peak_mib)
                if reply and number >= warm_up:
                    worker.seconds.append(reply["seconds"])
                    worker.others_fraction.append(reply["others_fraction"])
            if max((s for w in workers.values() for s in w.seconds), default=0.0) > enough:
                break
    finally:
        for worker in workers.values():
            worker.close()
    fraction = others_fraction(workers.values())
    if fraction > OTHERS_FRACTION:
        print(
            f"warning: other processes used {fraction:.0%} of the CPU; threads that wait for one "
            "another are then many times slower, and these times mean nothing",
            file=sys.stderr,
        )
    return workers


def others_fraction(workers: Iterable[Worker]) -> float:
    """Fraction of the machine's CPU time that other processes used in the timed steps."""
    return float(np.mean([fraction for w in workers for fraction in w.others_fraction] or [0.0]))


def single(job: Job) -> tuple[float | None, str | None]:
    """Run one of the jobs that return a number; the number, or why there is none."""
    worker = Worker(job)
    try:
        value = worker.ask().get("value")
    finally:
        worker.close()
    return value, worker.failure


def write_source(job: Job) -> None:
    """Write the folder that the peers load like a checkpoint of the hub; all train from scratch."""
    folder = Path(job.folder)
    (folder / "config.json").write_text(json.dumps(job.config().to_hf()), encoding="utf-8")
    # SpeechBrain requires this file, but builds the model to pretrain from the config alone.
    (folder / "model.safetensors").touch()


def write_batches(job: Job, steps: int, data: Path | None, seed: int) -> list[Path]:
    """Write a file of waveforms `[batch, sample]` for each step.

    Args:
        job: its length, batch and folder.
        steps: how many files.
        data: corpus in LibriSpeech's layout to cut crops from; None is noise.
        seed: of the crops.
    """
    count, samples = steps * job.batch, round(job.length * SAMPLE_RATE)
    if data is None:
        crops = noise(np.random.default_rng(seed), count, samples)
    else:
        manifest = prepare(data.absolute(), length=job.length)
        everything = range(len(manifest.sequences))
        crops = Crops(manifest, everything, samples, seed).batch(0, count).waveforms
    paths = [Path(job.folder) / f"{number}.npy" for number in range(steps)]
    for number, path in enumerate(paths):
        np.save(path, crops[number * job.batch : (number + 1) * job.batch])
    return paths


def ratio(a: float | None, b: float | None) -> float | None:
    """`a / b`, rounded; None if either is missing."""
    return None if a is None or not b else round(a / b, 3)


def rounded(value: float | None, digits: int | None = None) -> float | None:
    """A rounded value; None stays None."""
    return None if value is None else round(value, digits)
