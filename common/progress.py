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
    """A bar with counts, elapsed time and time left; hidden if the console is not a terminal."""
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
    """Yield `items`, counting them on a progress bar on stderr.

    Args:
        items: what to iterate over.
        total: the sum of `count` over all items.
        text: label of the bar.
        show: whether to show the bar; it needs a terminal as well.
        count: steps of the bar for an item.
    """
    with bar_of(Console(stderr=True), show) as bar:
        task = bar.add_task(text, total=total)
        for item in items:
            yield item
            bar.advance(task, count(item))
