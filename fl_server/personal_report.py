"""Reports the scores of personal fine-tuning: each client's, their mean and spread, a figure."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common import strict_json
from common.atomic import write_text
from common.figures import new_figure, plots, save_figure
from fl_client.federation_settings import TaskFederation

REPORT, FIGURE = "personal.json", "personal.png"
_NAMED = 60
"""Most clients whose bars are labelled with their numbers."""


def write_personal_report(
    folder: Path,
    settings: TaskFederation,
    metric: str,
    found: Mapping[int, Mapping[str, float]],
    failures: tuple[str, ...],
) -> list[str]:
    """Write `personal.json` and `personal.png`.

    Args:
        folder: the run directory.
        settings: of the run.
        metric: of the task.
        found: metrics of the clients' final evaluation, by key; clients without a usable test clip
            have no score and are listed separately.
        failures: a line for each client without metrics.

    Returns:
        Lines to print: failures, clients not scored, mean and spread.
    """
    name = "accuracy" if metric == "eer" else metric
    keys = sorted(key for key in found if found[key]["test_clips"])
    unscored = sorted(found.keys() - keys)
    scores = np.array([found[key]["test_after"] for key in keys])
    result = {
        "task": settings.task,
        "method": settings.method,
        "share": settings.share,
        "metric": name,
        "clients": len(keys),
        "mean": float(scores.mean()) if len(keys) else None,
        "deviation": float(scores.std()) if len(keys) else None,
        "test_clips": int(sum(found[key]["test_clips"] for key in keys)),
        "by_client": {
            str(key): {"score": found[key]["test_after"], "clips": int(found[key]["test_clips"])}
            for key in keys
        },
        "not_scored": unscored,
        "failures": list(failures),
    }
    write_text(folder / REPORT, strict_json.dumps(result, indent=2) + "\n")
    lines = [f"  {failure}" for failure in failures]
    lines += [f"  client {key}: none of its test clips can be used, not scored" for key in unscored]
    if not keys:
        return [*lines, "no client could be evaluated"]
    _plot_scores(folder / FIGURE, keys, scores, name)
    lines.append(
        f"{settings.method}, {len(keys)} clients on their own clips: {name} "
        f"{100 * scores.mean():.2f} % (spread {100 * scores.std():.2f}, from "
        f"{100 * scores.min():.1f} to {100 * scores.max():.1f})"
    )
    return lines


@plots
def _plot_scores(path: Path, keys: list[int], scores: NDArray[np.float64], name: str) -> None:
    """Plot the score of each client, `[client]`."""
    shown = min(len(keys), _NAMED)
    figure = new_figure(max(5.0, 0.22 * shown + 3), 3.4)
    axes = figure.subplots()
    places = range(len(keys))
    if len(keys) <= _NAMED:
        axes.bar(places, 100 * scores)
        axes.set_xticks(places, [str(key) for key in keys])
    else:
        axes.fill_between(places, 100 * scores, step="mid")
    axes.axhline(100 * scores.mean(), color="C3", label=f"mean {100 * scores.mean():.1f} %")
    axes.set_xlabel("client")
    axes.set_ylabel(f"{name} on its own clips (%)")
    axes.tick_params(axis="x", rotation=90)
    axes.legend()
    save_figure(figure, path)
