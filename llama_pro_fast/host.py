"""The machine a process runs on: what memory it has taken, and what it may still take."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def available_memory(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes this process may still take.

    Args:
        group: where control groups are mounted, version 2 or 1; a limit there, as containers have it, counts.
    """
    page, meminfo = os.sysconf("SC_PAGE_SIZE"), Path("/proc/meminfo")
    available = page * os.sysconf("SC_PHYS_PAGES")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = 1024 * int(fields["MemAvailable"].split()[0])
    for folder, limit, usage, inactive in (
        (group, "memory.max", "memory.current", "inactive_file"),
        (group / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        if (folder / limit).exists() and (text := (folder / limit).read_text().strip()).isdigit():
            fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # Pages of files not used lately are given back when memory is asked for.
            used = int((folder / usage).read_text()) - int(fields[inactive])
            available = min(available, int(text) - used)
    return available
