"""The paper's Figure 1: how long utterances and recut sequences are."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common.figures import save_figure
from common.units import format_length
from partitions.lengths import sequence_seconds
from partitions.manifest import Manifest
from partitions.sampling import SAMPLE_RATE


def plot_lengths(manifests: list[Manifest], path: Path) -> None:
    """Draw the lengths of the utterances and of each recut set, like the paper's Figure 1.

    On the left the number of sequences by length (logarithmic); on the right the longest, mean and
    shortest of each set.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    sets = [(f"{format_length(each.length)} set", sequence_seconds(each)) for each in manifests]
    if manifests and manifests[0].utterance_lengths:
        source = np.array(manifests[0].utterance_lengths) / SAMPLE_RATE
        sets.insert(0, ("utterances", source))
    figure = Figure(figsize=(10, 4), layout="constrained")
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
