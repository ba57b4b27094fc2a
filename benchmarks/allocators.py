"""Memory allocators beside ours: seconds and peak memory of a training step.

`python -m benchmarks.allocators --data EMODB` takes steps in turn: with glibc as
`ssl_core.planning.allocator` sets it up (`ours`), with glibc as it is, and with libraries that
replace its malloc (`LD_PRELOAD`). Each is in a process of its own, beside one with ours. Libraries
that are not installed are reported and left out. The last line is one JSON object.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import PositiveInt
from rich.console import Console

from benchmarks.allocator_worker import Job
from benchmarks.contest import ratio, rounded
from benchmarks.finetune import ROOT, make_base
from common import command, strict_json
from common.errors import ShortwaveError, UsageError
from common.options import settings_parser
from common.process_environment import VARIABLE, tuned
from common.settings import parse

OURS = "ours"
WITHIN = 1.03
"""An allocator does as well as ours up to this ratio of seconds and of peaks."""


@dataclasses.dataclass(frozen=True)
class Allocator:
    """An allocator and its settings."""

    library: str = ""
    """Shared library to preload, found as the linker finds it; empty is glibc."""
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Environment variables."""

    def environment(self, ours: bool) -> dict[str, str]:
        """Environment of a worker; `ours` as the product's commands set it."""
        clean = {name: value for name, value in os.environ.items() if name != VARIABLE}
        clean = tuned(clean) if ours else {**clean, **self.settings}
        return clean | ({"LD_PRELOAD": self.library} if self.library else {})

    def installed(self) -> bool:
        """Whether the linker finds the library: it only warns of one that it does not find."""
        code = "import sys; print(sys.argv[1] in open('/proc/self/maps').read())"
        words = [sys.executable, "-c", code, self.library]
        done = subprocess.run(
            words, env=self.environment(False), capture_output=True, text=True, check=True
        )
        return "True" in done.stdout


JEMALLOC, TCMALLOC = "libjemalloc.so.2", "libtcmalloc_minimal.so.4"
ALLOCATORS = {
    "glibc": Allocator(),
    "glibc_no_cache": Allocator(settings={VARIABLE: "glibc.malloc.tcache_count=0"}),
    "jemalloc": Allocator(JEMALLOC),
    "jemalloc_kept": Allocator(
        JEMALLOC, {"MALLOC_CONF": "dirty_decay_ms:-1,oversize_threshold:0,metadata_thp:auto"}
    ),
    "mimalloc2": Allocator("libmimalloc.so.2"),
    "mimalloc2_kept": Allocator("libmimalloc.so.2", {"MIMALLOC_ALLOW_DECOMMIT": "0"}),
    "mimalloc3": Allocator("libmimalloc.so.3"),
    "mimalloc3_kept": Allocator("libmimalloc.so.3", {"MIMALLOC_PURGE_DELAY": "-1"}),
    "tcmalloc": Allocator(TCMALLOC),
    "tcmalloc_kept": Allocator(TCMALLOC, {"TCMALLOC_RELEASE_RATE": "0"}),
}
"""Contestants beside ours. `kept` never returns freed memory to the kernel."""
CELLS = {"5s_x_4": (5.0, 4), "15s_x_2": (15.0, 2), "emotion": (0.0, 8)}
"""Length in seconds and batch of pretraining; for fine-tuning, 0 and the clips of an epoch."""
CellName = Literal["5s_x_4", "15s_x_2", "emotion"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllocatorSettings:
    """What to measure."""

    allocators: tuple[str, ...] = tuple(ALLOCATORS)
    """Contestants beside ours, separated by commas."""
    cells: tuple[CellName, ...] = ("5s_x_4", "15s_x_2", "emotion")
    """Pretraining by length and batch, and fine-tuning emotion unfrozen."""
    data: Path | None = None
    """EmoDB with labels.csv, for fine-tuning."""
    model: Literal["base", "tiny"] = "base"
    """Preset of the architecture in pretraining; fine-tuning takes base."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of products."""
    threads: PositiveInt = PositiveInt(2)
    """CPU threads of each process."""
    turns: PositiveInt = PositiveInt(4)
    """Timed turns of each process, after one that is not timed: steps, or epochs of two."""
    at_once: PositiveInt = PositiveInt(2)
    """Contestants that take turns with ours at a time; all their memory must fit."""

    def validate(self) -> None:
        """Check values; raises `UsageError`."""
        for name in self.allocators:
            if name not in ALLOCATORS:
                raise UsageError(f"no allocator '{name}': choose from {', '.join(ALLOCATORS)}")
        if "emotion" in self.cells and self.data is None:
            raise UsageError("fine-tuning needs --data, or leave it out of --cells")


class Worker:
    """A child process that takes turns on request, and its rows."""

    def __init__(self, name: str, job: Job, cache: Path) -> None:
        """Start the process with an allocator, and a feature cache of its own in `cache`."""
        allocator = ALLOCATORS.get(name, Allocator())
        job = dataclasses.replace(job, untouched=name != OURS)
        self.name = name
        self.rows: list[dict[str, float]] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.allocator_worker", json.dumps(vars(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=allocator.environment(name == OURS)
            | {"OMP_NUM_THREADS": str(job.threads), "XDG_CACHE_HOME": str(cache)},
        )
        self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ShortwaveError(f"{self.name} ended with {self._process.wait()}")
        found: dict[str, float] = json.loads(line)
        return found

    def turn(self, number: int) -> dict[str, float]:
        """Take a turn; its row of seconds, peak and page faults."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        self.rows.append(self._answer())
        return self.rows[-1]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def summary(self) -> dict[str, float]:
        """Medians over the timed turns, the fastest of them, and the peak of all turns."""
        timed = self.rows[1:]
        names = ("seconds", "kernel_seconds", "page_faults", "others_fraction")
        found = {name: statistics.median(row[name] for row in timed) for name in names}
        fastest = min(row["seconds"] for row in timed)
        return found | {"fastest": fastest, "peak_mib": self.rows[-1]["peak_mib"]}


def take_turns(names: Sequence[str], job: Job, turns: int) -> dict[str, dict[str, float]]:
    """Let a process for each allocator take a turn on the same audio, then all the next one, ...

    Args:
        names: ours and contestants.
        job: what they do.
        turns: of each, the first is not timed.

    Returns:
        The summary of each.
    """
    console, workers = Console(stderr=True), list[Worker]()
    with tempfile.TemporaryDirectory(prefix="allocators-") as folder, contextlib.ExitStack() as all:
        for name in names:
            workers.append(Worker(name, job, Path(folder) / name))
            all.callback(workers[-1].close)
        for number in range(turns):
            # Each is first in some turn.
            shift = number % len(workers)
            for worker in workers[shift:] + workers[:shift]:
                row = worker.turn(number)
                console.print(
                    f"turn {number}, {worker.name}: {row['seconds']:.2f} s a step "
                    f"({row['kernel_seconds']:.2f} s in the kernel, {row['page_faults']:.0f} page "
                    f"faults), peak {row['peak_mib']:.0f} MiB",
                    soft_wrap=True,
                    highlight=False,
                )
        return {worker.name: worker.summary() for worker in workers}


def compare(names: Sequence[str], job: Job, turns: int, at_once: int) -> dict[str, dict[str, Any]]:
    """Measure contestants beside ours; each gets ratios to ours in the same turns.

    Args:
        names: contestants.
        job: what they do.
        turns: of each, the first is not timed.
        at_once: contestants beside ours.

    Returns:
        Figures of each contestant, and those of ours beside it as `ours_seconds` and so on.
    """
    found: dict[str, dict[str, Any]] = {}
    for first in range(0, len(names), at_once):
        group = names[first : first + at_once]
        rows = take_turns([OURS, *group], job, turns)
        own = rows[OURS]
        for name in group:
            row = rows[name]
            ratios = {key: ratio(row[key], own[key]) for key in ("seconds", "peak_mib")}
            found[name] = {
                **{key: rounded(value, 3) for key, value in row.items()},
                **{f"ours_{key}": rounded(value, 3) for key, value in own.items()},
                "seconds_ratio": ratios["seconds"],
                "peak_ratio": ratios["peak_mib"],
                "as_good": all(value is not None and value <= WITHIN for value in ratios.values()),
            }
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = settings_parser(
        AllocatorSettings, prog="python -m benchmarks.allocators", description=__doc__
    )
    settings, _ = parse(AllocatorSettings, parser, arguments)
    present = [name for name in settings.allocators if ALLOCATORS[name].installed()]
    missing = [name for name in settings.allocators if name not in present]
    for name in missing:
        print(f"{name}: not installed ({ALLOCATORS[name].library})")
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="allocators-") as folder:
        for cell in settings.cells:
            length, batch = CELLS[cell]
            job = Job(
                model=settings.model,
                precision=settings.precision,
                threads=settings.threads,
                length=length,
                batch=batch,
            )
            if not length:
                make_base(Path(folder))
                assert settings.data is not None
                job = dataclasses.replace(job, data=str(settings.data.resolve()), checkpoint=folder)
            cells[cell] = compare(present, job, settings.turns + 1, settings.at_once)
    as_good = [name for name in present if all(rows[name]["as_good"] for rows in cells.values())]
    result = {
        "precision": settings.precision,
        "threads": settings.threads,
        "cells": cells,
        "not_installed": missing,
        "as_good_as_ours": as_good,
    }
    print(strict_json.dumps(result))
    return 0


if __name__ == "__main__":
    command.run(main)
