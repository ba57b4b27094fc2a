"""Kills processes of a simulation at random moments; each run must end with the same bytes.

A worker, Ray's raylet, its control store (`gcs_server`), its driver or the command that looks after
them gets SIGKILL, or the command SIGTERM. A run that fails is resumed.
"""

import contextlib
import dataclasses
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 6
FAULTS = ("worker", "raylet", "gcs_server", "driver", "command", "sigterm")
HANG = 60.0
"""Seconds that a run may take longer than one without a fault."""
_END = 20.0
"""Seconds after a run in which its processes must have ended."""
_OPTIONS = [
    "--model", "tiny", "--architecture.num-hidden-layers", "1", "--length", "1s", "--clients", "6",
    "--clients-per-round", "4", "--local-updates", "2", "--batch", "2", "--eval-crops", "4",
    "--rounds", str(ROUNDS), "--workers", "2", "--keep-optimizer-state", "true",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a run with one fault."""

    fault: str
    moment: float
    """Seconds from the start of the run to the fault."""
    code: int
    """Exit code of the run that had the fault."""
    seconds: float
    """From the fault to the end of that run."""
    resumed: bool
    same_bytes: bool
    hung: bool
    left_behind: tuple[str, ...]
    """Names of processes that outlived the run."""

    def describe(self) -> str:
        """The outcome in one line."""
        return (
            f"{self.fault} at {self.moment:.1f} s: exit code {self.code} after {self.seconds:.1f} s"
            f"{', resumed' if self.resumed else ''}, "
            f"{'same' if self.same_bytes else 'OTHER'} bytes"
            f"{', HUNG' if self.hung else ''}"
            f"{', LEFT BEHIND: ' if self.left_behind else ''}{', '.join(self.left_behind)}"
        )


class Run:
    """One process of `simulation/run.py`, and all its descendants."""

    def __init__(self, words: Sequence[str], log: Path) -> None:
        """Start it.

        Args:
            words: of its command line.
            log: file for its output.
        """
        with open(log, "ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "simulation" / "run.py"), *words],
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        self._command = psutil.Process(self.process.pid)
        self._seen: dict[int, psutil.Process] = {}

    def look(self) -> list[psutil.Process]:
        """All descendants now, which are remembered."""
        try:
            found = self._command.children(recursive=True)
        except psutil.Error:
            return []
        self._seen |= {each.pid: each for each in found}
        return found

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait until the run ends or `until`; whether that was within `seconds`."""
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end:
                self.look()
                if self.process.poll() is not None or until():
                    return True
                time.sleep(0.05)
        except BaseException:  # the benchmark is stopped
            self.end()
            raise
        return False

    def end(self) -> tuple[str, ...]:
        """Kill what is left of the run; the names of processes that outlived it."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        _, left = psutil.wait_procs(self._seen.values(), timeout=_END)
        names = []
        for each in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                names.append(" ".join(each.cmdline())[:60])
                each.kill()
        return tuple(names)


def newest(run: Path) -> dict[str, bytes]:
    """Every file of the newest checkpoint of a run; empty without one."""
    found = sorted((run / "checkpoints").glob("round-*"))
    return {file.name: file.read_bytes() for file in found[-1].iterdir()} if found else {}


def reference(data: Path, folder: Path) -> tuple[dict[str, bytes], float]:
    """The checkpoint of a run without a fault, and the seconds it took.

    Args:
        data: the corpus.
        folder: for run directory and log.
    """
    started = time.monotonic()
    run = Run([*_OPTIONS, "--data", str(data), "--output", str(folder / "run")], folder / "log")
    run.wait(600)
    code = run.process.poll()
    run.end()
    if code != 0:
        raise RuntimeError(f"the run without a fault ended with {code}; see {folder / 'log'}")
    return newest(folder / "run"), time.monotonic() - started


def take(
    fault: str, data: Path, folder: Path, rng: random.Random, whole: tuple[dict[str, bytes], float]
) -> Outcome:
    """Run with one fault, resume if need be, and compare.

    Args:
        fault: one of `FAULTS`.
        data: the corpus.
        folder: new folder for run directory and log.
        rng: draws the moment and the worker.
        whole: result of `reference`.
    """
    expected, usual = whole
    output = folder / "run"
    words = [*_OPTIONS, "--data", str(data), "--output", str(output)]
    moment = rng.uniform(0.5, usual * 0.95)
    run, started = Run(words, folder / "log"), time.monotonic()
    run.wait(moment)
    _inject(fault, run, rng)
    moment, faulted = time.monotonic() - started, time.monotonic()
    hung = not run.wait(usual + HANG)
    seconds = time.monotonic() - faulted
    code = run.process.poll()
    left = run.end()
    resumed = code != 0
    if resumed:
        again = ["--resume", str(output)] if (output / "config.yaml").exists() else words
        run = Run(again, folder / "log")
        hung |= not run.wait(usual + HANG)
        left += run.end()
    return Outcome(
        fault, moment, -1 if code is None else code, seconds, resumed,
        newest(output) == expected, hung, left,
    )  # fmt: skip


def _inject(fault: str, run: Run, rng: random.Random) -> None:
    """Kill a process of the run, as soon as there is one of that kind."""
    if fault in ("command", "sigterm"):
        run.process.send_signal(signal.SIGTERM if fault == "sigterm" else signal.SIGKILL)
        return
    found: list[psutil.Process] = []

    def there() -> bool:
        found[:] = [each for each in run.look() if _is(fault, each)]
        return bool(found)

    run.wait(HANG, there)
    if found:
        with contextlib.suppress(psutil.NoSuchProcess):
            rng.choice(found).kill()


def _is(fault: str, process: psutil.Process) -> bool:
    try:
        words, name = process.cmdline(), process.name()
    except psutil.Error:
        return False
    if fault == "worker":
        return " ".join(words).startswith("ray::Worker")
    if fault == "driver":
        return any(word.endswith("simulate.py") for word in words[:2])
    return name == fault


def summary(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Counts over runs, and the longest time from a fault to the end of a run."""
    return {
        "runs": len(outcomes),
        "same_bytes": sum(each.same_bytes for each in outcomes),
        "hangs": sum(each.hung for each in outcomes),
        "left_behind": sum(len(each.left_behind) for each in outcomes),
        "resumed": sum(each.resumed for each in outcomes),
        "too_late": sum(not (each.code or each.seconds > 0.2) for each in outcomes),
        "longest_seconds": round(max((each.seconds for each in outcomes), default=0.0), 1),
    }


def clear(folder: Path) -> Path:
    """An empty folder in place of what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
