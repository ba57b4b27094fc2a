"""Personal fine-tuning: personal heads beside one global head and beside training alone.

`python -m benchmarks.personal --data SPEECH-COMMANDS --checkpoint DIR` runs the same federation
with each method, from the same backbone and for the same number of updates. Every client is tested
on clips of its own that it never trained on. The last line is one JSON object.
"""

import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from jsonargparse.typing import PositiveInt
from matplotlib.figure import Figure

from common import command, strict_json
from common.figures import save_figure
from common.options import settings_parser
from common.settings import parse
from ssl_core.downstream.task_recipe import TaskRecipe, recipe_of

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "benchmarks" / "figures" / "personal.png"
BATCH = 8
"""Clips in a client's batch unless given."""
METHODS = {"global": "fedavg", "fedper": "fedper", "fedrep": "fedrep", "local": "local"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PersonalSettings:
    """The task, the federation, and how often it is run."""

    data: Path
    """The task's corpus."""
    checkpoint: str
    """Directory of a backbone, or random."""
    task: str = "kws35"
    """Downstream task."""
    partition: Literal["speaker", "labels", "iid"] = "labels"
    """How clips are divided among clients."""
    share: Literal["backbone", "layers", "lora"] = "layers"
    """Part of the backbone that is trained and shared."""
    clients: PositiveInt = PositiveInt(12)
    """Clients, all of them in every round."""
    rounds: PositiveInt = PositiveInt(20)
    """Rounds of a run."""
    local_updates: PositiveInt = PositiveInt(8)
    """Updates a client takes in a round."""
    recipe: TaskRecipe = recipe_of("kws35")
    """The task's recipe unless given, with batches of 8."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; each method runs once with each."""
    output: Path | None = None
    """Folder for the run directories; a temporary one without it."""
    figure: Path = FIGURE
    """PNG to draw."""

    SHORT: ClassVar[dict[str, str]] = {"batch": "recipe.batch"}

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The task's recipe; raises `UsageError` where there is no such task."""
        recipe = recipe_of(str(given.get("task", cls.task)))
        return {"recipe": dataclasses.replace(recipe, batch=BATCH)}

    def recipe_options(self) -> list[str]:
        """Options of the simulation for everything that differs from the task's recipe."""
        own = recipe_of(self.task)
        return [
            word
            for name, value in vars(self.recipe).items()
            if name == "batch" or value != getattr(own, name)
            for word in (f"--recipe.{name.replace('_', '-')}", str(value).lower())
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all methods; returns the exit code."""
    parser = settings_parser(
        PersonalSettings, prog="python -m benchmarks.personal", description=__doc__
    )
    settings, _ = parse(PersonalSettings, parser, arguments)
    output = settings.output or Path(tempfile.mkdtemp(prefix="personal-"))
    scores: dict[str, list[float]] = {}
    for name, method in METHODS.items():
        scores[name] = []
        for seed in settings.seeds:
            folder = output / f"{name}-{seed}"
            # FedRep takes as many updates of the head as of the shared part.
            updates = settings.local_updates // 2 if method == "fedrep" else settings.local_updates
            subprocess.run(
                [
                    sys.executable, str(ROOT / "simulation" / "run.py"), "--task", settings.task,
                    "--data", str(settings.data.resolve()), "--checkpoint", settings.checkpoint,
                    "--model", "tiny", "--method", method, "--share", settings.share,
                    "--partition", settings.partition, "--clients", str(settings.clients),
                    "--clients-per-round", str(settings.clients), "--rounds", str(settings.rounds),
                    "--local-updates", str(updates), *settings.recipe_options(),
                    "--seed", str(seed), "--output", str(folder),
                ],
                cwd=ROOT, check=True,
            )  # fmt: skip
            found = strict_json.loads((folder / "personal.json").read_text(encoding="utf-8"))
            scores[name] += [client["score"] for client in found["by_client"].values()]
    _draw(scores, settings.figure)
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
    print(strict_json.dumps({key: round(value, 4) for key, value in result.items()}))
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
