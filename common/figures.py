"""Makes and saves figures, without a display; skips them where matplotlib is not installed."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from common.atomic import replacing

if TYPE_CHECKING:  # a device has no matplotlib
    from matplotlib.figure import Figure

log = logging.getLogger("shortwave.figures")
P = ParamSpec("P")


@functools.cache
def has_figures() -> bool:
    """Whether matplotlib is installed; if not, a warning says so once."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        log.warning("no figures are drawn: matplotlib is missing (the extra `reports` has it)")
        return False
    return True


def plots(function: Callable[P, None]) -> Callable[P, None]:
    """Decorate a function that saves a figure: without matplotlib it does nothing."""

    @functools.wraps(function)
    def plot(*arguments: P.args, **options: P.kwargs) -> None:
        if has_figures():
            function(*arguments, **options)

    return plot


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG atomically; the same figure gives the same bytes.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file is kept.
    """
    metadata: dict[str, Any] = {"Software": None}
    with replacing(path, sync=False) as partial, open(partial, "wb") as stream:
        figure.savefig(stream, format="png", metadata=metadata)
