"""Real faults at random moments of a real federation, and what each one costs.

`python -m benchmarks.faults --runs 10` starts a SuperLink and three SuperNodes on loopback for each
run, four where a client lies, and injects one fault. A run whose server side fails is resumed. The
disk faults mount a small tmpfs, which needs root. With `--simulation true` the federation is a
simulation on Ray, whose processes are killed. The last line is one JSON object.
"""

import dataclasses
import random
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from jsonargparse.typing import PositiveInt
from rich.console import Console

from benchmarks import simulation_faults
from benchmarks.fault_injection import FAULTS, take
from benchmarks.fault_outcome import Outcome, describe, summary
from benchmarks.fault_trial import Trial
from benchmarks.flower_processes import write_tones
from benchmarks.poison import KINDS
from benchmarks.small_disk import can_mount
from common import command, strict_json
from common.errors import UsageError
from common.options import settings_parser
from common.progress import bar_of
from common.settings import parse
from common.units import Names


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultSettings:
    """Which faults to inject, and how often."""

    simulation: bool = False
    """Kill processes of a simulation on Ray: worker, raylet, gcs_server, driver, command,
    sigterm."""
    runs: PositiveInt = PositiveInt(10)
    """Runs, each with one fault."""
    data: Path | None = None
    """LibriSpeech; by default six speakers of tones."""
    faults: Names = Names()
    """Faults to inject in turn: clientapp, supernode, superlink, superlink_memory, serverapp,
    disk_client, disk_server, network, poisoned, truncated, replayed, hang, and clients that lie in
    every round: audio, scaled, flipped, noise; by default all that this user may inject."""
    seed: int = 0
    """Seed of the moments, and of the clients that are hit."""
    deadline: float = 40.0
    """Seconds a round may take."""
    patience: float = 3.0
    """Once half the cohort has answered, a round waits for the others this many times as long as
    the slowest of them took."""
    limit: float = 180.0
    """Seconds a run may take."""
    keep: Path | None = None
    """Folder for logs and run directories; a temporary one without it."""

    def validate(self) -> None:
        """Check the names of faults; raises `UsageError`."""
        faults = list(simulation_faults.FAULTS if self.simulation else FAULTS)
        for name in self.faults:
            if name not in faults:
                known = command.nearest(name, faults)
                raise UsageError(f"no fault '{name}': choose from {', '.join(faults)}{known}")


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Take the runs; returns the exit code."""
    parser = settings_parser(FaultSettings, prog="python -m benchmarks.faults", description=__doc__)
    settings, _ = parse(FaultSettings, parser, arguments)
    console = Console(stderr=True)
    if settings.simulation:
        return _simulate(settings, console)
    faults = list(settings.faults)
    if not faults:
        faults = list(FAULTS)
        if not can_mount():
            faults = [name for name in faults if not name.startswith("disk")]
            console.print("disk faults: skipped, they need root")
    signal.signal(signal.SIGTERM, _stop)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary, bar_of(console) as bar:
        folder = (settings.keep or Path(temporary)).resolve()
        data = settings.data.resolve() if settings.data else write_tones(Path(temporary, "corpus"))
        runs = bar.add_task("runs", total=settings.runs)
        for number in range(settings.runs):
            fault, turn = faults[number % len(faults)], number // len(faults)
            rng = random.Random(f"{settings.seed} {number}")
            encoding = ("int8", "fp32")[(turn + number) % 2]
            if fault == "disk_client":
                encoding = "int8"  # fp32 keeps nothing on the devices
            if fault in KINDS:
                encoding = "fp32"  # as `poison` reads it
            place = folder / f"{number:03d}-{fault}"
            trial = Trial(
                fault, place, data, rng, encoding, deadline=settings.deadline,
                patience=settings.patience, limit=settings.limit,
            )  # fmt: skip
            outcome = take(trial)
            outcomes.append(outcome)
            console.print(describe(outcome), highlight=False, markup=False, soft_wrap=True)
            bar.advance(runs)
    by_fault = {
        name: summary([outcome for outcome in outcomes if outcome.fault == name])
        for name in dict.fromkeys(outcome.fault for outcome in outcomes)
    }
    print(strict_json.dumps(summary(outcomes) | {"by_fault": by_fault}))
    return 0


def _simulate(settings: FaultSettings, console: Console) -> int:
    """Take the runs of a simulation; returns the exit code."""
    faults = list(settings.faults or simulation_faults.FAULTS)
    outcomes: list[simulation_faults.Outcome] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary, bar_of(console) as bar:
        folder = (settings.keep or Path(temporary)).resolve()
        data = settings.data.resolve() if settings.data else write_tones(Path(temporary, "corpus"))
        whole = simulation_faults.reference(data, simulation_faults.clear(folder / "reference"))
        runs = bar.add_task("runs", total=settings.runs)
        for number in range(settings.runs):
            fault = faults[number % len(faults)]
            place = simulation_faults.clear(folder / f"{number:03d}-{fault}")
            rng = random.Random(f"{settings.seed} {number}")
            outcomes.append(simulation_faults.take(fault, data, place, rng, whole))
            console.print(outcomes[-1].describe(), highlight=False, markup=False, soft_wrap=True)
            bar.advance(runs)
    by_fault = {
        name: simulation_faults.summary([each for each in outcomes if each.fault == name])
        for name in faults
    }
    print(strict_json.dumps(simulation_faults.summary(outcomes) | {"by_fault": by_fault}))
    return 0


if __name__ == "__main__":
    command.run(main)
