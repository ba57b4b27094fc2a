"""Reports a recut corpus: counts and lengths as a table, lengths as the paper's Figure 1."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.figures import new_figure, plots, save_figure
from common.units import format_length, format_seconds
from partitions.manifest import Manifest
from partitions.sampling import SAMPLE_RATE


@dataclass(frozen=True)
class Summary:
    """Statistics of one recut set; lengths are in seconds."""

    length: float
    sequences: int
    speakers: int
    hours: float
    mean: float
    minimum: float
    maximum: float
    remainder_seconds: float
    remainder_speakers: int
    remainder_fraction: float
    """Fraction of the audio that is in no sequence."""


def summary(manifest: Manifest) -> Summary:
    """Compute the statistics of a recut set."""
    lengths = sequence_seconds(manifest)
    return Summary(
        length=manifest.length,
        sequences=len(lengths),
        speakers=len(manifest.speakers),
        hours=manifest.seconds / 3600,
        mean=float(lengths.mean()),
        minimum=float(lengths.min()),
        maximum=float(lengths.max()),
        remainder_seconds=manifest.remainder_seconds,
        remainder_speakers=manifest.remainder_speakers,
        remainder_fraction=manifest.remainder_samples / max(1, manifest.total_samples),
    )


def table(manifests: list[Manifest]) -> str:
    """A Markdown table with a row for the original utterances and one for each recut set."""
    columns = ("speakers", "audio", "mean (s)", "min (s)", "max (s)", "remainder", "fraction")
    lines = [
        f"| set | sequences | {' | '.join(columns)} |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    if manifests and len(manifests[0].utterance_lengths):
        lengths = manifests[0].utterance_lengths.astype(np.float64) / SAMPLE_RATE
        lines.append(
            f"| utterances | {len(lengths)} | | {format_seconds(lengths.sum())} "
            f"| {lengths.mean():.2f} | {lengths.min():.2f} | {lengths.max():.2f} | | |"
        )
    for row in map(summary, manifests):
        lines.append(
            f"| {format_length(row.length)} | {row.sequences} | {row.speakers} "
            f"| {format_seconds(row.hours * 3600)} | {row.mean:.2f} | {row.minimum:.2f} "
            f"| {row.maximum:.2f} | {format_seconds(row.remainder_seconds)} "
            f"of {row.remainder_speakers} speakers | {row.remainder_fraction:.2%} |"
        )
    return "\n".join(lines) + "\n"


def sequence_seconds(manifest: Manifest) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Length of each sequence in seconds, `[sequence]`."""
    return manifest.sequences.samples.astype(np.float64) / SAMPLE_RATE


@plots
def plot_lengths(manifests: list[Manifest], path: Path) -> None:
    """Plot the lengths of the utterances and of each recut set, as in the paper's Figure 1.

    Left: histogram of the lengths, with a logarithmic count. Right: maximum, mean and minimum of
    each set.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    sets = [(f"{format_length(each.length)} set", sequence_seconds(each)) for each in manifests]
    if manifests and len(manifests[0].utterance_lengths):
        source = manifests[0].utterance_lengths.astype(np.float64) / SAMPLE_RATE
        sets.insert(0, ("utterances", source))
    figure = new_figure(10, 4)
    counts, extremes = figure.subplots(1, 2, width_ratios=(3, 2))
    longest = max(float(lengths.max()) for _, lengths in sets)
    edges = np.arange(0, longest + 0.5, 0.25)
    for index, (name, lengths) in enumerate(sets):
        colour = "0.65" if name == "utterances" else f"C{index}"
        counts.hist(lengths, bins=edges, color=colour, alpha=0.8, label=name)
        extremes.vlines(index, lengths.min(), lengths.max(), color=colour)
        marks = (lengths.min(), lengths.mean(), lengths.max())
        extremes.hlines(marks, index - 0.2, index + 0.2, color=colour)
        extremes.annotate(f"{lengths.mean():.1f} s", (index + 0.23, lengths.mean()), va="center")
    counts.set(xlabel="length (s)", ylabel="sequences", yscale="log")
    counts.legend()
    extremes.set_xticks(range(len(sets)), [name for name, _ in sets])
    extremes.set(ylabel="length (s): longest, mean, shortest", xlim=(-0.5, len(sets)))
    save_figure(figure, path)
