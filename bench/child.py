"""A function in a process of its own, so that nobody sees another's memory, patches or fate."""

from __future__ import annotations

import contextlib
import importlib
import math
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

LIMIT = 300
"""Seconds a process may take, by default, before it is ended and written down as a failure."""
READY = "ready"


class Child:
    """A process that imports what it will need, waits for its turn, runs ``function`` and sends its result.

    On a GPU the next contestant's process is started while another runs: imports take as long as a few steps. It does
    not touch the GPU before its turn.

    Args:
        imports: modules to import first, beside those of the running script.
    """

    def __init__(self, device: str, function: Any, *arguments: Any, imports: Sequence[str] = ()) -> None:
        # A forkserver has PyTorch and transformers imported already, which is most of a tiny round; but one of the
        # imports might start CUDA, and that does not survive a fork.
        context = multiprocessing.get_context("spawn" if device == "cuda" else "forkserver")
        if device != "cuda":
            llama = "transformers.models.llama.modeling_llama"
            context.set_forkserver_preload(["llama_pro_fast.model", "llama_pro_fast.optimizer", llama])
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_child, args=(function, arguments, imports, theirs))
        self._process.start()
        theirs.close()

    def result(self, limit: float = LIMIT) -> dict[str, Any]:
        """Its turn: what the function returns, or ``{"status": …, "error": class and message}``, even where it dies.

        Args:
            limit: seconds that getting ready, and then the function, may take.
        """
        try:
            message = self._receive(limit)
            if message == READY:
                self._connection.send("go")
                message = self._receive(limit)
            self._process.join(10)  # it only tidies up
            return message
        except TimeoutError as error:
            return {"status": "failed", "error": f"TimeoutError: {error}"}
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            return {"status": "failed", "error": how}
        finally:
            self.end()

    def _receive(self, limit: float) -> Any:
        if not self._connection.poll(limit):
            raise TimeoutError(f"no result after {limit:g} s")
        return self._connection.recv()

    def end(self) -> None:
        """End it, whatever it is doing; then its memory is free."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._connection.close()


@dataclass(frozen=True)
class Job:
    """A function for a process of its own.

    Attributes:
        key: whose result it will be.
        unless: asked before it is started, and again at its turn: whether it is left out after all.
    """

    key: Any
    function: Any
    arguments: tuple
    imports: Sequence[str] = ()
    unless: Callable[[], bool] = lambda: False


def in_turn(
    jobs: Iterator[Job], device: str, *, limit: float = LIMIT, deadline: float = math.inf
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Keys and results of ``jobs``, one at a time; after ``deadline`` (of `time.monotonic`) none but the first starts.

    On a GPU a job is asked for and started while the one before it runs. A CPU would be disturbed.
    """

    def start() -> tuple[Job, Child] | None:
        job = next((job for job in jobs if not job.unless()), None)
        return job and (job, Child(device, job.function, *job.arguments, imports=job.imports))

    waiting, first = start(), True
    try:
        while waiting and (first or time.monotonic() < deadline):
            (job, child), waiting, first = waiting, None, False
            try:
                if device == "cuda":
                    waiting = start()
                # It may have been started before the result that speaks against it.
                result = None if job.unless() else child.result(limit)
            finally:
                child.end()
            if result is not None:
                yield job.key, result
            waiting = waiting or start()
    finally:
        if waiting:
            waiting[1].end()


def in_child(device: str, function: Any, *arguments: Any) -> dict[str, Any]:
    """``function``'s result from a process of its own, at once."""
    return Child(device, function, *arguments).result()


def _child(function: Any, arguments: tuple, imports: Sequence[str], connection: Connection) -> None:
    try:
        for name in imports:
            importlib.import_module(name)
        connection.send(READY)
        try:
            connection.recv()
        except EOFError:
            return  # nobody is waiting any more
        result = function(*arguments)
    except Exception as error:
        traceback.print_exc()
        text = (str(error).strip().splitlines() or [""])[0]
        status = "out of memory" if _out_of_memory(error) else "failed"
        result = {"status": status, "error": f"{type(error).__name__}: {text}"}
    with contextlib.suppress(BrokenPipeError):
        connection.send(result)


def _out_of_memory(error: Exception) -> bool:
    """Of the device: PyTorch's allocator says so by a class, libraries that take memory beside it by words."""
    words = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
