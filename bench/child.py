"""A function in a process of its own, so that nobody sees another's memory, patches or fate."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

LIMIT = 300
"""Seconds a process may take, by default, before it is ended and written down as a failure."""


def context(device: str) -> Any:
    """How processes start: on a CPU forked from one that has imported the trainer, which takes longer than a tiny run.

    One of the imports might start CUDA, and that does not survive a fork.
    """
    made = multiprocessing.get_context("spawn" if device == "cuda" else "forkserver")
    if device != "cuda":
        made.set_forkserver_preload(["llama_pro_fast.train", "transformers.models.llama.modeling_llama"])
    return made


class Child:
    """A process that imports what the running script does, waits for its turn, runs a function and sends its result."""

    def __init__(self, device: str) -> None:
        processes = context(device)
        self._connection, theirs = processes.Pipe()
        self._process = processes.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def result(self, function: Callable[..., Any], *arguments: Any, limit: float = LIMIT) -> dict[str, Any]:
        """What the function returns, or ``{"status": …, "error": class and message}``, even where the process dies."""
        try:
            self._connection.send((function, arguments))
            if self._connection.poll(limit):
                result = self._connection.recv()
                self._process.join(10)  # it only tidies up
                return result
            return {"status": "failed", "error": f"TimeoutError: no result after {limit:g} s"}
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            return {"status": "failed", "error": how}
        finally:
            self.end()

    def end(self) -> None:
        """End it, whatever it is doing; then its memory is free."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._connection.close()


class Children:
    """One process after another: ``with Children(device) as children: children.result(function, …)``.

    On a GPU the next process imports what it needs, which takes as long as a few steps, while one runs; it does not
    touch the GPU before its turn. A CPU would be disturbed.
    """

    def __init__(self, device: str) -> None:
        self._device, self._next = device, None

    def result(self, function: Callable[..., Any], *arguments: Any, limit: float = LIMIT) -> dict[str, Any]:
        child = self._next or Child(self._device)
        self._next = Child(self._device) if self._device == "cuda" else None
        return child.result(function, *arguments, limit=limit)

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._next is not None:
            self._next.end()


def _serve(connection: Connection) -> None:
    with contextlib.suppress(EOFError, BrokenPipeError):  # nobody is waiting any more
        function, arguments = connection.recv()
        try:
            result = function(*arguments)
        except Exception as error:
            traceback.print_exc()
            text = (str(error).strip().splitlines() or [""])[0]
            status = "out of memory" if _out_of_memory(error) else "failed"
            result = {"status": status, "error": f"{type(error).__name__}: {text}"}
        connection.send(result)


def _out_of_memory(error: Exception) -> bool:
    """Of the device: PyTorch's allocator says so by a class, libraries that take memory beside it by words."""
    words = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
