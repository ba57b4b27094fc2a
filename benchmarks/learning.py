"""Federated and centralised pretraining of `tiny`: same recordings, same number of updates.

`python -m benchmarks.learning --data LibriSpeech` runs one after the other and draws their curves.
The last line is one JSON object.
"""

import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from common import command, strict_json
from common.options import settings_parser
from common.settings import parse
from ssl_core.training.curves import plot_curves
from ssl_core.training.run_directory import RunDirectory
from ssl_core.wav2vec2.config import preset

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "benchmarks" / "figures" / "learning.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningSettings:
    """What to pretrain on, and for how long."""

    data: Path
    """LibriSpeech."""
    rounds: PositiveInt = PositiveInt(50)
    """Rounds of the federation."""
    clients_per_round: PositiveInt = PositiveInt(8)
    """Size of the cohort."""
    local_updates: PositiveInt = PositiveInt(4)
    """Updates a client takes in a round."""
    batch: PositiveInt = PositiveInt(4)
    """Crops in a client's batch."""
    output: Path | None = None
    """Folder for the two run directories; a temporary one without it."""
    figure: Path = FIGURE
    """PNG to draw."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both and compare; returns the exit code."""
    parser = settings_parser(
        LearningSettings, prog="python -m benchmarks.learning", description=__doc__
    )
    settings, _ = parse(LearningSettings, parser, arguments)
    output = settings.output or Path(tempfile.mkdtemp(prefix="learning-"))
    shared = [
        "--data", str(settings.data), "--model", "tiny", "--length", "5s", "--precision", "auto",
        "--eval-crops", "48",
    ]  # fmt: skip
    federated = [
        str(ROOT / "simulation" / "run.py"), *shared, "--clients", "100",
        "--rounds", str(settings.rounds), "--clients-per-round", str(settings.clients_per_round),
        "--local-updates", str(settings.local_updates), "--batch", str(settings.batch),
        "--output", str(output / "federated"),
    ]  # fmt: skip
    central = [
        "-m", "ssl_core.train", *shared,
        "--updates", str(settings.rounds * settings.local_updates),
        "--batch", str(settings.clients_per_round * settings.batch), "--eval-every", "10",
        "--output", str(output / "central"),
    ]  # fmt: skip
    for program in (federated, central):
        subprocess.run([sys.executable, *program], cwd=ROOT, check=True)
    runs = {name: RunDirectory(output / name).metrics() for name in ("federated", "central")}
    negatives = preset("tiny").num_negatives
    plot_curves(runs, settings.figure, negatives=negatives, unit="global update")
    print(strict_json.dumps(_summary(runs, 1 / (negatives + 1))))
    return 0


def _summary(runs: dict[str, list[dict[str, Any]]], chance: float) -> dict[str, float]:
    result: dict[str, float] = {}
    for name, rows in runs.items():
        held = [row for row in rows if "held_out_accuracy" in row]
        last, half = held[-1], held[len(held) // 2]
        result |= {
            f"{name}_updates": last["updates_done"],
            f"{name}_accuracy_over_chance": last["held_out_accuracy"] / chance,
            f"{name}_accuracy_over_chance_half_way": half["held_out_accuracy"] / chance,
            f"{name}_loss": last["held_out_loss"],
            f"{name}_perplexity": last["held_out_perplexity"],
        }
        seconds = "round_seconds" if "round_seconds" in last else "step_seconds"
        result[f"{name}_minutes"] = sum(row[seconds] for row in rows) / 60
    return {key: round(value, 4) for key, value in result.items()}


if __name__ == "__main__":
    command.run(main)
