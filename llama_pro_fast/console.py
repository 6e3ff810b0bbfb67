"""What a run says on the terminal: a box before the first step, one aligned line per logged step, a card at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.box import ROUNDED
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

console = Console(highlight=False, soft_wrap=False, emoji=False)


def say(text: str) -> None:
    """A line of progress."""
    console.print(text, markup=False, overflow="ignore", crop=False, no_wrap=True)


@contextmanager
def waiting(text: str) -> Iterator[Callable[[str], None]]:
    """A line that is gone when the wait is over, and a function that changes it; nothing where nobody would see it."""
    with console.status(text) as status:
        yield status.update


def box(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """A titled box of ``name  value`` rows."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    # As `Text`, since in a string rich takes `[...]` for markup, and a text may well hold code.
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    console.print(Panel(table, title=Text(title), title_align="left", box=ROUNDED, expand=False))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> None:
    """A table whose columns after the first ``words`` are figures."""
    grid = Table(title=Text(title), title_justify="left", title_style="", box=ROUNDED, expand=False)
    for index, column in enumerate(columns):
        grid.add_column(column, justify="left" if index < words else "right", overflow="fold")
    for row in rows:
        grid.add_row(*map(Text, row))
    console.print(grid)


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


def amount(number: float) -> str:
    """``8.36 B``, ``1.62 M``, ``512``."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None] | None]:
    """A function ``(what, done, total)`` that draws a bar for each ``what`` on stderr; None if that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description:16}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, object] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield progress
