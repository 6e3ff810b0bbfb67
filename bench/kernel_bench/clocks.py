"""How long a series of calls takes: captured in a CUDA graph and timed by events, or on a CPU by the wall clock."""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

__all__ = ["Clock", "CpuClock", "CudaClock", "first_line"]


class CpuClock:
    """Runs calls one after the other, by the wall clock."""

    device = torch.device("cpu")
    dtype = torch.float32
    cache_bytes = 0

    def running(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def replay(self, calls: Sequence[Callable[[], Any]]) -> tuple[Callable[[], Any], str]:
        return functools.partial(run_all, calls), "no graphs on a CPU"

    def free_memory(self) -> None:
        pass

    def sample(self, lead: Callable[[], Any], run: Callable[[], Any]) -> float:
        lead()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class CudaClock:
    """Captures calls in graphs, and times by events.

    All of a bench runs on one stream of its own: a backward runs on the stream its forward ran on, and what is captured
    must be the stream of both.
    """

    device = torch.device("cuda")
    dtype = torch.bfloat16

    def __init__(self) -> None:
        self.cache_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        self.stream = torch.cuda.Stream()
        # One pool for all graphs: none is replayed while another's results are wanted.
        self.pool = torch.cuda.graph_pool_handle()
        self.broken = False

    def running(self) -> contextlib.AbstractContextManager:
        return torch.cuda.stream(self.stream)

    def replay(self, calls: Sequence[Callable[[], Any]]) -> tuple[Callable[[], Any], str | None]:
        """What repeats ``calls``, and why it is no graph if it is none. ``calls`` must have been warmed up."""
        plainly = functools.partial(run_all, calls)
        if self.broken:
            return plainly, "a capture before it broke"
        try:
            # A wait for the device would break the capture; found beforehand, it breaks nothing.
            with _waits_forbidden():
                calls[0]()
        except Exception as error:
            return plainly, first_line(error)
        try:
            return self.capture(calls).replay, None
        except Exception as error:
            # PyTorch's allocator still believes that the capture is under way, and nothing public ends it: there is no
            # capturing and no emptying of its cache any more.
            self.broken = True
            return plainly, first_line(first_cause(error))

    def free_memory(self) -> None:
        if not self.broken:
            torch.cuda.empty_cache()

    def capture(self, calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            # Kept until the end, so that no call writes where the one before it did.
            results = [call() for call in calls]
        del results
        return graph

    def sample(self, lead: Callable[[], Any], run: Callable[[], Any]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        lead()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3


Clock = CpuClock | CudaClock


@contextlib.contextmanager
def _waits_forbidden() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says that it does not know of all waits
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def run_all(calls: Sequence[Callable[[], Any]]) -> None:
    for call in calls:
        call()


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def first_cause(error: BaseException) -> BaseException:
    """What went wrong in a capture, and not that the capture then could not be ended."""
    while error.__context__ is not None:
        error = error.__context__
    return error
