"""Takes the steps to be measured, in a process of its own: `python -m benchmarks.workers JOB`.

The parent is `benchmarks.contest`; they exchange lines of JSON. Imports count in resident memory,
so modules that only some contestants need are imported where they are used.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import psutil
import torch

from partitions.sampling import SAMPLE_RATE
from ssl_core.planning.decision import as_planned
from ssl_core.planning.process_memory import peak_bytes, reset_peak, resident_bytes
from ssl_core.planning.step_plan import Plan, Precision
from ssl_core.training.pretraining_recipe import RECIPES, Recipe
from ssl_core.training.pretraining_work import PretrainingWork
from ssl_core.wav2vec2.config import ModelConfig, preset

Waveforms = npt.NDArray[np.float32]

ROOT = Path(__file__).parents[1]
OURS = "shortwave"
PlanName = Literal["fastest", "compiled", "leanest", "default"]
GEMM_SHAPES = ((1024,) * 3, (2048,) * 3, (4096,) * 3, (4096, 768, 3072), (8192, 512, 1536))
"""Rows, inner size and columns; the last two occur in a transformer layer and a convolution of
`base`."""


def noise(rng: np.random.Generator, crops: int, samples: int) -> Waveforms:
    """White noise of unit variance, `[crop, sample]`.

    Args:
        rng: generator.
        crops: how many.
        samples: in each crop.
    """
    return rng.standard_normal((crops, samples), dtype=np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker does."""

    name: str
    """A contestant whose steps it takes, or one of `SINGLE`."""
    model: str
    length: float
    """Seconds."""
    batch: int
    precision: Precision
    plan: PlanName
    threads: int
    folder: str
    """Has a `config.json` for the peers."""

    def config(self, **changes: Any) -> ModelConfig:
        """The preset without layerdrop, with `changes`."""
        return dataclasses.replace(preset(self.model), **{"layerdrop": 0.0, **changes})

    def chosen_plan(self) -> Plan:
        """The plan of our step."""
        plan = Plan(
            length=self.length, batch=self.batch, precision=self.precision, threads=self.threads
        )
        recipe = dataclasses.replace(RECIPES[self.model], clip_norm=0.0)
        work = PretrainingWork(architecture=preset(self.model), recipe=recipe)
        plan = as_planned("fastest" if self.plan == "compiled" else self.plan, work, plan)
        return dataclasses.replace(plan, compile=self.plan == "compiled")


def _build(job: Job) -> Callable[[], Callable[[Waveforms], None]]:
    """Import what a contestant needs; the result builds its model and returns its step."""
    if job.name != OURS:
        from benchmarks import peers

        peer = job.name.split("_")[0]
        build = peers.import_speechbrain() if peer == "speechbrain" else peers.transformers_step
        return lambda: build(Path(job.folder), job.precision)
    from ssl_core.training.pretraining_step import PretrainingStep
    from ssl_core.wav2vec2.model import PretrainingModel

    def ours() -> Callable[[Waveforms], None]:
        model = PretrainingModel(job.config())
        taken = PretrainingStep(
            model, RECIPES[job.model], job.chosen_plan(), seed=0, total_updates=400_000
        )
        numbers = iter(range(400_000))

        def step(waveforms: Waveforms) -> None:
            report = taken.update([waveforms], next(numbers))
            assert report.applied, "the gradient was not finite"

        return step

    return ours


def busy_seconds() -> float:
    """CPU seconds used by this machine's processes and by its host, over all cores."""
    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "steal"))


def _contest(job: Job) -> Iterator[dict[str, Any]]:
    """Take a step for each line on stdin, which names a file of waveforms `[batch, sample]`."""
    build = _build(job)
    weights = torch.ones(256, 256, requires_grad=True)
    (weights @ weights).sum().backward()
    imports = resident_bytes() / 2**20
    step = build()
    reset_peak()
    yield {"imports_mib": imports}
    for line in sys.stdin:
        waveforms = np.load(json.loads(line))
        start, own, everyone = time.perf_counter(), time.process_time(), busy_seconds()
        step(waveforms)
        seconds = time.perf_counter() - start
        others = busy_seconds() - everyone - (time.process_time() - own)
        fraction = max(0.0, others) / (seconds * psutil.cpu_count())
        yield {"seconds": seconds, "others_fraction": fraction, "peak_mib": peak_bytes() / 2**20}


def _gemm_gflops(job: Job) -> float:
    """The best rate of large matrix products, with weights laid out as in a linear layer."""
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
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


def _flops(job: Job) -> float:
    from benchmarks.peers import plain_flops

    return plain_flops(job.config(), job.batch, round(job.length * SAMPLE_RATE))


def _gradient_error(job: Job) -> float:
    """The largest relative error of a parameter's gradient against transformers, in fp32.

    Taken with the job's plan, without dropout. Gradients that are zero but for rounding, such as
    that of `k_proj.bias`, are skipped.
    """
    from benchmarks import peers
    from ssl_core.training.pretraining_loss import Weights
    from ssl_core.training.pretraining_step import PretrainingStep
    from ssl_core.wav2vec2.chance import draw
    from ssl_core.wav2vec2.model import PretrainingModel

    torch.manual_seed(1)
    config, plan = job.config(**peers.NO_CHANCE), job.chosen_plan()
    model, rng = PretrainingModel(config), np.random.default_rng(2)
    waveforms = torch.from_numpy(noise(rng, plan.batch, plan.samples))
    draws = draw(config, plan.batch, plan.samples, rng)
    temperature = 1.7
    weights = Weights(config.diversity_loss_weight, 0.0, temperature)
    theirs = peers.transformers_backward(model, waveforms, draws, temperature).gradients
    recipe = Recipe(feature_grad_scale=1.0, feature_penalty_weight=0.0)
    step = PretrainingStep(model, recipe, plan, seed=0, total_updates=1)
    step.accumulate(waveforms, draws, weights, 1)
    ours = peers.gradients(model)
    return max(
        peers.relative(ours[name], value) for name, value in theirs.items() if value.norm() > 1e-6
    )


SINGLE: dict[str, Callable[[Job], float]] = {
    "gemm": _gemm_gflops,
    "flops": _flops,
    "parity": _gradient_error,
}


def work(job: Job) -> None:
    """Do a job, and reply in lines of JSON on stdout."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # Keep what libraries print out of the replies.
    torch.set_num_threads(job.threads)
    try:
        if job.name in SINGLE:
            replies.write(json.dumps({"value": SINGLE[job.name](job)}) + "\n")
        else:
            for reply in _contest(job):
                replies.write(json.dumps(reply) + "\n")
    except Exception as error:
        text = str(error).strip().split("\n")[0]
        replies.write(json.dumps({"failure": f"{type(error).__name__}: {text}"}) + "\n")


if __name__ == "__main__":
    work(Job(**json.loads(sys.argv[1])))
