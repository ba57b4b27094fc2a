"""A progress bar on stderr with the time left, shown only on a terminal."""

from collections.abc import Callable, Iterable, Iterator
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


def track(
    items: Iterable[Item],
    total: int,
    text: str,
    show: bool,
    count: Callable[[Item], int] = lambda _: 1,
) -> Iterator[Item]:
    """Pass `items` on, counting them on a bar with `show` and where stderr is a terminal.

    `count`: what an item counts for.
    """
    with bar_of(Console(stderr=True), show) as bar:
        task = bar.add_task(text, total=total)
        for item in items:
            yield item
            bar.advance(task, count(item))
