"""Tables for people, with rich; imported only when one is printed. Texts are never taken for markup."""

from __future__ import annotations

import sys

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

UNWRAPPED = 10_000
"""Characters; output that goes to a file or a pipe is never wrapped."""


def console() -> Console:
    """The standard output as rich sees it: colours on a terminal only, and not under NO_COLOR."""
    width = None if sys.stdout.isatty() else UNWRAPPED
    return Console(width=width, highlight=False, markup=False, emoji=False)


def table(*headings: str) -> Table:
    """An empty table; a heading that ends in ``:r`` makes a column of numbers."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in headings:
        text, _, kind = heading.partition(":")
        made.add_column(text, justify="right" if kind == "r" else "left", overflow="fold")
    return made


def facts() -> Table:
    """An empty two-column table of names and values."""
    made = Table.grid(padding=(0, 2))
    made.add_column(style="bold")
    made.add_column(overflow="fold")
    return made
