"""Trials of the project on an emulated board or on this machine: imports, training, fine-tuning."""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from benchmarks.arm_install import PYTHON, give
from benchmarks.arm_root import HOME, ArmRoot, Outcome, bounded, environment
from benchmarks.flower_processes import ROOT, write_tones

PRECISIONS = ("fp32", "bf16")
TRAIN = (
    "--model tiny --architecture.num-hidden-layers 1 --length 1s --batch 2 --updates 3 "
    "--save-every 3 --eval-every 3 --eval-crops 2 --held-out 0.2 --seed 5"
)
"""Three updates of two crops."""
FINETUNE = (
    "--task kws35 --checkpoint random --model tiny --recipe.epochs 1 --batch 8 --cache 0 "
    "--unfrozen --seed 5"
)
"""An epoch of four updates."""
WORDS = ("follow", "marvin", "sheila", "visual")
SPEAKERS = ("aa00c1e7", "bb11d2f8", "cc22e3a9", "dd33f4ba", "ee44a5cb", "ff55b6dc")


@dataclasses.dataclass(frozen=True)
class Machine:
    """An emulated board, or this machine."""

    name: str
    """qemu's name of the processor, or `x86-64`."""
    work: Path
    """Folder with the data and for outputs, as this machine sees it."""
    limit: float
    """Seconds that a command may take."""
    root: ArmRoot | None = None
    """The board's root file system; None for this machine."""

    def words(self, *arguments: str, folder: str = HOME) -> list[str]:
        """The words that run Python with the project installed.

        Args:
            arguments: of the interpreter.
            folder: the board's working directory.
        """
        if self.root is None:
            return [sys.executable, *arguments]
        return self.root.words([PYTHON, *arguments], folder)

    def environment(self) -> dict[str, str]:
        """Environment of a command."""
        if self.root is not None:
            return environment(self.name)
        own = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(self.work / "cache")}
        return dict(os.environ) | own

    def python(self, *arguments: str) -> Outcome:
        """Run Python to its end."""
        return bounded(self.words(*arguments), self.limit, self.environment(), ROOT)

    def seen(self, path: Path) -> str:
        """A path in the work folder as the machine's own programs see it."""
        return str(path if self.root is None else Path("/") / path.relative_to(self.root.path))


def write_data(work: Path) -> None:
    """Write tones in LibriSpeech's layout and words in Speech Commands' layout, and the probe."""
    for folder in ("tones", "words"):
        shutil.rmtree(work / folder, ignore_errors=True)
    write_tones(work / "tones")
    _write_words(work / "words")
    shutil.copyfile(ROOT / "benchmarks" / "board_probe.py", work / "board_probe.py")


def _write_words(root: Path) -> None:
    """Each speaker says each word, a tone, twice; the last two speakers validate and test."""
    for place, word in enumerate(WORDS):
        (root / word).mkdir(parents=True)
        for number, speaker in enumerate((*SPEAKERS, *SPEAKERS)):
            rng = np.random.default_rng(100 * place + number)
            angle = 2 * np.pi * 300 * 2**place * np.arange(4800) / 16_000
            sound = 0.3 * np.sin(angle + rng.uniform()) + 0.003 * rng.standard_normal(4800)
            path = root / word / f"{speaker}_nohash_{number // len(SPEAKERS)}.wav"
            soundfile.write(path, sound, 16_000, subtype="PCM_16")
    for name, speaker in zip(("validation", "testing"), SPEAKERS[-2:], strict=True):
        lines = [str(p.relative_to(root)) for p in sorted(root.glob(f"*/{speaker}_*"))]
        (root / f"{name}_list.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def about(machine: Machine) -> dict[str, Any]:
    """Versions, torch's BLAS and default threads."""
    (row,) = _probe(machine, ["about"]).values()
    return {"verdict": _verdict(row), **(row.get("value") or {})}


def imports(machine: Machine) -> dict[str, Any]:
    """Which modules can be imported: names of those that work, and why others do not."""
    (listed,) = _probe(machine, ["list"]).values()
    if "value" not in listed:
        return {"verdict": _verdict(listed)}
    names = dict.fromkeys(listed["value"])
    rows = _probe(machine, [f"import:{name}" for name in names])
    found = {name.partition(":")[2]: _verdict(row) for name, row in rows.items()}
    return {
        "verdict": "ok",
        "work": [name for name, verdict in found.items() if verdict == "ok"],
        "fail": {name: verdict for name, verdict in found.items() if verdict != "ok"},
    }


def probes(machine: Machine, threads: Sequence[int]) -> dict[str, Any]:
    """Products and training steps: the largest error or the loss of each, or why it failed.

    Args:
        machine: where.
        threads: numbers of torch's threads to try.
    """
    names = [f"{kind}:{p}:{n}" for kind in ("product", "step") for p in PRECISIONS for n in threads]
    rows = _probe(machine, names)
    return {"verdict": "ok"} | {
        name: row.get("value") if _verdict(row) == "ok" else _verdict(row)
        for name, row in rows.items()
    }


def _probe(machine: Machine, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Results of `board_probe.py` by name, whatever kills its process: the rest starts anew."""
    rows: dict[str, dict[str, Any]] = {}
    script = machine.seen(machine.work / "board_probe.py")
    while left := [name for name in names if name not in rows]:
        done = machine.python(script, *left)
        started = left[0]
        for line in done.output.splitlines():
            row = _json(line)
            started = row.get("start", started)
            if "done" in row:
                rows[row["done"]] = row
        if started not in rows:
            rows[started] = {"error": done.verdict()}
    return rows


def _json(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _verdict(row: dict[str, Any]) -> str:
    return str(row.get("error", "ok"))


def train(machine: Machine, threads: int) -> dict[str, Any]:
    """Run `ssl_core.train`; its losses by update.

    Args:
        machine: where.
        threads: torch's threads; 0 for torch's choice.
    """
    data = machine.seen(machine.work / "tones")
    return _command(machine, "ssl_core.train", [*TRAIN.split(), "--data", data], threads)


def finetune(machine: Machine, threads: int) -> dict[str, Any]:
    """Run `ssl_core.finetune`; its losses by epoch.

    Args:
        machine: where.
        threads: torch's threads; 0 for torch's choice.
    """
    data = machine.seen(machine.work / "words")
    return _command(machine, "ssl_core.finetune", [*FINETUNE.split(), "--data", data], threads)


def _command(machine: Machine, module: str, options: Sequence[str], threads: int) -> dict[str, Any]:
    """Run a command that trains into a new run directory, and read its metrics."""
    output = machine.work / f"{module}-{machine.name}-{threads}"
    shutil.rmtree(output, ignore_errors=True)
    words = ["-m", module, *options, "--threads", str(threads), "--output", machine.seen(output)]
    done = machine.python(*words)
    rows = read_metrics(output)
    kinds = ("loss", "held_out_loss", "valid_loss")
    losses = [row[key] for row in rows for key in kinds if key in row]
    return {"verdict": done.verdict(), "seconds": round(done.seconds, 1), "losses": losses}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics; empty if it has none."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def machine_of(name: str, folder: Path, root: ArmRoot | None, limit: float) -> Machine:
    """A machine with its data written.

    Args:
        name: qemu's name of the processor, or `x86-64`.
        folder: for this machine's outputs.
        root: the board's root file system; None for this machine.
        limit: seconds that a command may take.
    """
    work = folder if root is None else root.inside(f"{HOME}/work")
    write_data(work)
    if root is not None:
        give(work)
    return Machine(name, work, limit, root)
