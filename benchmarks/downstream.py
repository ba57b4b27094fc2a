"""Downstream tasks on real speech: the project's checkpoints beside random and log-mel floors.

`python -m benchmarks.downstream --data DATA --checkpoint central=DIR federated=DIR --output DIR`
fine-tunes every task on every backbone, frozen and unfrozen. Given the same `--output` again, it
resumes where it was stopped; `DIR/scores.json` holds the scores so far. The last line is one JSON
object.
"""

import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from rich.console import Console
from rich.table import Table

from common import command, strict_json
from common.atomic import write_text
from common.errors import ShortwaveError, UsageError
from common.options import settings_parser
from common.settings import parse
from ssl_core.downstream.corpora import asr

ROOT = Path(__file__).parents[1]
SCORES = "scores.json"
TaskName = Literal["kws35", "kws12", "emotion", "speaker", "verification", "slots", "asr"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)


class Case(NamedTuple):
    """A task on a corpus."""

    task: TaskName
    folder: str
    """Of the corpus, in the folder of corpora; for slots and asr made in the output folder."""
    options: str
    """Further options of `ssl_core.finetune`."""
    frozen_epochs: int
    unfrozen_epochs: int
    backbone_rate: str
    """Learning rate of an unfrozen `tiny`."""
    score: str
    """Name of the score in `result.json`."""


CASES = (
    Case("kws35", "SpeechCommands", "", 100, 15, "1e-3", "accuracy"),
    Case("kws12", "SpeechCommands", "", 100, 30, "1e-3", "accuracy"),
    Case(
        "emotion",
        "emotion-emodb",
        "--fold all --recipe.head-rate 1e-3",
        60,
        8,
        "1e-3",
        "accuracy_mean",
    ),
    Case("speaker", "VoxCeleb1-layout", "", 15, 10, "1e-4", "accuracy"),
    Case("verification", "VoxCeleb1-layout", "", 15, 10, "1e-4", "eer"),
    Case(
        "slots",
        "spoken-commands",
        "--recipe.lstm-units 128 --recipe.head-rate 2e-3",
        30,
        20,
        "1e-4",
        "cer",
    ),
    Case(
        "asr",
        "by-heart",
        "--test test-other --score-train --recipe.lstm-units 256 --recipe.head-rate 2e-3 "
        "--recipe.dropout 0 --recipe.anneal 1 --recipe.backbone-anneal 1 --recipe.batch 4",
        50,
        40,
        "1e-4",
        "wer",
    ),
)
"""Fewer epochs and smaller LSTMs than in the recipes, to save time, with rates to match."""

VOICES = 4
"""Multiplies the voices of the tests: 24 to train on, 4 to validate and 4 to test on."""
UTTERANCES = 40
"""The shortest utterances of LibriSpeech, which speech recognition memorises."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DownstreamSettings:
    """Which tasks to fine-tune on which backbones."""

    data: Path
    """Folder of the corpora."""
    checkpoint: tuple[str, ...] = ()
    """Backbones to compare, each as NAME=DIR."""
    tasks: tuple[TaskName, ...] = TASKS
    """Tasks to take."""
    unfrozen: tuple[TaskName, ...] = TASKS
    """Tasks to take with an unfrozen backbone too."""
    model: str = "tiny"
    """Preset of the random backbone."""
    threads: int = 0
    """CPU threads of a run; 0 is torch's choice."""
    output: Path | None = None
    """Folder for the run directories; a temporary one without it."""

    def backbones(self) -> dict[str, str]:
        """Values of `--checkpoint` of `ssl_core.finetune` by name of the backbone.

        Raises:
            UsageError: not NAME=DIR, or no such directory.
        """
        found = {"logmel": "logmel", "random": "random"}
        for text in self.checkpoint:
            name, equals, path = text.partition("=")
            if not equals or not Path(path).is_dir():
                raise UsageError(f"--checkpoint {text}: write NAME=DIR, a checkpoint directory")
            found[name] = str(Path(path).resolve())
        return found


def by_heart(corpus: Path, folder: Path, count: int) -> None:
    """Make a LibriSpeech that trains and validates on the same few short utterances.

    The best epoch is then the one that has memorised them best. `test-other` is the corpus's own.

    Args:
        corpus: LibriSpeech with `train-clean-100` and `test-other`.
        folder: to make, of links.
        count: how many of the shortest training utterances.
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
    """The corpus of a case; those of slots (spoken by espeak-ng) and asr are made here."""
    if case.task not in ("slots", "asr"):
        return data / case.folder
    folder = output / case.folder
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=output) as name:
            partial = Path(name) / "corpus"
            if case.task == "asr":
                by_heart(data / "LibriSpeech", partial, UTTERANCES)
            else:
                # in a process of its own, as espeak-ng keeps state for as long as a process lives
                subprocess.run(
                    [sys.executable, "-m", "benchmarks.spoken_commands", str(partial), str(VOICES)],
                    cwd=ROOT, check=True,
                )  # fmt: skip
            partial.rename(folder)
    return folder


def finetune(
    case: Case,
    data: Path,
    checkpoint: str,
    unfrozen: bool,
    settings: DownstreamSettings,
    run: Path,
) -> dict[str, Any]:
    """The scores of `ssl_core.finetune`; resumes a run that was stopped, skips one that is done.

    Args:
        case: task and options.
        data: corpus of the task.
        checkpoint: directory of a backbone, `random` or `logmel`.
        unfrozen: whether the backbone is trained too.
        settings: preset and threads.
        run: run directory.

    Raises:
        ShortwaveError: the run failed.
    """
    epochs = case.unfrozen_epochs if unfrozen else case.frozen_epochs
    rate = ["--recipe.backbone-rate", case.backbone_rate] if settings.model == "tiny" else []
    arguments = [
        "--task", case.task, "--data", str(data), "--checkpoint", checkpoint,
        "--model", settings.model, "--unfrozen" if unfrozen else "--frozen",
        "--epochs", str(epochs), *case.options.split(), *rate,
        "--threads", str(settings.threads), "--output", str(run),
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
    found: dict[str, Any] = strict_json.loads((run / "result.json").read_text(encoding="utf-8"))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all; returns the exit code."""
    parser = settings_parser(
        DownstreamSettings, prog="python -m benchmarks.downstream", description=__doc__
    )
    settings, _ = parse(DownstreamSettings, parser, arguments)
    output = (settings.output or Path(tempfile.mkdtemp(prefix="downstream-"))).resolve()
    output.mkdir(parents=True, exist_ok=True)
    backbones = settings.backbones()
    ways = [
        (name, unfrozen)
        for unfrozen in (False, True)
        for name in backbones
        if not (unfrozen and name == "logmel")
    ]
    cases = [case for case in CASES if case.task in settings.tasks]
    console, scores = Console(stderr=True), dict[str, float]()
    for name, unfrozen in ways:
        for case in cases:
            if unfrozen and case.task not in settings.unfrozen:
                continue
            key = _key(case.task, name, unfrozen)
            data = _made(case, settings.data.resolve(), output)
            found = finetune(case, data, backbones[name], unfrozen, settings, output / key)
            scores[key] = round(float(found[case.score]), 4)
            memorised = ""
            if "train_wer" in found:
                scores[f"{key}_train"] = round(float(found["train_wer"]), 4)
                memorised = f" (training set {found['train_wer']:.4f})"
            write_text(output / SCORES, strict_json.dumps(scores, indent=2) + "\n")
            console.print(f"{key}: {case.score} {scores[key]:.4f}{memorised}", highlight=False)
    console.print(_table(cases, ways, scores))
    print(strict_json.dumps(scores))
    return 0


def _key(task: str, name: str, unfrozen: bool) -> str:
    return f"{task}_{name}_{'unfrozen' if unfrozen else 'frozen'}"


def _table(
    cases: Sequence[Case], ways: Sequence[tuple[str, bool]], scores: dict[str, float]
) -> Table:
    table = Table(title="Test scores, %; for asr also those on the training set")
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
