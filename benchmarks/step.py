"""A pretraining step here, in transformers and in SpeechBrain: time, memory, gradients.

`python -m benchmarks.step --length 5s --batch 4 --precision fp32` lets each take a step in turn, on
the same crops and threads, each in a process of its own so that its peak resident memory is its
own, and prints one JSON object as its last line. `--grid` measures the fastest and the leanest
exact plan over lengths and batches.

All have the architecture and dropout rates of the preset, but no layerdrop: it skips whole layers
for a step, and chance would decide whose steps are shorter.
"""

import dataclasses
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks.workers import OURS, PLANS, ROOT, Task, Worker, noise
from common import command
from common.errors import UsageError
from common.figures import save_figure
from common.progress import track
from common.units import format_length, parse_length
from partitions.prepared import prepare
from partitions.sampling import SAMPLE_RATE
from ssl_core.training.crops import Crops
from ssl_core.wav2vec2.config import PRESETS

FIGURE = ROOT / "benchmarks" / "figures" / "step-grid.png"
PEERS = ("transformers", "speechbrain")
WARM_UP = 2
"""Steps that are not timed: memory is first touched, code compiled."""
PARITY_LENGTH, PARITY_BATCH = 5.0, 2
"""Seconds and crops at most when gradients are compared."""
GRID_PLANS = ("fastest", "leanest")
GRID_LENGTHS = (1.0, 5.0, 10.0, 15.0)
GRID_BATCHES = (1, 2, 4, 8, 12)
OTHERS_SHARE = 0.1
"""Share of the CPU taken by others above which times are doubtful."""
LONG_STEP = 10.0
"""Seconds of a step of the grid from which on one is enough."""


def compare(
    tasks: Sequence[Task],
    batches: Sequence[Path],
    warm_up: int = WARM_UP,
    enough: float = float("inf"),
    show: bool = True,
) -> dict[str, Worker]:
    """Let workers take steps in turn: one step of each on the first batch, and so on.

    Args:
        tasks: of the workers.
        batches: files of waveforms, one for each step.
        warm_up: steps at the beginning that are not timed; they count in the peak.
        enough: seconds of a timed step after which no more are taken.
        show: whether to show progress.
    """
    workers = {}
    try:
        for task in tasks:
            worker = workers[task.name] = Worker(task)
            worker.imports_mib = worker.ask().get("imports_mib", 0.0)
        text = f"{format_length(tasks[0].length)} x {tasks[0].batch}"
        for number, path in enumerate(track(batches, len(batches), text, show)):
            for worker in workers.values():
                reply = {} if worker.failure else worker.ask(path)
                worker.peak_mib = reply.get("peak_mib", worker.peak_mib)
                if reply and number >= warm_up:
                    worker.seconds.append(reply["seconds"])
                    worker.others_share.append(reply["others_share"])
            if max((s for w in workers.values() for s in w.seconds), default=0.0) > enough:
                break
    finally:
        for worker in workers.values():
            worker.close()
    share = others_share(workers.values())
    if share > OTHERS_SHARE:
        print(
            f"warning: other processes took {share:.0%} of the CPU; threads that wait for one "
            "another are then many times slower, and these times mean nothing",
            file=sys.stderr,
        )
    return workers


def others_share(workers: Iterable[Worker]) -> float:
    """Share of the machine's CPU time that other processes took in the timed steps."""
    return float(np.mean([share for w in workers for share in w.others_share] or [0.0]))


def single(task: Task) -> tuple[float | None, str | None]:
    """Do one of the tasks that are a number; the number, or why there is none."""
    worker = Worker(task)
    try:
        value = worker.ask().get("value")
    finally:
        worker.close()
    return value, worker.failure


def write_source(task: Task) -> None:
    """Write what the peers load in place of a checkpoint from the hub; all train from scratch."""
    folder = Path(task.folder)
    (folder / "config.json").write_text(json.dumps(task.config().to_hf()), encoding="utf-8")
    # SpeechBrain wants to see such a file, but to pretrain it builds from the config alone.
    (folder / "model.safetensors").touch()


def write_batches(task: Task, steps: int, data: Path | None, seed: int) -> list[Path]:
    """A file of waveforms, `[batch, sample]`, for each step: noise, or crops of a corpus."""
    count, samples = steps * task.batch, round(task.length * SAMPLE_RATE)
    if data is None:
        crops = noise(np.random.default_rng(seed), count, samples)
    else:
        manifest = prepare(data.absolute(), length=task.length)
        everything = range(len(manifest.sequences))
        crops = Crops(manifest, everything, samples, seed).batch(0, count).waveforms
    paths = [Path(task.folder) / f"{number}.npy" for number in range(steps)]
    for number, path in enumerate(paths):
        np.save(path, crops[number * task.batch : (number + 1) * task.batch])
    return paths


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else round(a / b, 3)


def _rounded(value: float | None, digits: int | None = None) -> float | None:
    return None if value is None else round(value, digits)


def run_comparison(
    task: Task, peers: Sequence[str], steps: int, data: Path | None, seed: int
) -> dict[str, Any]:
    """Measure everything at one length and batch; returns what is printed."""
    tasks = [task, *(dataclasses.replace(task, name=peer) for peer in peers)]
    if task.precision == "bf16" and "transformers" in peers:
        tasks.append(dataclasses.replace(task, name="transformers_fp32", precision="fp32"))
    gemm = dataclasses.replace(task, name="gemm")
    rates = [single(gemm)]
    workers = compare(tasks, write_batches(task, WARM_UP + steps, data, seed))
    rates.append(single(gemm))
    parity, no_parity = single(
        dataclasses.replace(
            task,
            name="parity",
            precision="fp32",
            length=min(task.length, PARITY_LENGTH),
            batch=min(task.batch, PARITY_BATCH),
        )
    )
    flops, no_flops = single(dataclasses.replace(task, name="flops"))
    peak_rate = max((rate for rate, _ in rates if rate), default=None)
    seconds = {name: worker.median() for name, worker in workers.items()}
    peaks = {name: worker.peak() for name, worker in workers.items()}
    above = {name: worker.peak_above_imports() for name, worker in workers.items()}
    at_peak = None if flops is None or peak_rate is None else flops / peak_rate / 1e9
    failures = {name: worker.failure for name, worker in workers.items()}
    failures |= {"parity": no_parity, "flops": no_flops, "gemm": rates[0][1]}
    return {
        **{name: getattr(task, name) for name in ("model", "length", "batch", "precision")},
        "threads": task.threads,
        "plan": task.plan,
        "steps": steps,
        "seconds": {name: _rounded(value, 4) for name, value in seconds.items()},
        **{
            f"speedup_vs_{name}": _ratio(seconds[name], seconds[OURS])
            for name in workers
            if name != OURS
        },
        "peak_mib": {name: _rounded(value) for name, value in peaks.items()},
        "peak_above_imports_mib": {name: _rounded(value) for name, value in above.items()},
        "peak_ratio_vs_transformers": _ratio(peaks[OURS], peaks.get("transformers")),
        "peak_above_imports_ratio_vs_transformers": _ratio(above[OURS], above.get("transformers")),
        "max_relative_gradient_error": None if parity is None else float(f"{parity:.3g}"),
        "step_gflop": _ratio(flops, 1e9),
        "gemm_peak_gflops": _rounded(peak_rate, 1),
        "gemm_peak_share": _ratio(at_peak, seconds[OURS]),
        "others_cpu_share": round(others_share(workers.values()), 3),
        "failures": {name: reason for name, reason in failures.items() if reason},
    }


class Cell(NamedTuple):
    """A plan at a length and batch; figures are None where the step did not fit."""

    plan: str
    length: float
    """Seconds."""
    batch: int
    seconds: float | None
    audio_seconds_per_second: float | None
    peak_above_imports_mib: float | None
    failure: str | None


def run_grid(task: Task, data: Path | None, seed: int, figure: Path) -> dict[str, Any]:
    """Measure both plans over lengths and batches; prints a table and draws the figure."""
    cells = []
    sizes = list(itertools.product(GRID_PLANS, GRID_LENGTHS, GRID_BATCHES))
    for plan, length, batch in track(sizes, len(sizes), "grid", show=True):
        one = dataclasses.replace(task, plan=plan, length=length, batch=batch)
        batches = write_batches(one, 3, data, seed)
        worker = compare([one], batches, warm_up=1, enough=LONG_STEP, show=False)[OURS]
        seconds = worker.median()
        cells.append(
            Cell(
                plan,
                length,
                batch,
                _rounded(seconds, 3),
                _ratio(batch * length, seconds),
                _rounded(worker.peak_above_imports()),
                worker.failure,
            )
        )
    print_table(cells)
    plot_grid(cells, figure)
    shared = {name: getattr(task, name) for name in ("model", "precision", "threads")}
    return {**shared, "cells": [cell._asdict() for cell in cells]}


def print_table(cells: Sequence[Cell]) -> None:
    """The grid in Markdown, a row for each length and batch."""
    columns = ("seconds", "audio s / s", "peak MiB")
    heads = [f"{plan}: {column}" for plan in GRID_PLANS for column in columns]
    print("| length | batch | " + " | ".join(heads) + " |")
    print("|--:" * (len(heads) + 2) + "|")
    by_size = {cell[:3]: cell[3:6] for cell in cells}
    for length, batch in itertools.product(GRID_LENGTHS, GRID_BATCHES):
        row = [value for plan in GRID_PLANS for value in by_size[plan, length, batch]]
        words = ["-" if value is None else f"{value:g}" for value in row]
        print(f"| {format_length(length)} | {batch} | " + " | ".join(words) + " |")


def plot_grid(cells: Sequence[Cell], path: Path) -> None:
    """Peak memory and throughput against batch, a colour for each length."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = (
        ("peak_above_imports_mib", "peak resident memory above imports (MiB)"),
        ("audio_seconds_per_second", "seconds of audio a second"),
    )
    styles = dict(zip(GRID_PLANS, ("-", "--"), strict=True))
    for axes, (name, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for (number, length), plan in itertools.product(enumerate(GRID_LENGTHS), GRID_PLANS):
            line = [c for c in cells if (c.plan, c.length) == (plan, length)]
            points = [(c.batch, getattr(c, name)) for c in line if c.failure is None]
            axes.plot(
                [batch for batch, _ in points],
                [value for _, value in points],
                styles[plan],
                color=f"C{number}",
                marker="o",
                markersize=3,
                label=f"{format_length(length)}, {plan}",
            )
        axes.set_title(title)
        axes.set_xlabel("crops in a batch")
        axes.set_xticks(GRID_BATCHES)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def _peers(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    for name in names:
        if name not in PEERS:
            known = command.nearest(name, PEERS)
            raise UsageError(f"no peer '{name}': choose from {', '.join(PEERS)}{known}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = command.Parser(
        prog="python -m benchmarks.step",
        description=__doc__,
    )
    length, positive = command.argument(parse_length), command.argument(command.positive)
    parser.add_argument("--length", type=length, default="5s", help="of every crop")
    parser.add_argument("--batch", type=positive, default=4, help="crops")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of all")
    parser.add_argument(
        "--threads", type=positive, default=len(os.sched_getaffinity(0)), help="CPU threads of each"
    )
    parser.add_argument("--steps", type=positive, default=7, help="timed steps of each")
    parser.add_argument("--model", choices=tuple(PRESETS), default="base", help="preset")
    parser.add_argument(
        "--peers", type=command.argument(_peers), default=",".join(PEERS), help="others to measure"
    )
    parser.add_argument("--plan", choices=PLANS, default="fastest", help="of our step")
    parser.add_argument("--data", type=Path, help="corpus to cut crops from; without it, noise")
    parser.add_argument("--seed", type=int, default=0, help="of the crops")
    parser.add_argument("--grid", action="store_true", help="measure our plans over many sizes")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="PNG of the grid to draw")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="step-") as folder:
        task = Task(
            name=OURS,
            **{name: getattr(options, name) for name in ("model", "length", "batch", "precision")},
            plan=options.plan,
            threads=options.threads,
            folder=folder,
        )
        write_source(task)
        if options.grid:
            result = run_grid(task, options.data, options.seed, options.figure)
        else:
            result = run_comparison(task, options.peers, options.steps, options.data, options.seed)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    command.run(main)
