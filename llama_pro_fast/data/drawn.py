"""Orders of large corpora, kept on disk: a run that is resumed finds the one it stopped in.

    CACHE/orders/<key>/order.json  starts.npy  documents.npy  offsets.npy

    CACHE/orders/<key>.json         how many sequences a part of a round has

`order.json` says what the order was drawn from, which the key is a hash of, and has a digest of each file. A folder is
written under another name and renamed; what is not as it was written is drawn again. Two processes that need one order
at once both draw it: to wait would take as long.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from llama_pro_fast.console import say
from llama_pro_fast.data.packing import Packed
from llama_pro_fast.files import sync, why_refused

FORMAT = 1
"""Raise it when the same documents would get another order, or other files."""

NOTE = "order.json"
NAMES = "[0-9a-f]" * 32
"""A pattern of the names that are given here: what else lies there is not ours to delete."""
ARRAYS = ("starts", "documents", "offsets")
ABANDONED_SECONDS = 24 * 3600
KEPT = 8
"""Folders that stay, the latest used: of two or three sources the current and the next part."""


class DrawnOrders:
    """The orders kept in a cache.

    Args:
        cache: the folder of `orders`; need not exist.
    """

    def __init__(self, cache: Path):
        self._folder = cache / "orders"

    def get(self, content: list[Any], draw: Callable[[], Packed]) -> Packed:
        """The order that is drawn from ``content``: mapped from disk, or else drawn and written.

        A cache that cannot be used costs the drawing and nothing else.
        """
        content = [FORMAT, *content]
        folder = self._folder / _key(content)
        drawn = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if found := self._open(folder, content):
                return found
            drawn = draw()
            self._write(folder, content, drawn)
            return self._open(folder, content) or drawn
        except OSError as error:
            say(f"{self._folder}: the order is not kept there: {why_refused(error)} (--data.cache)")
            return drawn or draw()

    def number(self, content: list[Any], count: Callable[[], int]) -> int:
        """A number that takes long to count: from disk, or else counted and written."""
        content = [FORMAT, *content]
        path = self._folder / f"{_key(content)}.json"
        try:
            note = json.loads(path.read_bytes())
            if note["content"] == content and type(note["number"]) is int:
                return note["number"]
        except (OSError, ValueError, RecursionError, LookupError, TypeError):
            pass
        number = count()
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps({"content": content, "number": number}))
            partial.replace(path)
        return number

    def _open(self, folder: Path, content: list[Any]) -> Packed | None:
        try:
            note = json.loads((folder / NOTE).read_bytes())
            paths = [folder / f"{name}.npy" for name in ARRAYS]
            if note["content"] != content or not all(map(os.path.isfile, paths)):
                return None
            if note["digests"] != [*map(_digest, paths)]:
                return None
            arrays = {name: np.load(path, mmap_mode="r") for name, path in zip(ARRAYS, paths, strict=True)}
            packed = Packed(**arrays, **note["numbers"])
        except (OSError, ValueError, RecursionError, LookupError, TypeError):
            return None
        with contextlib.suppress(OSError):  # of another user's cache that may only be read
            os.utime(folder)
        return packed

    def _write(self, folder: Path, content: list[Any], packed: Packed) -> None:
        for partial in self._folder.glob(f"{NAMES}.*.partial"):
            if time.time() - partial.stat().st_mtime > ABANDONED_SECONDS:  # a killed process's
                _remove(partial)
        partial = folder.with_suffix(f".{os.getpid()}.partial")
        _remove(partial)
        try:
            partial.mkdir()
            paths = [partial / f"{name}.npy" for name in ARRAYS]
            for name, path in zip(ARRAYS, paths, strict=True):
                np.save(path, getattr(packed, name))
                sync(path)
            numbers = {f.name: getattr(packed, f.name) for f in fields(packed) if f.name not in ARRAYS}
            note = {"content": content, "digests": [*map(_digest, paths)], "numbers": numbers}
            (partial / NOTE).write_text(json.dumps(note))
            sync(partial / NOTE)
            if not self._open(folder, content):  # no other process was faster
                _remove(folder)
                partial.rename(folder)
        finally:
            _remove(partial)
        folders = sorted(self._folder.glob(NAMES), key=lambda path: path.stat().st_mtime_ns)
        for old in folders[:-KEPT]:
            _remove(old)


def _key(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
