"""The pretraining step on a GPU: time, memory, launches, gradients and bytes beside transformers.

`python -m benchmarks.gpu` measures `base` in bf16 on noise, cell by cell (length x batch): this
project's step by CUDA graph (the default), eager (plan `graph: false`) and with plain kernels, and
transformers' eager and compiled. The last line is one JSON object. What the time budget does not
allow is null there, with the reason. Without a GPU, `--dry-run` takes the same way on the CPU with
a small model, to see that the script works; its figures mean nothing.

An update of this project includes its draws and copies, and its report is read one update late,
as `PretrainingStep.take` allows. transformers has SDPA, autocast, fused AdamW, at least two spans
of masked frames, and draws made beforehand; its time is the least of all updates, ours the median.
"""

import dataclasses
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jsonargparse.typing import PositiveInt
from rich.table import Table

from benchmarks.gpu_jobs import CHECKS, GIB, OURS, PEERS, TOTAL_UPDATES, Cell, GpuJob
from benchmarks.gpu_plans import Plans
from benchmarks.gpu_turns import USABLE, GpuWorker, Turns
from common import command, strict_json
from common.atomic import write_text
from common.errors import UsageError
from common.options import settings_parser
from common.settings import parse
from common.tables import console_for
from common.units import Names, Seconds

PAPER_UPDATE = 1.6 * 3600
"""Seconds of audio in an update of the original base recipe, which the paper's run follows."""
CELLS, DRY_CELLS = "5sx12,15sx12,1sx96,15sx48", "0.5sx2"
DIGITS = 4
Variant = Literal[
    "graph", "transformers_compiled", "eager", "transformers_eager", "plain", "checks"
]
DRY_VARIANTS: tuple[Variant, ...] = ("graph", "transformers_eager", "checks")
"""One of each kind: to import torch takes longer than all else in a dry run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuSettings:
    """What to measure."""

    cells: Names = Names()
    """Lengths and batches, such as `5sx12`, the most important first. By default 5sx12, 15sx12,
    1sx96 and 15sx48, in a dry run 0.5sx2."""
    variants: tuple[Variant, ...] = ()
    """What to measure in each cell, separated by commas; `plain` in the first only. `checks` are
    what needs no clock: gradients, bytes and the leanest plan. By default everything, in a dry run
    `graph`, `transformers_eager` and `checks`."""
    steps: PositiveInt = PositiveInt(10)
    """Timed updates in a round, of which there are one to five."""
    budget: Seconds = Seconds(240)
    """Time for everything; what is left undone then is reported as not run."""
    output: Path | None = None
    """JSON file to write, besides the last line."""
    dry_run: bool = False
    """Run on the CPU with plain kernels and a small model. Figures mean nothing."""

    def chosen(self) -> list[Cell]:
        """The cells.

        Raises:
            UsageError: one is not a length and a batch.
        """
        default = DRY_CELLS if self.dry_run else CELLS
        return [parse_cell(text) for text in self.cells or Names.parse(default)]


def parse_cell(text: str) -> Cell:
    """A cell from `5sx12`, or `5s x 12` as it is printed.

    Raises:
        UsageError: it is something else.
    """
    length, _, batch = text.replace(" ", "").rpartition("x")
    if not (length and batch.isdecimal() and int(batch)):
        raise UsageError(f"'{text}' is not a length and a batch: write 5sx12")
    return Cell(float(Seconds.parse(length)), int(batch))


def jobs_of(settings: GpuSettings) -> list[GpuJob]:
    """All jobs, the most important first; with those that compile, which takes long, early."""
    first, *others = cells = settings.chosen()

    def timed(variant: str, cell: Cell) -> GpuJob:
        return GpuJob(variant=variant, cells=(cell,), steps=settings.steps, dry=settings.dry_run)

    leading, following = ("graph", PEERS[0]), ("eager", PEERS[1])
    jobs = [timed(variant, first) for variant in (*leading, *following, "plain")]
    jobs += [timed(variant, cell) for cell in others for variant in leading]
    jobs.append(dataclasses.replace(jobs[0], variant=CHECKS, cells=tuple(cells)))
    jobs += [timed(variant, cell) for cell in others for variant in following]
    wanted = settings.variants or (DRY_VARIANTS if settings.dry_run else get_args(Variant))
    return [job for job in jobs if job.variant in wanted]


def rounded(value: Any) -> Any:
    """All numbers with `DIGITS` digits, at any depth."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


def ratio(a: float | None, b: float | None) -> float | None:
    """`a / b`; None if either is missing."""
    return None if a is None or not b else a / b


Row = dict[str, Any]


def row_of(job: GpuJob, measured: Row | None, found: Row, gemm: float | None) -> Row:
    """Figures of one variant in one cell; None for all if it was not measured.

    Args:
        job: of the worker.
        measured: its reply.
        found: operations and predicted peak of the cell, if they are known.
        gemm: best rate of a matrix product, in TFLOP/s.
    """
    reply = measured or {}
    times = reply.get("ms") or {}
    ours = job.variant in OURS
    rate = ratio(1e3 * job.cell.seconds, times.get("median" if ours else "min"))
    predicted = found.get("predicted_gib") if ours else None
    done = None if rate is None else found.get("gflop", 0.0) * rate / job.cell.seconds / 1e3
    days = ratio(TOTAL_UPDATES * PAPER_UPDATE / 86400, rate)
    return {
        "cell": job.cell.name,
        "variant": job.variant,
        "ms": times or None,
        "latency_ms": reply.get("latency_ms"),
        "timed_updates": reply.get("timed_updates"),
        "audio_s_per_s": rate,
        "peak_gib": reply.get("peak_gib"),
        "reserved_gib": reply.get("reserved_gib"),
        "predicted_gib": predicted,
        "measured_of_predicted": ratio(reply.get("peak_gib"), predicted),
        "launches": reply.get("launches"),
        "gemm_fraction": ratio(done or None, gemm),
        "paper_run_days": days,
    }


def results_of(turns: Turns, jobs: Sequence[GpuJob], plans: Mapping[str, Row]) -> Row:
    """Everything that was found, and the reason for everything that was not.

    Args:
        turns: after all workers have ended.
        jobs: all jobs.
        plans: what the planner says of each cell, by name.
    """
    workers: dict[GpuJob, GpuWorker] = {worker.job: worker for worker in turns.workers}
    replies = {job: worker.measured for job, worker in workers.items()}
    checks = next((workers[job] for job in jobs if job.variant == CHECKS and job in workers), None)
    gemm = max((r["gemm_tflops"] for r in replies.values() if r), default=None)
    rows = []
    for job in jobs:
        if job.variant == CHECKS:
            continue
        row = row_of(job, replies.get(job), plans.get(job.cell.name, {}), gemm)
        worker = workers.get(job)
        row["warm_up_s"] = worker.warm_up.get("warm_up_s") if worker else None
        row["not_run"] = None if row["ms"] else _reason(job, worker, turns)
        rows.append(row)
    rate = {(row["cell"], row["variant"]): row["audio_s_per_s"] for row in rows}
    for row in rows:
        compiled = rate.get((row["cell"], PEERS[0]))
        row["times_as_fast_as_compiled"] = ratio(row["audio_s_per_s"], compiled)
    wanted = next((job for job in jobs if job.variant == CHECKS), None)
    done = wanted is None or (checks is not None and checks.warm)
    return {
        "gemm_tflops": gemm,
        "cells": rows,
        "plans": plans,
        "checks": checks.findings if checks else [],
        "checks_not_run": None if done or wanted is None else _reason(wanted, checks, turns),
        "spent_s": turns.spent,
    }


def _reason(job: GpuJob, worker: GpuWorker | None, turns: Turns) -> str:
    """Why a job has no result."""
    if worker is None:
        return turns.not_run.get(job, "not run")
    return worker.failure or "it ended without a reply"


COLUMNS = (
    "cell", "variant", "ms, median", "min", "latency, ms", "audio s/s", "peak GiB", "reserved",
    "of predicted", "launches", "of GEMM rate", "paper's run, days", "times compiled's rate",
    "warm-up, s",
)  # fmt: skip


def table_of(rows: Sequence[Row]) -> Table:
    """A line for each variant of each cell."""
    table = Table(*COLUMNS)

    def shown(value: float | None, digits: int = 3) -> str:
        return "-" if value is None else f"{value:.{digits}g}" if value < 1000 else f"{value:,.0f}"

    for row in rows:
        if row["not_run"]:
            table.add_row(row["cell"], row["variant"], f"not run: {row['not_run']}"[:60])
            continue
        kernels = row["launches"] and row["launches"]["kernels"] + row["launches"]["copies"]
        table.add_row(
            row["cell"],
            row["variant"],
            *(shown(row["ms"][name]) for name in ("median", "min")),
            shown(row["latency_ms"]["median"]),
            *(shown(row[name], 4) for name in ("audio_s_per_s", "peak_gib", "reserved_gib")),
            shown(row["measured_of_predicted"]),
            shown(kernels, 4),
            *(shown(row[name]) for name in ("gemm_fraction", "paper_run_days")),
            shown(row["times_as_fast_as_compiled"]),
            shown(row["warm_up_s"]),
        )
    return table


def machine(dry: bool) -> Row:
    """What was measured on."""
    return {
        "device": platform.processor() or platform.machine()
        if dry
        else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "date": time.strftime("%Y-%m-%d"),
        "dry_run": dry,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = settings_parser(GpuSettings, prog="python -m benchmarks.gpu", description=__doc__)
    settings, _ = parse(GpuSettings, parser, arguments)
    jobs = jobs_of(settings)
    usable = float("inf")
    if not settings.dry_run:
        if not torch.cuda.is_available():
            raise UsageError("torch sees no CUDA device here; --dry-run tries the script without")
        free, _ = torch.cuda.mem_get_info()
        usable = USABLE * free / GIB
    cores = len(os.sched_getaffinity(0))
    turns = Turns(settings.budget, usable, cores, lambda text: print(text, file=sys.stderr))
    plans = Plans(dataclasses.replace(jobs[0], cells=tuple(settings.chosen())))
    turns.run(jobs)
    all_planned = plans.wait(settings.budget - turns.spent)
    found = results_of(turns, jobs, plans.found)
    table = table_of(found["cells"])
    console = console_for(table)
    console.print(table)
    for finding in [found["plans"], *found["checks"]]:
        console.print(strict_json.dumps(rounded(finding)), highlight=False, markup=False)
    result = machine(settings.dry_run) | {"budget_s": float(settings.budget)} | found
    text = strict_json.dumps(rounded(result))
    if settings.output is not None:
        write_text(settings.output, text + "\n")
    print(text, flush=True)
    if not all_planned:
        os._exit(0)  # Python's own exit would end torch beneath a thread that still uses it
    return 0


if __name__ == "__main__":
    command.run(main)
