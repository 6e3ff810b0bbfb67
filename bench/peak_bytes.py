"""The peak of memory while some code runs, counted: every allocation of PyTorch's allocator, inside operations too.

On a CPU the profiler's record of allocations and releases, added up in order. It is the counterpart of
`torch.cuda.max_memory_allocated`, without a GPU and without the process's other memory, and no sampling: what lives
for a microsecond counts. Scratch that a library takes from the system by itself is not seen.
"""

from __future__ import annotations

from typing import Any

from torch.profiler import ProfilerActivity, profile


class PeakBytes:
    """``with PeakBytes() as peak: …`` and then ``peak.bytes``: the most that was allocated beyond what was at entry."""

    bytes: int

    def __enter__(self) -> PeakBytes:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._profile.__exit__(*exception)
        events = [event for event in self._profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        live = self.bytes = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            self.bytes = max(self.bytes, live)
        del self._profile
