"""Digests of a model's tensors: of each, remembered, and one for all of them, whatever files they lie in."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

SETTLED_NS = 2 * 10**9
"""A younger file is not remembered: two writes in one tick of a file system's clock (2 s at the coarsest, FAT) have one
time of modification."""

_DIGESTS: dict[tuple[int, int, int, int, str], str] = {}
"""By device, inode, size and time of modification of the file, which a rename leaves alone, and the tensor's name."""


def remembered(file: Path, name: str, read: Callable[[], Iterable[memoryview]]) -> str:
    """SHA-256 of what ``read`` gives, the bytes of tensor ``name``, once as long as ``file`` does not change."""
    before = _state(file)
    if before is not None and (*before, name) in _DIGESTS:
        return _DIGESTS[*before, name]
    digest = hashlib.sha256()
    for piece in read():
        digest.update(piece)
    if before is not None and before == _state(file) and time.time_ns() - before[3] > SETTLED_NS:
        _DIGESTS[*before, name] = digest.hexdigest()
    return digest.hexdigest()


def _state(file: Path) -> tuple[int, int, int, int] | None:
    try:
        found = os.stat(file)
    except OSError:  # reading it will say what is wrong
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def combined_digest(digests: dict[str, str]) -> str:
    """One digest for a set of tensors, whatever shards they lie in: SHA-256 over sorted ``name:digest`` lines."""
    lines = "".join(f"{name}:{digests[name]}\n" for name in sorted(digests))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()
