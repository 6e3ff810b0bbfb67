"""How a run is asked to stop: Ctrl-C, or what a scheduler sends before it takes the machine away."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from llama_pro_fast.ranks import ALONE, Ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """The process was asked to stop, and what it had to save is saved.

    Attributes:
        number: of the signal; a process that ends by it exits with 128 + ``number``.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        return 128 + self.number


class StopSignals:
    """The first of :data:`SIGNALS` raises :class:`Stopped`: at once, or while the run is :meth:`patient` only where it
    looks (:meth:`check`). A second Ctrl-C ends the process at once.

    One that the process inherited as ignored, as under nohup, stays so. Only the main thread may handle signals; in
    another one they are left to the program that started it.

    Of several ranks each hears of its own signal alone, so while they are patient they stop only where they have agreed
    on it (:meth:`agreed`).
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.requested: int | None = None
        self._patient = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """In here a signal waits for the next :meth:`check`."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def check(self) -> None:
        """Where a run of one process can be left.

        Raises:
            Stopped: it is to be.
        """
        if self.requested is not None and self.ranks.count == 1:
            raise Stopped(self.requested)

    def agreed(self, row: Sequence[int] = ()) -> list[list[int]]:
        """Where all ranks can be left, and what each says there: ``row`` of whole numbers.

        Raises:
            Stopped: one of them was asked to stop.
        """
        rows = self.ranks.table([self.requested or 0, *row])
        if number := max(asked for asked, *_ in rows):
            raise Stopped(number)
        return [said for _, *said in rows]

    def _ask(self, number: int, frame: Any) -> None:
        if self.requested is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # a scheduler that repeats itself
        if self.ranks.ending.is_set():
            return  # it ends already, and says why
        self.requested = number
        if not self._patient:
            raise Stopped(number)
        if sys.__stderr__ is not None and self.ranks.leads:
            # Not through the stream: the signal may have come in the middle of a write to it.
            with suppress(OSError, ValueError):
                os.write(
                    sys.__stderr__.fileno(), b"stopping; a second Ctrl-C ends at once, from the last checkpoint on\n"
                )
