"""The project on an emulated Raspberry Pi: `python -m benchmarks.emulated_board --root DIR`.

On x86-64 Debian, as root, with debootstrap and qemu-user-static. It makes a root file system of
arm64 Debian, installs this checkout there as the README says, and reports what is downloaded and
unpacked, which imports work, and with how many threads a matrix product, a training step,
`ssl_core.train` and `ssl_core.finetune` run, with their losses beside this machine's. It also takes
a federated round against a SuperLink here. All of it as Cortex-A72 (Raspberry Pi 4) and Cortex-A76
(Raspberry Pi 5). The last line is one JSON object.

The root file system and finished trials are kept in `--root` and used again while the checkout
stays the same. The emulator's seconds say nothing of a board's.
"""

import dataclasses
import functools
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from benchmarks import arm_root, board_trials
from benchmarks.arm_install import digest, install
from benchmarks.arm_root import ArmRoot
from benchmarks.board_round import one_round
from benchmarks.board_trials import machine_of
from common import command, strict_json
from common.atomic import write_text
from common.errors import UsageError
from common.options import settings_parser
from common.progress import bar_of
from common.settings import parse
from common.units import Names, Seconds

STAGES = ("imports", "probes", "train", "finetune", "round")
HERE = "x86-64"
Job = tuple[str, Callable[[], dict[str, Any]]]
"""Name and trial."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmulationSettings:
    """The emulated board, and what is tried on it."""

    root: Path
    """Folder for root file systems, 5 GB each."""
    suite: Literal["bookworm", "trixie"] = "bookworm"
    """Debian's release on the board."""
    mirror: str = "http://deb.debian.org/debian"
    """Debian archive."""
    extras: Names = Names()
    """Extras of the project to install, separated by commas; none as the README says for a Pi."""
    cpus: Names = Names(("cortex-a72", "cortex-a76"))
    """Processors by qemu's names, separated by commas."""
    stages: Names = Names(STAGES)
    """Stages after the installation, separated by commas."""
    threads: tuple[int, ...] = (1, 2, 4)
    """Numbers of torch's threads to try."""
    limit: Seconds = Seconds.parse("1200s")
    """Longest time for a command of a trial."""
    install_limit: Seconds = Seconds.parse("7200s")
    """Longest time for making the root file system, and for installing."""
    again: bool = False
    """Repeat trials that are done, as after a change of this benchmark."""

    def validate(self) -> None:
        """Check values; raises `UsageError`."""
        for name in set(self.stages) - set(STAGES):
            raise UsageError(f"--stages: no stage '{name}'{command.nearest(name, STAGES)}")
        if any(number < 1 for number in self.threads):
            raise UsageError("--threads must be 1 or more")


def main(arguments: Sequence[str] | None = None) -> int:
    """Try and print; returns the exit code."""
    parser = settings_parser(
        EmulationSettings, prog="python -m benchmarks.emulated_board", description=__doc__
    )
    settings, _ = parse(EmulationSettings, parser, arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what was started, as Ctrl-C does
    arm_root.require()
    console, root = Console(stderr=True), ArmRoot(settings.root, settings.suite)
    console.print(f"root file system {root.path}; the first time takes minutes", highlight=False)
    root.make(settings.mirror, settings.install_limit)
    console.print("installing, unless that was done", highlight=False)
    installed = install(root, settings.extras, settings.cpus[0], settings.install_limit)
    done = _Kept(settings.root / f"{settings.suite}-results.json", digest(settings.extras))
    jobs = list(_jobs(settings, root))
    with bar_of(console) as bar:
        task = bar.add_task("trials", total=len(jobs))
        for name, trial in jobs:
            bar.update(task, description=name)
            if settings.again or done.rows.get(name, {}).get("verdict") != "ok":
                done.keep(name, trial())
            row = done.rows[name]
            seconds = f", {row['seconds']:.0f} s" if "seconds" in row else ""
            text = f"{name}: {row['verdict'][:200]}{seconds}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
            bar.advance(task)
    rows = {name: done.rows[name] for name, _ in jobs}
    print(strict_json.dumps(_result(settings, installed, rows)))
    return 0


class _Kept:
    """Results of trials in a file, for one state of the checkout."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        stored = strict_json.loads(path.read_text()) if path.exists() else {}
        self.rows: dict[str, dict[str, Any]] = stored["rows"] if stored.get("key") == key else {}

    def keep(self, name: str, row: dict[str, Any]) -> None:
        """Add a trial's result and write the file."""
        self.rows[name] = row
        write_text(self._path, strict_json.dumps({"key": self._key, "rows": self.rows}))


def _jobs(settings: EmulationSettings, root: ArmRoot) -> Iterator[Job]:
    """All trials in order, those of this machine first."""
    limit, trials = float(settings.limit), board_trials
    here = machine_of(HERE, settings.root.resolve() / "x86", None, limit)
    boards = [machine_of(cpu, settings.root, root, limit) for cpu in settings.cpus]
    for machine in (here, *boards):
        emulated = machine is not here
        if emulated:
            yield f"{machine.name} about", functools.partial(trials.about, machine)
        if emulated and "imports" in settings.stages:
            yield f"{machine.name} imports", functools.partial(trials.imports, machine)
        if "probes" in settings.stages:
            probes = functools.partial(trials.probes, machine, settings.threads)
            yield f"{machine.name} probes", probes
        for stage, trial in (("train", trials.train), ("finetune", trials.finetune)):
            for number in (0, *settings.threads) if stage in settings.stages else ():
                which = f", {number or 'default'} threads"
                yield f"{machine.name} {stage}{which}", functools.partial(trial, machine, number)
        if "round" in settings.stages:
            yield f"{machine.name} round", functools.partial(one_round, machine)


def _result(
    settings: EmulationSettings, installed: dict[str, Any], rows: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """What is printed.

    Args:
        settings: of this benchmark.
        installed: from `install`.
        rows: of each trial by name.
    """
    result: dict[str, Any] = {
        "suite": settings.suite,
        "qemu": _qemu_version(),
        "extras": list(settings.extras),
        "install": installed,
        HERE: {},
    }
    first: list[float] = []  # later updates amplify rounding
    for name, row in rows.items():
        machine, _, trial = name.partition(" ")
        result.setdefault(machine, {})[trial] = row
        expected = result[HERE].get(trial, {}).get("losses", [])
        losses = row.get("losses", [])
        if machine != HERE and losses and len(losses) == len(expected):
            relative = [abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)]
            row["differences_from_x86"] = [float(f"{each:.2g}") for each in relative]
            first.append(relative[0])
    result["largest_difference_of_a_first_loss"] = max(first, default=None)
    result["failed"] = [name for name, row in rows.items() if row["verdict"] != "ok"]
    return result


def _qemu_version() -> str:
    words = ["qemu-aarch64-static", "--version"]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return text.split("(")[0].strip()


if __name__ == "__main__":
    command.run(main)
