"""The memory that some code takes at its fullest and leaves taken, counted: every allocation of PyTorch's allocator.

On a CPU the profiler's record of allocations and releases, added up in order. It is the counterpart of
`torch.cuda.max_memory_allocated`, without a GPU and without the process's other memory, and no sampling: what lives
for a microsecond counts, inside an operation too, and what anybody holds at the end, a hook, a context or a closure.
Scratch that a library takes from the system by itself is not seen.
"""

from __future__ import annotations

from typing import Any

from torch.profiler import ProfilerActivity, profile


class PeakBytes:
    """``with PeakBytes() as peak: …``, and then what was allocated beyond what was at entry.

    Attributes:
        bytes: at the most.
        left: at the end.
    """

    bytes: int
    left: int

    def __enter__(self) -> PeakBytes:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._profile.__exit__(*exception)
        events = [event for event in self._profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        self.left = self.bytes = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            self.left += event.nbytes()
            self.bytes = max(self.bytes, self.left)
        del self._profile
