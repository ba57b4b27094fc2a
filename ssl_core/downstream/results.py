"""Writes and shows the results of a fine-tuned model: scores, predictions, figures."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from common import strict_json
from common.atomic import write_text
from common.figures import new_figure, plots, save_figure
from common.units import format_number
from partitions.sampling import SAMPLE_RATE
from ssl_core.downstream.clips import Trial
from ssl_core.downstream.scoring import Scored

PREDICTIONS, RESULT = "predictions.tsv", "result.json"
_MOST_CLASSES = 60
Readable = Callable[[str], str]


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write `result.json`."""
    text = strict_json.dumps(dict(result), indent=2, ensure_ascii=False)
    write_text(folder / RESULT, text + "\n")


def write_predictions(folder: Path, scored: Scored, readable: Readable = str) -> None:
    """Write `predictions.tsv`, with the expected and predicted label or text of each clip.

    Args:
        folder: of the results.
        scored: the clips.
        readable: makes labels and texts readable.
    """
    lines = ["clip\tseconds\texpected\tpredicted"]
    for clip, expected, found in zip(scored.clips, scored.expected, scored.predicted, strict=True):
        seconds = clip.piece.samples / SAMPLE_RATE
        lines.append(f"{clip.name}\t{seconds:.3f}\t{readable(expected)}\t{readable(found)}")
    write_text(folder / PREDICTIONS, "\n".join(lines) + "\n")


def write_trials(folder: Path, trials: Sequence[Trial], cosines: Sequence[float]) -> None:
    """Write `predictions.tsv` of verification: files, whether of the same speaker, score.

    Args:
        folder: of the results.
        trials: pairs of files.
        cosines: score of each trial.
    """
    lines = ["first\tsecond\tsame\tcosine"]
    for trial, cosine in zip(trials, cosines, strict=True):
        lines.append(f"{trial.first}\t{trial.second}\t{int(trial.same)}\t{cosine:.6f}")
    write_text(folder / PREDICTIONS, "\n".join(lines) + "\n")


@plots
def plot_confusion(folder: Path, scored: Scored, labels: Sequence[str]) -> None:
    """Plot the confusion matrix, each row divided by its sum, to `confusion.png`.

    With fewer than 2 or more than 60 classes there is no figure.

    Args:
        folder: of the results.
        scored: the clips.
        labels: all classes, in the order of rows and columns.
    """
    present = [label for label in labels if label in {*scored.expected, *scored.predicted}]
    if not 1 < len(present) <= _MOST_CLASSES:
        return
    places = {label: place for place, label in enumerate(present)}
    counts = np.zeros((len(present), len(present)))
    for expected, found in zip(scored.expected, scored.predicted, strict=True):
        if expected in places:
            counts[places[expected], places[found]] += 1
    fractions = counts / counts.sum(1, keepdims=True).clip(1)
    side = max(4.0, 0.28 * len(present) + 2)
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    image = axes.imshow(fractions, vmin=0, vmax=1, cmap="Blues")
    axes.set_xticks(range(len(present)), present, rotation=90)
    axes.set_yticks(range(len(present)), present)
    axes.set_xlabel("predicted")
    axes.set_ylabel("expected")
    if len(present) <= 15:
        for (row, column), fraction in np.ndenumerate(fractions):
            if counts[row, column]:
                color = "white" if fraction > 0.5 else "black"
                text = f"{int(counts[row, column])}"
                axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, label="fraction of the clips of a class")
    save_figure(figure, folder / "confusion.png")


@plots
def plot_learning(folder: Path, rows: Sequence[Mapping[str, Any]], metric: str) -> None:
    """Plot loss and metric by epoch to `curves.png`.

    Args:
        folder: of the results.
        rows: metrics of the epochs.
        metric: name of the recipe's metric.
    """
    figure = new_figure(9, 3.6)
    name = "accuracy" if metric == "eer" else metric
    panels = (
        ("loss (nats)", (("loss", "training"), ("valid_loss", "validation"))),
        (name, (("accuracy", "training"), (f"valid_{name}", "validation"))),
    )
    for axes, (title, series) in zip(figure.subplots(1, 2), panels, strict=True):
        for key, label in series:
            points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=label)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(figure, folder / "curves.png")


def show_result(console: Console, title: str, result: Mapping[str, Any]) -> None:
    """Print the scores as a table.

    Args:
        console: to print to.
        title: of the table.
        result: values by name; only numbers and strings are shown.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("", justify="left")
    table.add_column("", justify="right")
    for name, value in result.items():
        if isinstance(value, float):
            shown = format_number(value, 4)
        elif isinstance(value, int | str):
            shown = str(value)
        else:
            continue
        table.add_row(name.replace("_", " "), shown)
    console.print(table)


def show_errors(console: Console, scored: Scored, readable: Readable = str, most: int = 5) -> None:
    """Print the most frequent confusions, or the first wrong transcripts.

    Args:
        console: to print to.
        scored: the clips.
        readable: makes labels and texts readable.
        most: confusions or transcripts to print.
    """
    wrong = [
        pair for pair in zip(scored.expected, scored.predicted, strict=True) if pair[0] != pair[1]
    ]
    if not wrong:
        return
    if max(len(expected) for expected, _ in wrong) < 30:
        for (expected, found), count in Counter(wrong).most_common(most):
            console.print(
                f"  {readable(expected)} predicted as {readable(found)}: {count}",
                highlight=False, markup=False,
            )  # fmt: skip
        return
    for expected, found in wrong[:most]:
        console.print(f"  expected:  {readable(expected)}", highlight=False, markup=False)
        console.print(f"  predicted: {readable(found)}", highlight=False, markup=False)
