"""Downstream tasks on real speech: random and log-mel floors beside the project's checkpoints.

`python -m benchmarks.downstream --data DATA --checkpoint central=DIR federated=DIR` fine-tunes
every task on every backbone, frozen and unfrozen, and prints one JSON object as its last line.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from partitions import command
from partitions.errors import UsageError

ROOT = Path(__file__).parents[1]


class Case(NamedTuple):
    """A task on the recordings beside the checkout."""

    task: str
    folder: str
    options: tuple[str, ...]
    changes: str
    """Of the recipe."""
    frozen_epochs: int
    unfrozen_epochs: int
    score: str
    """Its name in `result.json`."""


CASES = (
    Case("kws35", "SpeechCommands", (), "", 100, 15, "accuracy"),
    Case("kws12", "SpeechCommands", (), "", 100, 30, "accuracy"),
    Case("emotion", "emotion-emodb", ("--fold", "all"), "head-rate=1e-3", 60, 8, "accuracy_mean"),
    Case("speaker", "VoxCeleb1-layout", (), "", 15, 10, "accuracy"),
    Case("verification", "VoxCeleb1-layout", (), "", 15, 10, "eer"),
    Case("slots", "slu-coffee", (), "lstm-units=128 head-rate=2e-3", 30, 8, "cer"),
    Case(
        "asr",
        "LibriSpeech",
        ("--valid", "", "--test", "test-other"),
        "lstm-units=128 head-rate=2e-3",
        12,
        4,
        "wer",
    ),
)
"""Epochs and LSTMs are smaller than the recipes' for the time it takes; rates fit that."""


def finetune(
    case: Case, data: Path, checkpoint: str, unfrozen: bool, model: str, output: Path
) -> float:
    """Run `ssl_core.finetune`; its score on the test set.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    epochs = case.unfrozen_epochs if unfrozen else case.frozen_epochs
    changes = " ".join([case.changes, *(["backbone-rate=1e-3"] if model == "tiny" else [])])
    subprocess.run(
        [
            sys.executable, "-m", "ssl_core.finetune", "--task", case.task,
            "--data", str(data / case.folder), "--checkpoint", checkpoint, "--model", model,
            "--unfrozen" if unfrozen else "--frozen", "--epochs", str(epochs), *case.options,
            "--set", changes,
            "--output", str(output),
        ],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return float(json.loads((output / "result.json").read_text(encoding="utf-8"))[case.score])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all; returns the exit code."""
    parser = command.Parser(prog="python -m benchmarks.downstream", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpora")
    parser.add_argument(
        "--checkpoint", nargs="*", default=[], metavar="NAME=DIR", help="backbones to compare"
    )
    parser.add_argument("--tasks", nargs="*", default=[case.task for case in CASES])
    parser.add_argument(
        "--unfrozen", nargs="*", default=[case.task for case in CASES], help="tasks to unfreeze for"
    )
    parser.add_argument("--model", default="tiny", help="preset of the random backbone")
    parser.add_argument("--output", type=Path, help="where to keep the run directories")
    options = parser.parse_args(arguments)
    output = options.output or Path(tempfile.mkdtemp(prefix="downstream-"))
    backbones = {"logmel": "logmel", "random": "random"}
    for text in options.checkpoint:
        name, equals, path = text.partition("=")
        if not equals or not Path(path).is_dir():
            raise UsageError(f"--checkpoint {text}: write NAME=DIR, a checkpoint directory")
        backbones[name] = str(Path(path).resolve())
    console, found = Console(stderr=True), {}
    cases = [case for case in CASES if case.task in options.tasks]
    ways = [
        (name, unfrozen)
        for unfrozen in (False, True)
        for name in backbones
        if not (unfrozen and name == "logmel")
    ]
    for case in cases:
        for name, unfrozen in ways:
            if unfrozen and case.task not in options.unfrozen:
                continue
            way = "unfrozen" if unfrozen else "frozen"
            folder = output / f"{case.task}-{name}-{way}"
            data = options.data.resolve()
            try:
                score = finetune(case, data, backbones[name], unfrozen, options.model, folder)
            except subprocess.CalledProcessError as error:
                console.print(error.stderr[-2000:], markup=False, highlight=False)
                raise
            found[f"{case.task}_{name}_{way}"] = round(score, 4)
            console.print(f"{case.task} {name} {way}: {score:.4f}", highlight=False)
    table = Table(title="Test scores, %")
    for title in (
        "task",
        *(f"{name}, {'un' if unfrozen else ''}frozen" for name, unfrozen in ways),
    ):
        table.add_column(title)
    for case in cases:
        scores = (
            found.get(f"{case.task}_{name}_{'un' if unfrozen else ''}frozen")
            for name, unfrozen in ways
        )
        label = f"{case.task} ({case.score.removesuffix('_mean')})"
        table.add_row(label, *("" if score is None else f"{100 * score:.1f}" for score in scores))
    console.print(table)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    command.run(main)
