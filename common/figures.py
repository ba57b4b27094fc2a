"""Saves figures atomically, without a display."""

from pathlib import Path

from matplotlib.figure import Figure

from common.atomic import replacing


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG atomically; the same figure gives the same bytes.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file is kept.
    """
    with replacing(path, sync=False) as partial, open(partial, "wb") as stream:
        figure.savefig(stream, format="png", metadata={"Software": None})
