"""The worker processes of one preparation: fed with units, listened to, and gone when it ends, however it ends.

They are processes of their own and not of `multiprocessing`, which would import the main module of whoever calls this
once more in each. They share no terminal with the main process, so Ctrl-C reaches them through it alone.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import llama_pro_fast
from llama_pro_fast.errors import UserError
from llama_pro_fast.text.documents import Unit

PATH = "LLAMA_PRO_FAST_PATH"
START = (
    f"import json, os, sys; sys.path[:] = json.loads(os.environ[{PATH!r}]); "
    "from llama_pro_fast.text.worker import main; main()"
)
"""What a worker runs. By PYTHONPATH a folder with a colon in its name could not be given."""
ANSWER = b"\0"
"""Begins a line of a worker's answers."""
WAIT_SECONDS = 0.25
"""At most, between two calls of ``tick``: what it raises ends the work."""


class Pool:
    """Worker processes.

    Args:
        init: the first line that each is fed.
        count: how many; each has its share of the ``cpus`` as threads.
    """

    def __init__(self, init: dict[str, Any], count: int, cpus: int) -> None:
        threads = max(1, cpus // count)
        self._init, self._count = json.dumps(init | {"threads": threads}).encode() + b"\n", count
        path, home = [*sys.path], str(Path(llama_pro_fast.__file__).parent.parent)
        if home not in path:
            path.append(home)  # last, as where packages are installed: nothing there may shadow the standard library
        self._environment = os.environ | {
            PATH: json.dumps([*filter(None, path)]),  # a worker imports what this process would
            "RAYON_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false" if threads == 1 else "true",
            "OMP_NUM_THREADS": "1",
        }
        self._workers: list[_Worker] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in self._workers:
            worker.process.kill()  # one that is done only waits for more
        for worker in self._workers:
            worker.process.wait()
            with suppress(OSError):  # what it was not read any more
                worker.process.stdin.close()
            worker.process.stdout.close()

    def work(
        self, units: Sequence[tuple[int, Unit]], heard: Callable[[int, Sequence[int]], Any], tick: Callable[[], Any]
    ) -> Iterator[tuple[int, dict[str, Any], list[str]]]:
        """(number, note, damaged shards) of each unit, as they are done.

        Args:
            units: with their numbers, in the order in which they are begun.
            heard: called with a unit's number and its progress (see :mod:`llama_pro_fast.text.worker`).
            tick: called all the time.

        Raises:
            UserError: a worker did, or was ended from outside.
            OSError: the cache cannot be written.
        """
        waiting = iter(units)
        with selectors.DefaultSelector() as selector:
            for _ in range(self._count):
                try:
                    self._workers.append(worker := _Worker(self._environment, self._count))
                except OSError as error:
                    raise UserError(
                        f"{self._count} processes that tokenise cannot be started ({error.strerror}): give fewer "
                        "--data.workers"
                    ) from error
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
                tick()
            for worker in self._workers:
                worker.send(self._init)
                worker.begin(waiting)
                tick()
            while any(worker.unit is not None for worker in self._workers):
                for ready, _ in selector.select(WAIT_SECONDS):
                    worker = ready.data
                    for answer in worker.answers():
                        heard(worker.unit, answer["progress"])
                        if "note" in answer:
                            yield worker.unit, answer["note"], answer["damaged"]
                            worker.begin(waiting)
                tick()


class _Worker:
    def __init__(self, environment: dict[str, str], count: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
            start_new_session=True,
        )
        self.unit: int | None = None
        self._count, self._left = count, b""

    def begin(self, waiting: Iterator[tuple[int, Unit]]) -> None:
        """Take up the next unit, if there is one."""
        self.unit, unit = next(waiting, (None, None))
        if unit is not None:
            self.send(json.dumps(unit.as_dict()).encode() + b"\n")

    def send(self, line: bytes) -> None:
        view = memoryview(line)
        try:
            while view:
                view = view[self.process.stdin.write(view) :]
        except BrokenPipeError:
            pass  # it has ended: why is known when its answers are read

    def answers(self) -> Iterator[dict[str, Any]]:
        """What it has said since."""
        data = os.read(self.process.stdout.fileno(), 2**16)
        if not data:
            raise self._death()
        *lines, self._left = (self._left + data).split(b"\n")
        for line in lines:
            if not line.startswith(ANSWER):
                continue  # said by what is imported before the worker has its output to itself
            answer = json.loads(line.removeprefix(ANSWER))
            if "refused" in answer:
                raise UserError(answer["refused"])
            if "cache" in answer:
                raise OSError(*answer["cache"])
            if "failed" in answer:
                raise RuntimeError(f"a worker failed:\n{answer['failed']}")
            yield answer

    def _death(self) -> Exception:
        code = self.process.wait()
        fewer = f"give fewer --data.workers than {self._count}"
        if code == -signal.SIGKILL:
            return UserError(f"a process that tokenises was killed, as is done where memory runs out: {fewer}")
        return UserError(f"a process that tokenises ended by itself ({_words(code)}): if memory is short, {fewer}")


def _words(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
