"""A progress bar on stderr with the time left, shown only on a terminal."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")


def bar_of(console: Console, show: bool = True) -> Progress:
    """A bar with counts, time gone and time left on a console; hidden where it is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("time left"),
        TimeRemainingColumn(),
        console=console,
        disable=not (show and console.is_terminal),
    )


def track(items: Iterable[Item], total: int, text: str, show: bool) -> Iterator[Item]:
    """Pass `items` on, counting them on a bar with `show` and where stderr is a terminal."""
    with bar_of(Console(stderr=True), show) as bar:
        yield from bar.track(items, total=total, description=text)
