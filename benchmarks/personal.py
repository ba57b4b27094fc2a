"""Personal fine-tuning: personal heads beside one global head, and beside training alone.

`python -m benchmarks.personal --data SPEECH-COMMANDS --checkpoint DIR` runs the same federation by
each method, from the same backbone and for the same updates, and prints one JSON object as its last
line. Every client is tested on clips of its own that it never trained on.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common import command
from common.figures import save_figure

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "benchmarks" / "figures" / "personal.png"
METHODS = {"global": "fedavg", "fedper": "fedper", "fedrep": "fedrep", "local": "local"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all methods; returns the exit code."""
    parser = command.Parser(prog="python -m benchmarks.personal", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the task's corpus")
    parser.add_argument("--checkpoint", required=True, help="a backbone, or random")
    parser.add_argument("--task", default="kws35")
    parser.add_argument("--partition", default="labels", choices=("speaker", "labels", "iid"))
    parser.add_argument("--share", default="layers", choices=("backbone", "layers", "lora"))
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--local-updates", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--recipe", default="", help="changes of the task's recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each")
    parser.add_argument("--output", type=Path, help="where to keep the run directories")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="PNG to draw")
    options = parser.parse_args(arguments)
    output = options.output or Path(tempfile.mkdtemp(prefix="personal-"))
    scores: dict[str, list[float]] = {}
    for name, method in METHODS.items():
        scores[name] = []
        for seed in options.seeds:
            folder = output / f"{name}-{seed}"
            # FedRep divides its updates between head and shared part.
            updates = options.local_updates // 2 if method == "fedrep" else options.local_updates
            subprocess.run(
                [
                    sys.executable, str(ROOT / "simulation" / "run.py"), "--task", options.task,
                    "--data", str(options.data.resolve()), "--checkpoint", options.checkpoint,
                    "--model", "tiny", "--method", method, "--share", options.share,
                    "--partition", options.partition, "--clients", str(options.clients),
                    "--clients-per-round", str(options.clients), "--rounds", str(options.rounds),
                    "--local-updates", str(updates), "--batch", str(options.batch),
                    "--seed", str(seed), "--recipe", options.recipe, "--output", str(folder),
                ],
                cwd=ROOT, check=True,
            )  # fmt: skip
            found = json.loads((folder / "personal.json").read_text(encoding="utf-8"))
            scores[name] += [client["score"] for client in found["by_client"].values()]
    _draw(scores, options.figure)
    result: dict[str, float] = {}
    for name, values in scores.items():
        result[f"{name}_mean"] = float(np.mean(values))
        result[f"{name}_deviation"] = float(np.std(values))
    pairs = np.subtract(scores["fedper"], scores["global"])
    result["fedper_above_global_mean"] = float(pairs.mean())
    result["fedper_above_global_error"] = float(pairs.std() / np.sqrt(len(pairs)))
    pairs = np.subtract(scores["fedrep"], scores["global"])
    result["fedrep_above_global_mean"] = float(pairs.mean())
    result["fedrep_above_global_error"] = float(pairs.std() / np.sqrt(len(pairs)))
    result["clients"] = len(scores["global"])
    print(json.dumps({key: round(value, 4) for key, value in result.items()}))
    return 0


def _draw(scores: dict[str, list[float]], path: Path) -> None:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.boxplot([100 * np.array(values) for values in scores.values()], showmeans=True)
    axes.set_xticks(range(1, len(scores) + 1), list(scores))
    axes.set_ylabel("accuracy of a client on its own clips (%)")
    axes.grid(axis="y", alpha=0.3)
    save_figure(figure, path)


if __name__ == "__main__":
    command.run(main)
