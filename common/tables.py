"""Prints tables so that nothing in them is cut off."""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_WIDEST = 1000
"""Columns of the widest table in a pipe or file."""


def console_for(table: Table) -> Console:
    """A console on stdout that, unless it is a terminal, is wide enough for the table."""
    console = Console()
    if not console.is_terminal:
        options = console.options.update(max_width=_WIDEST)
        console.width = max(console.width, Measurement.get(console, options, table).maximum)
    return console
