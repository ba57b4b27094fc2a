"""A pretraining step here, in transformers and in SpeechBrain: time, memory, gradients.

`python -m benchmarks.step --length 5s --batch 4 --precision fp32` lets the three take steps in
turn, on the same crops and threads, each in a process of its own so that peak resident memory is
its own. The last line is one JSON object. `--grid` measures the fastest and the leanest exact plan
over lengths and batches instead.

All have the architecture and dropout rates of the preset, but no layerdrop, which skips random
layers of a step and so would make some steps shorter by chance.
"""

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import PositiveInt

from benchmarks.contest import (
    WARM_UP,
    compare,
    others_fraction,
    ratio,
    rounded,
    single,
    write_batches,
    write_source,
)
from benchmarks.step_grid import run_grid
from benchmarks.workers import OURS, ROOT, Job, PlanName
from common import command, strict_json
from common.options import settings_parser
from common.settings import parse
from common.units import Seconds

FIGURE = ROOT / "benchmarks" / "figures" / "step-grid.png"
CORES = PositiveInt(len(os.sched_getaffinity(0)))
PARITY_LENGTH, PARITY_BATCH = 5.0, 2
"""Longest crops, in seconds, and most crops for which gradients are compared."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonSettings:
    """What to measure."""

    length: Seconds = Seconds(5)
    """Length of every crop."""
    batch: PositiveInt = PositiveInt(4)
    """Crops in a batch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of products, for all contestants."""
    threads: PositiveInt = CORES
    """CPU threads of each contestant."""
    steps: PositiveInt = PositiveInt(7)
    """Timed steps of each contestant."""
    model: Literal["base", "tiny"] = "base"
    """Preset of the architecture."""
    peers: tuple[Literal["transformers", "speechbrain"], ...] = ("transformers", "speechbrain")
    """Other contestants, separated by commas."""
    plan: PlanName = "fastest"
    """Plan of our step."""
    data: Path | None = None
    """Corpus in LibriSpeech's layout to cut crops from; without it, noise."""
    seed: int = 0
    """Seed of the crops."""
    grid: bool = False
    """Measure our fastest and leanest plans over lengths and batches."""
    figure: Path = FIGURE
    """PNG of the grid to draw."""


def run_comparison(
    job: Job, peers: Sequence[str], steps: int, data: Path | None, seed: int
) -> dict[str, Any]:
    """Measure all contestants at one length and batch.

    Args:
        job: of our step.
        peers: other contestants.
        steps: timed steps of each.
        data: corpus in LibriSpeech's layout to cut crops from; None is noise.
        seed: of the crops.

    Returns:
        The result that is printed.
    """
    jobs = [job, *(dataclasses.replace(job, name=peer) for peer in peers)]
    if job.precision == "bf16" and "transformers" in peers:
        jobs.append(dataclasses.replace(job, name="transformers_fp32", precision="fp32"))
    gemm = dataclasses.replace(job, name="gemm")
    rates = [single(gemm)]
    workers = compare(jobs, write_batches(job, WARM_UP + steps, data, seed))
    rates.append(single(gemm))
    parity, no_parity = single(
        dataclasses.replace(
            job,
            name="parity",
            precision="fp32",
            length=min(job.length, PARITY_LENGTH),
            batch=min(job.batch, PARITY_BATCH),
        )
    )
    flops, no_flops = single(dataclasses.replace(job, name="flops"))
    peak_rate = max((rate for rate, _ in rates if rate), default=None)
    seconds = {name: worker.median() for name, worker in workers.items()}
    peaks = {name: worker.peak() for name, worker in workers.items()}
    above = {name: worker.peak_above_imports() for name, worker in workers.items()}
    at_peak = None if flops is None or peak_rate is None else flops / peak_rate / 1e9
    failures = {name: worker.failure for name, worker in workers.items()}
    failures |= {"parity": no_parity, "flops": no_flops, "gemm": rates[0][1]}
    return {
        **{name: getattr(job, name) for name in ("model", "length", "batch", "precision")},
        "threads": job.threads,
        "plan": job.plan,
        "steps": steps,
        "seconds": {name: rounded(value, 4) for name, value in seconds.items()},
        **{
            f"speedup_vs_{name}": ratio(seconds[name], seconds[OURS])
            for name in workers
            if name != OURS
        },
        "peak_mib": {name: rounded(value) for name, value in peaks.items()},
        "peak_above_imports_mib": {name: rounded(value) for name, value in above.items()},
        "peak_ratio_vs_transformers": ratio(peaks[OURS], peaks.get("transformers")),
        "peak_above_imports_ratio_vs_transformers": ratio(above[OURS], above.get("transformers")),
        "max_relative_gradient_error": None if parity is None else float(f"{parity:.3g}"),
        "step_gflop": ratio(flops, 1e9),
        "gemm_peak_gflops": rounded(peak_rate, 1),
        "gemm_peak_fraction": ratio(at_peak, seconds[OURS]),
        "others_cpu_fraction": round(others_fraction(workers.values()), 3),
        "failures": {name: reason for name, reason in failures.items() if reason},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = settings_parser(
        ComparisonSettings, prog="python -m benchmarks.step", description=__doc__
    )
    settings, _ = parse(ComparisonSettings, parser, arguments)
    with tempfile.TemporaryDirectory(prefix="step-") as folder:
        job = Job(
            name=OURS,
            model=settings.model,
            length=float(settings.length),
            batch=settings.batch,
            precision=settings.precision,
            plan=settings.plan,
            threads=settings.threads,
            folder=folder,
        )
        write_source(job)
        if settings.grid:
            result = run_grid(job, settings.data, settings.seed, settings.figure)
        else:
            result = run_comparison(
                job, settings.peers, settings.steps, settings.data, settings.seed
            )
    print(strict_json.dumps(result))
    return 0


if __name__ == "__main__":
    command.run(main)
