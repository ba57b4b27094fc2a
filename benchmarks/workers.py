"""Processes that take the steps to be measured, each in memory of its own.

A parent talks to `python -m benchmarks.workers TASK` by lines of JSON. An import counts in resident
memory: what only some contestants need is imported where it is used.
"""

import contextlib
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch

from common.process_environment import tuned
from partitions.sampling import SAMPLE_RATE
from ssl_core.planning.process_memory import peak_bytes, reset_peak, resident_bytes
from ssl_core.planning.step_plan import Plan, Precision
from ssl_core.profile import as_planned
from ssl_core.training.pretraining_recipe import RECIPES, Recipe
from ssl_core.wav2vec2.config import ModelConfig, preset

Waveforms = npt.NDArray[np.float32]

ROOT = Path(__file__).parents[1]
OURS = "shortwave"
PLANS = ("fastest", "compiled", "leanest", "default")
GEMM_SHAPES = ((1024,) * 3, (2048,) * 3, (4096,) * 3, (4096, 768, 3072), (8192, 512, 1536))
"""Rows, inner size and columns; the last two are of a transformer and a convolution of base."""


def noise(rng: np.random.Generator, crops: int, samples: int) -> Waveforms:
    """White noise of unit variance, `[crop, sample]`."""
    return rng.standard_normal((crops, samples), dtype=np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a worker does: take the steps of a contestant, or `gemm`, `flops` or `parity`."""

    name: str
    model: str
    length: float
    """Seconds."""
    batch: int
    precision: Precision
    plan: str
    threads: int
    folder: str
    """Holds `config.json` for the peers."""

    def config(self, **changes: Any) -> ModelConfig:
        """The preset without layerdrop."""
        return dataclasses.replace(preset(self.model), **{"layerdrop": 0.0, **changes})

    def chosen_plan(self) -> Plan:
        """The plan of our step."""
        plan = Plan(
            length=self.length, batch=self.batch, precision=self.precision, threads=self.threads
        )
        model = preset(self.model), dataclasses.replace(RECIPES[self.model], clip_norm=0.0)
        name = "fastest" if self.plan == "compiled" else self.plan
        plan = as_planned(name, model, plan)
        return dataclasses.replace(plan, compile=self.plan == "compiled")


def _build(task: Task) -> Callable[[], Callable[[Waveforms], None]]:
    """Import what a contestant needs; what is returned makes its model and returns its step."""
    if task.name != OURS:
        from benchmarks import peers

        peer = task.name.split("_")[0]
        build = peers.import_speechbrain() if peer == "speechbrain" else peers.transformers_step
        return lambda: build(Path(task.folder), task.precision)
    from ssl_core.training.pretraining_step import PretrainingStep
    from ssl_core.wav2vec2.model import PretrainingModel

    def ours() -> Callable[[Waveforms], None]:
        model = PretrainingModel(task.config())
        taken = PretrainingStep(
            model, RECIPES[task.model], task.chosen_plan(), seed=0, total_updates=400_000
        )
        numbers = iter(range(400_000))

        def step(waveforms: Waveforms) -> None:
            report = taken.update([waveforms], next(numbers))
            assert report.applied, "the gradient was not finite"

        return step

    return ours


def _busy_seconds() -> float:
    """CPU time that this machine's processes and its host have taken, over all cores."""
    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "steal"))


def _contest(task: Task) -> Iterator[dict[str, Any]]:
    """Take a step for each line on stdin, which names a file of waveforms."""
    build = _build(task)
    weights = torch.ones(256, 256, requires_grad=True)
    (weights @ weights).sum().backward()
    imports = resident_bytes() / 2**20
    step = build()
    reset_peak()
    yield {"imports_mib": imports}
    for line in sys.stdin:
        waveforms = np.load(json.loads(line))
        start, own, all_of_it = time.perf_counter(), time.process_time(), _busy_seconds()
        step(waveforms)
        seconds = time.perf_counter() - start
        others = _busy_seconds() - all_of_it - (time.process_time() - own)
        share = max(0.0, others) / (seconds * psutil.cpu_count())
        yield {"seconds": seconds, "others_share": share, "peak_mib": peak_bytes() / 2**20}


def _gemm_gflops(task: Task) -> float:
    """The best rate of large matrix products, weights laid out as in a linear layer."""
    dtype = torch.bfloat16 if task.precision == "bf16" else torch.float32
    best = 0.0
    for rows, inner, columns in GEMM_SHAPES:
        x = torch.randn(rows, inner).to(dtype)
        weight = torch.randn(columns, inner).to(dtype)
        out = torch.empty(rows, columns, dtype=dtype)
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(x, weight.t(), out=out)
            seconds = time.perf_counter() - start
            best = max(best, 2 * rows * inner * columns / seconds / 1e9)
    return best


def _flops(task: Task) -> float:
    from benchmarks.peers import plain_flops

    return plain_flops(task.config(), task.batch, round(task.length * SAMPLE_RATE))


def _gradient_error(task: Task) -> float:
    """The largest relative error of a parameter's gradient against transformers, in fp32.

    By the plan, without dropout. Gradients that are zero but for rounding, such as that of
    `k_proj.bias`, are left out.
    """
    from benchmarks import peers
    from ssl_core.training.pretraining_step import PretrainingStep, Weights
    from ssl_core.wav2vec2.model import PretrainingModel, draw

    torch.manual_seed(1)
    config, plan = task.config(**peers.NO_CHANCE), task.chosen_plan()
    model, rng = PretrainingModel(config), np.random.default_rng(2)
    waveforms = torch.from_numpy(noise(rng, plan.batch, plan.samples))
    draws = draw(config, plan.batch, plan.samples, rng)
    weights = Weights(config.diversity_loss_weight, 0.0, 1.7)
    theirs = peers.transformers_backward(model, waveforms, draws, weights.temperature).gradients
    recipe = Recipe(feature_grad_scale=1.0, feature_penalty_weight=0.0)
    step = PretrainingStep(model, recipe, plan, seed=0, total_updates=1)
    step.accumulate(waveforms, draws, weights, 1)
    ours = peers.gradients(model)
    return max(
        peers.relative(ours[name], value) for name, value in theirs.items() if value.norm() > 1e-6
    )


SINGLE: dict[str, Callable[[Task], float]] = {
    "gemm": _gemm_gflops,
    "flops": _flops,
    "parity": _gradient_error,
}


def work(task: Task) -> None:
    """Do a worker's task, answering in lines of JSON on stdout."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # What libraries print must not get between the answers.
    torch.set_num_threads(task.threads)
    try:
        if task.name in SINGLE:
            replies.write(json.dumps({"value": SINGLE[task.name](task)}) + "\n")
        else:
            for reply in _contest(task):
                replies.write(json.dumps(reply) + "\n")
    except Exception as error:
        text = str(error).strip().split("\n")[0]
        replies.write(json.dumps({"failure": f"{type(error).__name__}: {text}"}) + "\n")


class Worker:
    """A child process that does a task, and what it measured."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.seconds: list[float] = []
        self.others_share: list[float] = []
        """Of the machine's CPU time, in each step, taken by other processes."""
        self.imports_mib = self.peak_mib = 0.0
        self.failure: str | None = None
        quiet = {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "SB_LOG_LEVEL": "ERROR",
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": str(task.threads),
        }
        words = [sys.executable, "-m", "benchmarks.workers"]
        self.process = subprocess.Popen(
            [*words, json.dumps(dataclasses.asdict(task))],
            cwd=ROOT,
            env=(tuned(os.environ) if task.name == OURS else os.environ) | quiet,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ask(self, path: Path | None = None) -> dict[str, Any]:
        """Have a step taken, or wait for the first answer; empty when the worker is gone."""
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
        """Seconds of a step, or None for a worker that is gone."""
        return None if self.failure else statistics.median(self.seconds)

    def peak(self) -> float | None:
        """MiB resident at most over all steps."""
        return None if self.failure else self.peak_mib

    def peak_above_imports(self) -> float | None:
        """MiB resident at most over all steps, beyond what the imports take."""
        return None if self.failure else self.peak_mib - self.imports_mib


if __name__ == "__main__":
    work(Task(**json.loads(sys.argv[1])))
