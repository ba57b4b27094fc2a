"""Lets workers on one GPU warm up side by side, and then measure one at a time.

Compiling takes a minute and a measurement a second, so all that fit in the GPU's memory together
warm up together: a wave. When no worker of a wave is warming up any more, each gets its turn, alone
on the GPU, and ends. A deadline holds for everything; what it cuts off has the reason for a result.
"""

import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu_jobs import CHECKS, GpuJob
from benchmarks.workers import ROOT

FIXED = 3.0
"""GiB of weights, gradients, optimizer state, CUDA's own and libraries' memory in a process."""
RATES = {
    "graph": 0.035,
    "eager": 0.03,
    "plain": 0.035,
    "transformers_compiled": 0.065,
    "transformers_eager": 0.086,
}
"""GiB for each second of audio in an update, from peaks on an H200 (base, bf16): what fits side by
side."""
CHECKS_GIB = 12.0
USABLE = 0.92
"""Fraction of a GPU's memory that is given away."""
TURN = 5.0
"""Seconds that are kept for each worker's turn while it warms up, though at most half of all."""
Reply = dict[str, Any]


class GpuWorker:
    """A child process that does a job, and its replies."""

    def __init__(self, job: GpuJob, replies: "queue.Queue[GpuWorker]", threads: int) -> None:
        """Start the process.

        Args:
            job: what it does.
            replies: where the worker is put after each of its replies, and when it ends.
            threads: of its CPU.
        """
        self.job = job
        self.warm = self.ended = False
        self.warm_up: Reply = {}
        self.measured: Reply | None = None
        self.findings: list[Reply] = []
        self.failure: str | None = None
        quiet = {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": str(threads),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_worker", json.dumps(dataclasses.asdict(job))],
            cwd=ROOT,
            env=os.environ | quiet,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._replies = replies
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            reply = json.loads(line)
            if "finding" in reply:
                self.findings.append(reply["finding"])
            if "measured" in reply:
                self.measured = reply["measured"]
            if "warm" in reply:
                self.warm, self.warm_up = True, reply["warm"]
            self.failure = reply.get("failure", self.failure)
            self._replies.put(self)
        code = self.process.wait()
        if code and self.failure is None:
            self.failure = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
        self.ended = True
        self._replies.put(self)

    @property
    def answered(self) -> bool:
        """Whether its measurement is there, or will never be."""
        return self.ended or self.measured is not None

    def turn(self) -> None:
        """Let the worker measure."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, which its replies say

    def close(self, reason: str | None = None) -> None:
        """End the process; `reason` says why, if it has no result yet."""
        if reason is not None and self.failure is None and not self.ended:
            self.failure = reason
        if self.process.poll() is None:
            os.killpg(
                self.process.pid, signal.SIGKILL
            )  # compilers too; it leads a group of its own
        self.process.wait()


def needed_gib(job: GpuJob) -> float:
    """GiB of a GPU that a worker may take."""
    if job.variant == CHECKS:
        return CHECKS_GIB
    return FIXED + RATES[job.variant] * job.cell.seconds


def next_wave(jobs: Sequence[GpuJob], usable_gib: float, most: int) -> list[GpuJob]:
    """The jobs that warm up next: those that fit together, in order; all but `most` wait.

    Args:
        jobs: not started yet, the most important first.
        usable_gib: of the GPU's memory.
        most: workers at a time.
    """
    wave: list[GpuJob] = []
    left = usable_gib
    for job in jobs:
        if len(wave) < most and needed_gib(job) <= left:
            wave.append(job)
            left -= needed_gib(job)
    return wave


class Turns:
    """Runs jobs in waves until a deadline."""

    def __init__(
        self, budget: float, usable_gib: float, most: int, show: Callable[[str], None]
    ) -> None:
        """Start the clock.

        Args:
            budget: seconds for everything.
            usable_gib: of the GPU's memory.
            most: workers at a time.
            show: is told what happens.
        """
        self.budget, self.start = budget, time.monotonic()
        self.usable_gib, self.most, self.show = usable_gib, most, show
        self.workers: list[GpuWorker] = []
        self.not_run: dict[GpuJob, str] = {}
        self._replies: queue.Queue[GpuWorker] = queue.Queue()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def run(self, jobs: Sequence[GpuJob]) -> None:
        """Run jobs, the most important first."""
        left = list(jobs)
        for job in jobs:
            if needed_gib(job) > self.usable_gib:
                left.remove(job)
                self.not_run[job] = (
                    f"it may take {needed_gib(job):.0f} GiB of the GPU's memory, of which "
                    f"{self.usable_gib:.0f} can be used"
                )
        while left and self.spent + TURN < self.budget:
            wave = next_wave(left, self.usable_gib, self.most)
            left = [job for job in left if job not in wave]
            self._run_wave(wave)
        for job in left:
            self.not_run[job] = f"the budget of {self.budget:.0f} s was used up before"

    def _run_wave(self, wave: Sequence[GpuJob]) -> None:
        threads = max(1, (os.cpu_count() or 1) // 4)
        self.show(f"{self.spent:4.0f} s  warming up {', '.join(job.name for job in wave)}")
        own = [GpuWorker(job, self._replies, threads) for job in wave]
        self.workers += own
        try:
            kept = min(TURN * len(own), (self.budget - self.spent) / 2)
            until = self.budget - kept
            self._wait(lambda: all(w.warm or w.ended for w in own), until)
            for worker in own:
                if not worker.warm:
                    worker.close(f"not warm within the budget of {self.budget:.0f} s")
            for worker in own:
                if worker.warm and worker.job.variant != CHECKS:
                    self.show(f"{self.spent:4.0f} s  measuring {worker.job.name}")
                    worker.turn()
                    self._wait(lambda worker=worker: worker.answered, self.budget)  # type: ignore[misc]
                    cut = f"cut off by the budget of {self.budget:.0f} s"
                    worker.close(None if worker.answered else cut)
        finally:
            for worker in own:
                worker.close()

    def _wait(self, done: Callable[[], bool], until: float) -> None:
        """Wait until something is done, or until so many seconds after the start."""
        while not done() and self.spent < until:
            try:
                self._replies.get(timeout=max(0.01, min(1.0, until - self.spent)))
            except queue.Empty:
                continue
