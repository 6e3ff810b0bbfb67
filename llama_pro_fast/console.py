"""What a run says on the terminal: a box before the first step, one aligned line per logged step, a card at the end."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich.box import ROUNDED
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError it is called for: rich itself would end the process with 1


console = _Console(highlight=False, soft_wrap=False, emoji=False)


def say(text: str) -> None:
    """A line of progress."""
    console.print(text, markup=False, overflow="ignore", crop=False, no_wrap=True)


class _Unheard:
    """A text stream that never fails: what the one below cannot spell is replaced, what it does not take is dropped.

    It goes on trying, so that a log whose disk was full for a while goes on too.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            self.write(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError):  # ValueError: it is closed
            pass
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        return not self._stream.closed and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unheard() -> Iterator[None]:
    """Inside, nobody has to listen: a reader that went away, a closed terminal, a full disk under the log, a stream
    that is missing or knows only ASCII end nothing, whoever prints, we or a library."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        sys.stdout, sys.stderr = (_Unheard(stream or nowhere) for stream in before)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            for stream in filter(None, before):
                flush_or_give_up(stream)


def flush_or_give_up(stream: TextIO) -> OSError | None:
    """Flush; where that fails, send what the stream holds, and all that follows, nowhere, and return the error.

    Python flushes once more at its end, and would fail there.
    """
    try:
        stream.flush()
    except ValueError:  # it is closed
        pass
    except OSError as error:
        with open(os.devnull, "w") as nowhere, contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere.fileno(), stream.fileno())
        return error
    return None


def open_missing_streams() -> None:
    """Give a process that was started without stdin, stdout or stderr (``>&-``) an empty one.

    Else the next file that is opened takes its number, and gets what libraries write there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open as long as the process


LOG_SECONDS = 60.0
"""In a log, which keeps what it is told, a wait is heard of once in so many seconds."""


@contextmanager
def waiting(text: str) -> Iterator[Callable[[str], None]]:
    """A line that is gone when the wait is over, and a function that changes it; in a log a line a minute."""
    said = time.monotonic()

    def update(text: str) -> None:
        nonlocal said
        status.update(text)
        if not console.is_terminal and time.monotonic() - said >= LOG_SECONDS:
            say(text)
            said = time.monotonic()

    with console.status(text) as status:
        yield update


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
