"""Digests of files' contents, remembered between runs.

The key of a token store hangs on the contents of its source, and to read tens of GB at every start and resume takes
minutes. So a file's digest is noted beside the stores, and holds for as long as the file's size, time of modification
and inode are those of then:

    CACHE/digests.json  {absolute path: [size, mtime_ns, inode, digest]}

The notes only spare a reading. A lost, damaged or unwritable file of them costs that reading and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama_pro_fast.errors import UserError

SETTLED_NS = 2 * 10**9
"""A younger file is not noted: two writes in one tick of a file system's clock (2 s at the coarsest, FAT) have one
time of modification."""


def file_digests(paths: Iterable[Path], cache: Path) -> list[str]:
    """The digest of each file's content; only files that have changed since they were last asked for are read.

    Args:
        cache: folder of the notes; need not exist.

    Raises:
        UserError: a file cannot be read.
    """
    notes = _read(cache / "digests.json")
    found, new = [], {}
    for path in paths:
        try:
            name = os.path.abspath(path)
            known = notes.get(name)
            if known is not None and known[:3] == _state(os.stat(path)):
                found.append(known[3])
                continue
            with open(path, "rb") as file:
                before = _state(os.fstat(file.fileno()))
                found.append(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest())
                after = _state(os.fstat(file.fileno()))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): check the file and its permissions") from error
        if before == after and time.time_ns() - after[1] > SETTLED_NS:
            new[name] = [*after, found[-1]]
    if new:
        with contextlib.suppress(OSError):
            _write(cache / "digests.json", notes | new)
    return found


def _state(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _read(file: Path) -> dict[str, list[Any]]:
    try:
        notes = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(notes, dict):
        return {}
    return {name: note for name, note in notes.items() if _is_note(note)}


def _is_note(note: Any) -> bool:
    return isinstance(note, list) and [type(part) for part in note] == [int, int, int, str]


def _write(file: Path, notes: dict[str, list[Any]]) -> None:
    """Replace ``file`` at once: readers see the old notes or the new ones. Of two writers, the later one's stay."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f"{file.name}.", dir=file.parent)
    try:
        with open(descriptor, "w") as out:
            json.dump(notes, out)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
