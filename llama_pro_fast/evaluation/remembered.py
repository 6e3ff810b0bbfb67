"""What was measured once, kept between calls: small JSON files that prove themselves.

    CACHE/evaluations/<key>.json   figures of a text, by all that they depend on; or what a model's files hold

A model of 16 GB is not read again to learn that it is the same one: what its files hold is noted by their sizes, times
and inodes. A note that is lost, damaged or cannot be written costs the work that it would have spared, nothing else.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llama_pro_fast.digests import SETTLED_NS
from llama_pro_fast.files import write_whole
from llama_pro_fast.text.shards import digest, read_signed, signed

FORMAT = 1
"""Part of every key: raise it when the same model and text would give other figures, or other keys of them."""


class Remembered:
    """The notes in a cache.

    Args:
        cache: the folder of all caches; need not exist.
    """

    def __init__(self, cache: Path) -> None:
        self._folder = cache / "evaluations"

    def get(self, what: Sequence[Any]) -> dict[str, Any] | None:
        """What is noted under ``what``, anything that JSON can spell; None if nothing is."""
        with suppress(OSError):
            return read_signed(self._file(what))
        return None

    def put(self, what: Sequence[Any], values: dict[str, Any]) -> None:
        """Note ``values`` under ``what``, all of them or none."""
        file = self._file(what)
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, signed(values))

    def held_by(self, files: Sequence[Path], find: Callable[[], Any]) -> str:
        """A digest of what some files hold, anything that JSON can spell; ``find`` reads them, only if one has changed
        since it last did."""
        states = [_state(file) for file in files]
        if (known := self.get(states)) is not None:
            return known["held"]
        found = digest(find())
        if states == [_state(file) for file in files] and time.time_ns() - max(s[2] for s in states) > SETTLED_NS:
            self.put(states, {"held": found})
        return found

    def _file(self, what: Sequence[Any]) -> Path:
        return self._folder / f"{digest([FORMAT, *what])}.json"


def _state(file: Path) -> list[Any]:
    found = os.stat(file)
    return [os.path.abspath(file), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
