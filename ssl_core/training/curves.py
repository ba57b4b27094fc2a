"""Training curves, drawn from the metrics of a run."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.figures import new_figure, plots, save_figure

Rows = Sequence[Mapping[str, Any]]

_PANELS = (
    (
        "contrastive loss (nats)",
        (("contrastive", "training"), ("held_out_loss", "held-out speakers")),
    ),
    (
        "contrastive accuracy",
        (("accuracy", "training"), ("held_out_accuracy", "held-out speakers")),
    ),
    ("code perplexity", (("perplexity", "training"), ("held_out_perplexity", "held-out speakers"))),
)


@plots
def plot_curves(
    runs: Mapping[str, Rows], path: Path, *, negatives: int, unit: str = "update"
) -> None:
    """Plot loss, accuracy and code perplexity of one or more runs side by side.

    Args:
        runs: metrics by run name; each row has `updates_done` and the plotted names, or None where
            a number was not finite, which is skipped.
        path: PNG file to write.
        negatives: per masked frame, for the chance level.
        unit: label of the horizontal axis.
    """
    figure = new_figure(13, 3.8)
    for axes, (title, series) in zip(figure.subplots(1, 3), _PANELS, strict=True):
        for number, (run, rows) in enumerate(runs.items()):
            for name, label in series:
                points = [
                    (row["updates_done"], row[name]) for row in rows if row.get(name) is not None
                ]
                if not points:
                    continue
                held_out = name.startswith("held_out")
                axes.plot(
                    *zip(*points, strict=True),
                    color=f"C{number}",
                    alpha=1.0 if held_out else 0.4,
                    linewidth=2 if held_out else 1,
                    label=f"{run}, {label}" if len(runs) > 1 else label,
                )
        if "accuracy" in title:
            axes.axhline(1 / (negatives + 1), color="0.5", linestyle=":", label="chance")
            axes.axhline(5 / (negatives + 1), color="0.5", linestyle="--", label="5 times chance")
            axes.set_ylim(bottom=0)
        if "loss" in title:
            axes.axhline(math.log(negatives + 1), color="0.5", linestyle=":", label="chance")
        axes.set_title(title)
        axes.set_xlabel(unit)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(figure, path)
