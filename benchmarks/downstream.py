"""Downstream tasks on real speech: random and log-mel floors beside the project's checkpoints.

`python -m benchmarks.downstream --data DATA --checkpoint central=DIR federated=DIR --output DIR`
fine-tunes every task on every backbone, frozen and unfrozen, and prints one JSON object as its last
line. With the same `--output` it goes on where it was stopped; what is done is in
`DIR/scores.json`.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from common import command
from common.atomic import write_text
from common.errors import ShortwaveError, UsageError
from ssl_core.downstream.tasks import asr

ROOT = Path(__file__).parents[1]
SCORES = "scores.json"


class Case(NamedTuple):
    """A task on the recordings beside the checkout, or on what is made of them."""

    task: str
    folder: str
    """In the folder of the corpora; of slots and asr, what `_made` makes."""
    options: tuple[str, ...]
    changes: str
    """Of the recipe."""
    frozen_epochs: int
    unfrozen_epochs: int
    backbone_rate: str
    """Of `tiny`."""
    score: str
    """Its name in `result.json`."""


CASES = (
    Case("kws35", "SpeechCommands", (), "", 100, 15, "1e-3", "accuracy"),
    Case("kws12", "SpeechCommands", (), "", 100, 30, "1e-3", "accuracy"),
    Case(
        "emotion",
        "emotion-emodb",
        ("--fold", "all"),
        "head-rate=1e-3",
        60,
        8,
        "1e-3",
        "accuracy_mean",
    ),
    Case("speaker", "VoxCeleb1-layout", (), "", 15, 10, "1e-4", "accuracy"),
    Case("verification", "VoxCeleb1-layout", (), "", 15, 10, "1e-4", "eer"),
    Case("slots", "spoken-commands", (), "lstm-units=128 head-rate=2e-3", 30, 20, "1e-4", "cer"),
    Case(
        "asr",
        "by-heart",
        ("--test", "test-other", "--score-train", "yes"),
        "lstm-units=256 head-rate=2e-3 dropout=0 anneal=1 backbone-anneal=1 batch=4",
        50,
        40,
        "1e-4",
        "wer",
    ),
)
"""Epochs and LSTMs are smaller than the recipes' for the time it takes; rates fit that."""

VOICES = 4
"""Times as many voices as in the tests: 24 to train on, 4 to validate and 4 to test on."""
UTTERANCES = 40
"""Of LibriSpeech, the shortest, that speech recognition learns by heart."""


def by_heart(corpus: Path, folder: Path, count: int) -> None:
    """Make LibriSpeech with its shortest training utterances, which are validated on as well.

    The best epoch is then that which knows them best. The subset to test on is the corpus' own.

    Args:
        corpus: LibriSpeech with `train-clean-100` and `test-other`.
        folder: to make, of links.
        count: how many utterances.
    """
    data = asr.read(corpus, ("train-clean-100",), (), ())
    clips = sorted((*data.train, *data.valid), key=lambda clip: (clip.piece.samples, clip.name))
    for subset in ("train-clean-100", "dev-clean"):
        for clip in clips[:count]:
            audio = data.root / clip.piece.path
            speaker, chapter, _ = audio.stem.split("-")
            place = folder / subset / speaker / chapter
            place.mkdir(parents=True, exist_ok=True)
            (place / audio.name).symlink_to(audio)
            with open(place / f"{speaker}-{chapter}.trans.txt", "a", encoding="utf-8") as stream:
                stream.write(f"{audio.stem} {clip.text}\n")
    (folder / "test-other").symlink_to(data.root / "test-other")


def _made(case: Case, data: Path, output: Path) -> Path:
    """The corpus of a case; slots' is spoken here, that of asr is a part of LibriSpeech."""
    if case.task not in ("slots", "asr"):
        return data / case.folder
    folder = output / case.folder
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=output) as name:
            partial = Path(name) / "corpus"
            if case.task == "asr":
                by_heart(data / "LibriSpeech", partial, UTTERANCES)
            else:
                # espeak-ng keeps its state for as long as a process lives.
                subprocess.run(
                    [sys.executable, "-m", "benchmarks.spoken_commands", str(partial), str(VOICES)],
                    cwd=ROOT, check=True,
                )  # fmt: skip
            partial.rename(folder)
    return folder


def finetune(
    case: Case, data: Path, checkpoint: str, unfrozen: bool, options: Any, run: Path
) -> dict[str, Any]:
    """What `ssl_core.finetune` found, now or before; a run that was stopped goes on.

    Raises:
        ShortwaveError: it failed.
    """
    epochs = case.unfrozen_epochs if unfrozen else case.frozen_epochs
    rate = [f"backbone-rate={case.backbone_rate}"] if options.model == "tiny" else []
    arguments = [
        "--task", case.task, "--data", str(data), "--checkpoint", checkpoint,
        "--model", options.model, "--unfrozen" if unfrozen else "--frozen",
        "--epochs", str(epochs), *case.options, "--set", " ".join([case.changes, *rate]).strip(),
        "--threads", str(options.threads), "--output", str(run),
    ]  # fmt: skip
    if (run / "config.yaml").exists():
        arguments = ["--resume", str(run)]
    if not (run / "result.json").exists():
        done = subprocess.run(
            [sys.executable, "-m", "ssl_core.finetune", *arguments],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise ShortwaveError(f"{run.name}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all; returns the exit code."""
    tasks = [case.task for case in CASES]
    parser = command.Parser(prog="python -m benchmarks.downstream", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpora")
    parser.add_argument(
        "--checkpoint", nargs="*", default=[], metavar="NAME=DIR", help="backbones to compare"
    )
    parser.add_argument("--tasks", nargs="*", default=tasks, choices=tasks, metavar="TASK")
    parser.add_argument(
        "--unfrozen", nargs="*", default=tasks, choices=tasks, metavar="TASK",
        help="tasks to unfreeze for",
    )  # fmt: skip
    parser.add_argument("--model", default="tiny", help="preset of the random backbone")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a run")
    parser.add_argument("--output", type=Path, help="where to keep the run directories")
    options = parser.parse_args(arguments)
    output = (options.output or Path(tempfile.mkdtemp(prefix="downstream-"))).resolve()
    output.mkdir(parents=True, exist_ok=True)
    backbones = {"logmel": "logmel", "random": "random"}
    for text in options.checkpoint:
        name, equals, path = text.partition("=")
        if not equals or not Path(path).is_dir():
            raise UsageError(f"--checkpoint {text}: write NAME=DIR, a checkpoint directory")
        backbones[name] = str(Path(path).resolve())
    ways = [
        (name, unfrozen)
        for unfrozen in (False, True)
        for name in backbones
        if not (unfrozen and name == "logmel")
    ]
    cases = [case for case in CASES if case.task in options.tasks]
    console, scores = Console(stderr=True), dict[str, float]()
    for name, unfrozen in ways:
        for case in cases:
            if unfrozen and case.task not in options.unfrozen:
                continue
            key = _key(case.task, name, unfrozen)
            data = _made(case, options.data.resolve(), output)
            found = finetune(case, data, backbones[name], unfrozen, options, output / key)
            scores[key] = round(float(found[case.score]), 4)
            learnt = ""
            if "train_wer" in found:
                scores[f"{key}_train"] = round(float(found["train_wer"]), 4)
                learnt = f" (training set {found['train_wer']:.4f})"
            write_text(output / SCORES, json.dumps(scores, indent=2) + "\n")
            console.print(f"{key}: {case.score} {scores[key]:.4f}{learnt}", highlight=False)
    console.print(_table(cases, ways, scores))
    print(json.dumps(scores))
    return 0


def _key(task: str, name: str, unfrozen: bool) -> str:
    return f"{task}_{name}_{'unfrozen' if unfrozen else 'frozen'}"


def _table(
    cases: Sequence[Case], ways: Sequence[tuple[str, bool]], scores: dict[str, float]
) -> Table:
    table = Table(title="Test scores, %; of asr those of the training set too")
    table.add_column("task")
    for name, unfrozen in ways:
        table.add_column(f"{name}, {'un' if unfrozen else ''}frozen", justify="right")
    for case in cases:
        cells = []
        for name, unfrozen in ways:
            key = _key(case.task, name, unfrozen)
            found = [scores[own] for own in (key, f"{key}_train") if own in scores]
            cells.append(" / ".join(f"{100 * score:.1f}" for score in found))
        table.add_row(f"{case.task} ({case.score.removesuffix('_mean')})", *cells)
    return table


if __name__ == "__main__":
    command.run(main)
