"""Warms up, waits for its turn and takes timed updates: `python -m benchmarks.gpu_worker JOB`.

The parent is `gpu_turns`. Each reply is a line of JSON on stdout; a line on stdin is the turn. Once
warm, a worker leaves the GPU alone until then.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_jobs import (
    CHECKS,
    OURS,
    Cell,
    GpuJob,
    PeakMemory,
    gemm_tflops,
    launches,
    seconds_of,
    spread,
    synchronise,
)
from ssl_core.training.step_runner import Taken
from ssl_core.wav2vec2 import device_kernels

Reply = dict[str, Any]
WARM_UP = 4
"""Updates: the first launches kernels one by one, the second is captured, then it is replayed."""
ROUNDS, ENOUGH = 5, 3.0
"""Most rounds of timed updates, and seconds after which no further one begins. The project's have
one time each, for all their updates, so it takes at least two."""
PEER_DRAWS = 3
"""Batches of transformers, with masks and negatives drawn beforehand."""


class Contestant(NamedTuple):
    """A step to be measured."""

    update: Callable[[], object]
    """Takes one update and waits for its result."""
    round: Callable[[int], list[float]]
    """Takes updates; returns seconds an update, of each or of all."""
    held: PeakMemory


def measure(job: GpuJob) -> Iterator[Reply]:
    """Warm up and reply; then, in turn, measure and reply."""
    start = time.perf_counter()
    made = _project(job) if job.variant in OURS else _transformers(job)
    for _ in range(WARM_UP if job.variant in OURS else 2 * PEER_DRAWS):
        made.update()
    synchronise(job.device)
    warm_up = time.perf_counter() - start
    captured = made.held.allocated() if job.variant in OURS else None
    made.held.restart()
    yield {"warm_up_s": warm_up}
    rounds: list[float] = []
    begun = time.perf_counter()
    ours = job.variant in OURS
    for number in range(ROUNDS):
        if number < (2 if ours else 1) or time.perf_counter() - begun < ENOUGH:
            rounds += made.round(job.steps)
    # Those of transformers are latencies anyway.
    latencies = rounds
    if ours:
        latencies = [seconds_of(made.update, job.device) for _ in range(job.steps)]
    allocated, reserved = made.held.allocated(), made.held.reserved()
    if allocated is not None and captured is not None:
        # What a graph uses counts as allocated while it is captured, not when it is replayed.
        allocated = max(allocated, captured)
    yield {
        "ms": spread(rounds),
        "latency_ms": spread(latencies),
        "timed_updates": len(rounds),
        "peak_gib": allocated,
        "reserved_gib": reserved,
        "gemm_tflops": gemm_tflops(job.device, 256 if job.dry else 8192),
        "launches": _launches(made.update, job.device),
    }


def _launches(update: Callable[[], object], device: str) -> dict[str, int] | None:
    """See `launches`; None too where the profiler may not count, as in some containers."""
    try:
        found = launches(update, device)
    except RuntimeError as error:
        print(f"launches were not counted: {error}", file=sys.stderr)
        return None
    return found if found and found["kernels"] else None


def _project(job: GpuJob) -> Contestant:
    """The project's step, with its own draws and copies, as a run takes it."""
    forced = job.variant == "plain" or job.dry
    device_kernels.force("plain" if forced else None)
    kernels = "plain" if forced else "auto"
    held = PeakMemory(job.device)
    plan = job.plan(job.cell, graph=job.variant != "eager", kernels=kernels)
    step = job.step(job.config(), plan)
    batches, taken = job.batches(job.cell), iter(range(10**6))

    def take() -> Taken:
        number = next(taken)
        return step.take([batches[number % len(batches)]], number)

    def update() -> None:
        report = take().report()
        assert report.applied, "the gradient was not finite"

    def several(steps: int) -> list[float]:
        def work() -> None:
            before: Taken | None = None
            for _ in range(steps):
                now = take()
                if before is not None:
                    before.report()
                before = now

        return [seconds_of(work, job.device) / steps]

    return Contestant(update, several, held)


def _transformers(job: GpuJob) -> Contestant:
    """The step of transformers at its best: SDPA, autocast, draws made beforehand, fused AdamW."""
    from transformers import Wav2Vec2ForPreTraining
    from transformers.models.wav2vec2.modeling_wav2vec2 import (
        _compute_mask_indices,
        _sample_negative_indices,
    )

    from benchmarks.peers import RATE, hf_config

    config = hf_config(job.config(), attn_implementation="sdpa")
    torch.manual_seed(0)
    model = Wav2Vec2ForPreTraining(config).train().to(job.device)
    betas = (0.9, 0.98)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=betas, eps=1e-6, fused=True)
    # Dynamo takes as long on a CPU as all of a dry run.
    compiled = job.variant == "transformers_compiled" and not job.dry
    call: Callable[..., Any] = torch.compile(model) if compiled else model
    drawn = []
    for batch in job.batches(job.cell)[:PEER_DRAWS]:
        shape = len(batch), int(model._get_feat_extract_output_lengths(batch.shape[1]))
        masks = _compute_mask_indices(
            shape,
            config.mask_time_prob,
            config.mask_time_length,
            min_masks=config.mask_time_min_masks,
        )
        negatives = _sample_negative_indices(shape, config.num_negatives, mask_time_indices=masks)
        tensors = (
            torch.from_numpy(batch),
            torch.tensor(masks, dtype=torch.long),
            torch.tensor(negatives, dtype=torch.long),
        )
        drawn.append(([x.to(job.device) for x in tensors], int(masks.sum())))
    taken = iter(range(10**6))

    def update() -> None:
        (waveforms, masks, negatives), masked = drawn[next(taken) % len(drawn)]
        with torch.autocast(job.device, torch.bfloat16):
            loss = call(waveforms, mask_time_indices=masks, sampled_negative_indices=negatives).loss
        (loss / masked).backward()
        optimizer.step()
        optimizer.zero_grad()

    def several(steps: int) -> list[float]:
        return [seconds_of(update, job.device) for _ in range(steps)]

    return Contestant(update, several, PeakMemory(job.device))


def work(job: GpuJob) -> None:
    """Do a job, and reply in lines of JSON on stdout."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # Keep what libraries print out of the replies.
    if job.dry:
        torch.set_num_threads(1)
    try:
        if job.variant == CHECKS:
            from benchmarks.gpu_checks import check

            for finding in check(job):
                replies.write(json.dumps({"finding": finding}) + "\n")
            replies.write(json.dumps({"warm": {}}) + "\n")
            return
        steps = measure(job)
        replies.write(json.dumps({"warm": next(steps)}) + "\n")
        if sys.stdin.readline():
            replies.write(json.dumps({"measured": next(steps)}) + "\n")
    except Exception as error:
        text = str(error).strip().split("\n")[0][:300]
        replies.write(json.dumps({"failure": f"{type(error).__name__}: {text}"}) + "\n")


def parse_job(text: str) -> GpuJob:
    """A job from JSON."""
    values = json.loads(text)
    return GpuJob(**{**values, "cells": tuple(Cell(*cell) for cell in values["cells"])})


if __name__ == "__main__":
    work(parse_job(sys.argv[1]))
