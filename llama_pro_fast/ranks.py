"""The processes that make a run together, as torchrun starts them: each takes its part of every step.

Rank 0 leads: it prepares, writes and speaks for all. What the ranks agree on goes through a group of its own (gloo), so
no agreement waits for a device. An error that one rank finds is raised on all, and told once.
"""

from __future__ import annotations

import atexit
import functools
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from llama_pro_fast.console import console, say
from llama_pro_fast.errors import ToldElsewhere, UserError
from llama_pro_fast.files import first_line

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""Others wait for as long as the first one prepares text or saves; that one has died is heard at once all the same."""
JOINING = timedelta(minutes=10)
"""For the last to come; and for what ranks then send at the same time, such as a step's gradients."""
PAUSE = 20.0
"""Seconds without a word to one who waits for the others."""
NEWS = 2.0
"""Seconds in which a rank that ends by an error has left word of it."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Attributes:
        number: its own, from 0.
        count: how many there are.
        local: its number on its machine.
        on_machine: how many there are on its machine.
        host: the group for agreements; None where it is alone.
        store: where ranks leave word of errors.
        ending: set from when another rank's end is heard of: what a launcher then sends is no news.
    """

    number: int = 0
    count: int = 1
    local: int = 0
    on_machine: int = 1
    host: Any = None
    store: Any = None
    ending: threading.Event = field(default_factory=threading.Event)

    @property
    def leads(self) -> bool:
        return self.number == 0

    def gather(self, value: T) -> list[T]:
        """The value of each rank."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        self._heard(lambda: distributed.all_gather_object(found, value, group=self.host))
        return found

    def share(self, value: T) -> T:
        """The first rank's value."""
        if self.count == 1:
            return value
        values = [value]
        self._heard(lambda: distributed.broadcast_object_list(values, src=0, group=self.host))
        return values[0]

    def table(self, row: Sequence[int]) -> list[list[int]]:
        """Whole numbers of each rank, as many of each: :meth:`gather` as fast as it goes, for every step. A rank whose
        machine has vanished is missed here, after a while."""
        if self.count == 1:
            return [list(row)]
        own = torch.tensor(row, dtype=torch.int64)
        rows = [torch.empty_like(own) for _ in range(self.count)]
        self._heard(lambda: distributed.all_gather(rows, own))  # in the group whose patience is shorter
        return [each.tolist() for each in rows]

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Put the sum over the ranks in place of each tensor, wherever these are. All ranks get the same bits."""
        if self.count > 1:
            self._heard(
                lambda: [work.wait() for work in [distributed.all_reduce(each, async_op=True) for each in tensors]]
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """Ranks leave this as one: what is refused on one of them is refused on all.

        Raises:
            UserError: the error of the first rank that has one.
        """
        error = None
        try:
            yield
        except UserError as found:
            if self.count == 1:
                raise
            error = found
        for number, text in enumerate(self.gather(error and f"{socket.gethostname()}: {error}")):
            if text is not None:
                if number == self.number == 0:
                    raise error
                where, _, what = text.partition(": ")
                self._raise(f"rank {number} on {where}: {what}")

    def check_same(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Prove that replicated tensors, of 4 bytes an element, are the same on all ranks; waits for the device.

        Raises:
            UserError: naming the first that is not, and whose it is.
        """
        if self.count == 1:
            return
        rows = self.table(torch.stack([_checksum(each) for each in tensors.values()]).tolist())
        for number, row in enumerate(rows):
            for name, own, first in zip(tensors, row, rows[0], strict=True):
                if own != first:
                    self._raise(
                        f"rank {number} has another {name} than rank 0, though both made the same updates: one of the "
                        "devices miscomputes; go on from the last checkpoint without it"
                    )

    def leave_word(self, error: BaseException) -> None:
        """Of an error that ends this rank alone; whoever leads tells it."""
        if self.count > 1 and not self.leads:
            with suppress(RuntimeError):
                self.store.set(f"error/{self.number}", f"{socket.gethostname()}: {error}")

    def _raise(self, text: str) -> None:
        raise UserError(text) if self.leads else ToldElsewhere(text)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """In here what PyTorch itself sends between ranks may fail because one has ended.

        Raises:
            UserError: that it has.
        """
        try:
            yield
        except Exception as error:
            if self.count > 1 and is_lost(error):
                self._raise_lost(error)
            raise

    def _heard(self, operation: Callable[[], Any]) -> None:
        """Do what needs all ranks.

        Raises:
            UserError: one of them is gone.
        """
        with self.listening():
            operation()

    def _raise_lost(self, error: Exception) -> None:
        """What is left to say where another rank has ended: its own words, if it has left any. Where the first rank is
        the one that is gone, the second speaks."""
        self.ending.set()
        until, told = time.monotonic() + NEWS * (1 if self.leads else 1.5), False
        while self.number < 2 and not told and time.monotonic() < until:
            for number in range(1, self.count) if self.leads else ():
                with suppress(RuntimeError):
                    if self.store.check([key := f"error/{number}"]):
                        where, _, what = self.store.get(key).decode().partition(": ")
                        self.store.set("told", "")
                        raise UserError(f"rank {number} on {where}: {what}") from error
            with suppress(RuntimeError):
                told = not self.leads and self.store.check(["told"])
            time.sleep(0.1)
        if self.leads:
            with suppress(RuntimeError):
                self.store.set("told", "")
        kind = UserError if self.leads or (self.number == 1 and not told) else ToldElsewhere
        silent = any(words in str(error).lower() for words in _SILENT)
        what = f"has not answered for {JOINING.seconds // 60} minutes" if silent else "has ended"
        raise kind(
            f"rank {self.number}: another process of this run {what}, and this one ends with it ({first_line(error)}); "
            "what it said stands above, or in torchrun's summary; go on with --resume"
        ) from _Lost(str(error))


class _Lost(Exception):
    """The cause of an error that another rank's end is."""


def is_lost(error: Exception) -> bool:
    """Whether an error of PyTorch says that another rank is not there any more."""
    if not isinstance(error, RuntimeError):  # of which PyTorch's errors of its groups are kinds
        return False
    said = str(error).lower()
    known = isinstance(error, distributed.DistNetworkError) or any(words in said for words in _LOST + _SILENT)
    return known and "cuda error" not in said


_LOST = ("connection", "broken pipe", "socket closed", "remote process exited", "nccl communicator was aborted")
_SILENT = ("timed out", "timeout")
"""What gloo and NCCL say of it, in small letters."""


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun, or another launcher by the same variables, has started with this process among them.

    Raises:
        UserError: they do not find each other.
    """
    count = _number("WORLD_SIZE", 1)
    if count == 1:
        yield ALONE
        return
    ranks = _join(count)
    quiet, console.quiet = console.quiet, not ranks.leads
    try:
        yield ranks
    except BaseException as error:
        atexit.unregister(_leave)  # the others may be gone, and leaving in order waits for them
        if not isinstance(error, UserError) or isinstance(error, ToldElsewhere):
            raise
        if ranks.leads or isinstance(error.__cause__, _Lost):
            raise
        ranks.leave_word(error)
        raise ToldElsewhere(str(error)) from error
    finally:
        console.quiet = quiet


@functools.cache
def _join(count: int) -> Ranks:
    """Once for the life of the process."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {count} and not set: {', '.join(missing)}; start several processes by torchrun, or unset "
            "WORLD_SIZE"
        )
    number, gpus = _number("RANK", 0), torch.cuda.device_count()
    if not 0 <= number < count:
        raise UserError(
            f"RANK is {number}, not one of {count}; start several processes by torchrun, or unset WORLD_SIZE"
        )
    waiting = threading.Timer(PAUSE, _say_waiting, [count])
    waiting.daemon = True
    waiting.start()
    local = _number("LOCAL_RANK", number % gpus if gpus else number)
    try:
        store, number, count = next(distributed.rendezvous("env://", timeout=JOINING))
        store = distributed.PrefixStore(_fresh_prefix(store, number, count), store)
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        distributed.init_process_group(backend, store=store, rank=number, world_size=count, timeout=JOINING)
        host = distributed.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {os.environ['RANK']} of {count} cannot join the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}: {str(error).splitlines()[0]}; is the port free, and the address reachable?"
        ) from error
    finally:
        waiting.cancel()
    atexit.register(_leave)
    return Ranks(number, count, local, _number("LOCAL_WORLD_SIZE", 1), host, store)


def _say_waiting(count: int) -> None:
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    say(
        f"rank {os.environ['RANK']} waits for the others of {count} at {where}, {JOINING.seconds // 60} minutes at most"
    )


def _fresh_prefix(store: Any, number: int, count: int) -> str:
    """A prefix of this start alone. torchrun may restart all ranks with the store of before, in which addresses stand
    that are no more, and its agents count restarts each for itself.

    Each rank asks in its own name of this start. The first answers whoever asks, also who asked in an earlier start and
    is no more, until all of this start have taken its word.
    """
    own, until = uuid.uuid4().hex, time.monotonic() + JOINING.total_seconds()
    if number > 0:
        store.set(f"ask/{number}", own)
        prefix = store.get(f"answer/{own}").decode()  # waits
        store.set(f"taken/{prefix}/{number}", "")
        return prefix
    waiting = set(range(1, count))
    while waiting:
        if time.monotonic() > until:
            raise RuntimeError(f"{len(waiting)} of {count} have not come in {JOINING}")
        for other in list(waiting):
            if store.check([f"ask/{other}"]):
                store.set(f"answer/{store.get(f'ask/{other}').decode()}", own)
            if store.check([f"taken/{own}/{other}"]):
                waiting.discard(other)
        time.sleep(0.05)
    return own


def _leave() -> None:
    with suppress(RuntimeError):
        distributed.destroy_process_group()


def _number(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError as error:
        raise UserError(f"{name} is {os.environ[name]!r}, not a number: start several processes by torchrun") from error


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Of a tensor's bits, 4 bytes an element, and where they stand: an int64 scalar on its device."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in tensor.detach().contiguous().view(-1).view(torch.int32).split(_PART):
        odd = torch.arange(1, 2 * len(part), 2, device=part.device)
        total = total * 31 + (odd * part).sum()
    return total


_PART = 2**22
"""Elements that are multiplied at a time, 32 MiB of scratch."""
