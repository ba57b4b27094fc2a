"""Federated and central pretraining of `tiny` on the same recordings, for the same updates.

`python -m benchmarks.learning --data LibriSpeech` runs both, one after the other, draws their
curves and prints one JSON object as its last line.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import command
from ssl_core.training.curves import plot_curves
from ssl_core.training.run_directory import RunDirectory
from ssl_core.wav2vec2.config import preset

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "benchmarks" / "figures" / "learning.png"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both and compare; returns the exit code."""
    parser = command.Parser(prog="python -m benchmarks.learning", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="LibriSpeech")
    parser.add_argument("--rounds", type=int, default=50, help="rounds of the federation")
    parser.add_argument("--clients-per-round", type=int, default=8, help="size of the cohort")
    parser.add_argument("--local-updates", type=int, default=4, help="updates of a client a round")
    parser.add_argument("--batch", type=int, default=4, help="crops of a client's batch")
    parser.add_argument("--output", type=Path, help="where to keep the two run directories")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="PNG to draw")
    options = parser.parse_args(arguments)
    output = options.output or Path(tempfile.mkdtemp(prefix="learning-"))
    shared = [
        "--data", str(options.data), "--model", "tiny", "--length", "5s", "--precision", "auto",
        "--eval-crops", "48",
    ]  # fmt: skip
    federated = [
        str(ROOT / "simulation" / "run.py"), *shared, "--clients", "100",
        "--rounds", str(options.rounds), "--clients-per-round", str(options.clients_per_round),
        "--local-updates", str(options.local_updates), "--batch", str(options.batch),
        "--output", str(output / "federated"),
    ]  # fmt: skip
    central = [
        "-m", "ssl_core.train", *shared,
        "--updates", str(options.rounds * options.local_updates),
        "--batch", str(options.clients_per_round * options.batch), "--eval-every", "10",
        "--output", str(output / "central"),
    ]  # fmt: skip
    for program in (federated, central):
        subprocess.run([sys.executable, *program], cwd=ROOT, check=True)
    runs = {name: RunDirectory(output / name).metrics() for name in ("federated", "central")}
    negatives = preset("tiny").num_negatives
    plot_curves(runs, options.figure, negatives=negatives, unit="global update")
    print(json.dumps(_summary(runs, 1 / (negatives + 1))))
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
