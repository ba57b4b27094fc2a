"""Takes steps under the allocator of its process: `python -m benchmarks.allocator_worker JOB`.

The parent is `benchmarks.allocators`; they exchange lines of JSON.
"""

import dataclasses
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Literal

import numpy as np
import psutil
import torch

from benchmarks import finetune_worker
from benchmarks.workers import busy_seconds, noise
from partitions.sampling import SAMPLE_RATE
from ssl_core.downstream.task_recipe import recipe_of
from ssl_core.planning import allocator
from ssl_core.planning.decision import as_planned
from ssl_core.planning.process_memory import peak_bytes, reset_peak
from ssl_core.planning.step_plan import Plan
from ssl_core.training.pretraining_recipe import RECIPES
from ssl_core.training.pretraining_step import PretrainingStep
from ssl_core.training.pretraining_work import PretrainingWork
from ssl_core.wav2vec2.config import preset
from ssl_core.wav2vec2.model import PretrainingModel

Turn = Callable[[int], list[float]]
"""Takes the steps of a turn by its number; returns the seconds of each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker does."""

    model: str
    precision: Literal["fp32", "bf16"]
    threads: int
    length: float = 0.0
    """Seconds of a crop; 0 fine-tunes the task of `benchmarks.finetune`, unfrozen."""
    batch: int = 0
    """Crops in a step, or training clips in an epoch."""
    untouched: bool = False
    """Leave glibc's settings alone and return no freed memory."""
    data: str = ""
    """Folder of EmoDB, for fine-tuning."""
    checkpoint: str = ""
    """Directory of the backbone, for fine-tuning."""


def _pretraining(job: Job) -> Turn:
    """A turn is one step on crops of noise."""
    config = dataclasses.replace(preset(job.model), layerdrop=0.0)
    recipe = dataclasses.replace(RECIPES[job.model], clip_norm=0.0)
    plan = Plan(length=job.length, batch=job.batch, precision=job.precision, threads=job.threads)
    plan = as_planned("fastest", PretrainingWork(architecture=config, recipe=recipe), plan)
    step = PretrainingStep(PretrainingModel(config), recipe, plan, seed=0, total_updates=400_000)
    samples = round(job.length * SAMPLE_RATE)

    def turn(number: int) -> list[float]:
        waveforms = noise(np.random.default_rng(number), job.batch, samples)
        start = time.perf_counter()
        assert step.update([waveforms], number).applied, "the gradient was not finite"
        return [time.perf_counter() - start]

    return turn


def _fine_tuning(job: Job) -> Turn:
    """A turn is an epoch; the first one also caches the output of the frozen convolutions."""
    own = finetune_worker.Job(
        name=finetune_worker.OURS,
        checkpoint=job.checkpoint,
        data=job.data,
        unfrozen=True,
        clips=job.batch,
        precision=job.precision,
        keep_extracted=True,
        micro_batch=0,
    )
    recipe = recipe_of(finetune_worker.TASK)
    epoch = finetune_worker.ours(own, finetune_worker.read(own), recipe)
    return lambda number: epoch(number)[1]


def _usage() -> resource.struct_rusage:
    return resource.getrusage(resource.RUSAGE_SELF)


def serve(job: Job) -> None:
    """Take a turn for every line on stdin, which is its number, and reply in JSON on stdout."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # Keep what libraries print out of the replies.
    torch.set_num_threads(job.threads)
    if job.untouched:
        allocator.keep_freed_memory = lambda keep: False
    turn = _pretraining(job) if job.length else _fine_tuning(job)
    reset_peak()
    replies.write("{}\n")
    for line in sys.stdin:
        start, before, everyone = time.perf_counter(), _usage(), busy_seconds()
        seconds = turn(int(line))
        elapsed, used = time.perf_counter() - start, _usage()
        own = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
        others = max(0.0, busy_seconds() - everyone - own)
        reply = {
            "seconds": statistics.median(seconds),
            "kernel_seconds": (used.ru_stime - before.ru_stime) / len(seconds),
            "page_faults": (used.ru_minflt - before.ru_minflt) / len(seconds),
            "peak_mib": peak_bytes() / 2**20,
            "others_fraction": others / (elapsed * psutil.cpu_count()),
        }
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    serve(Job(**json.loads(sys.argv[1])))
