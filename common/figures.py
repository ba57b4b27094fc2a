"""Saves figures whole or not at all, without a display."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from matplotlib.figure import Figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG through a temporary file; the same figure gives the same bytes.

    Raises:
        OSError: the disk is full or the folder cannot be written; an old file stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as stream:
            figure.savefig(stream, format="png", metadata={"Software": None})
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
