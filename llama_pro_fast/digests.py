"""Digests of what files hold, remembered as long as the files do not change.

To read tens of GB again takes minutes. So a digest holds for as long as its file's size, time of modification and inode
are those of then. A tensor's is remembered within the process (:func:`tensor_digest`). A text file's, which the key of
a token store hangs on, is noted between runs, beside the stores (:func:`file_digests`):

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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from llama_pro_fast.errors import UserError

SETTLED_NS = 2 * 10**9
"""A younger file is not remembered: two writes in one tick of a file system's clock (2 s at the coarsest, FAT) have one
time of modification."""


_TENSORS: dict[tuple[int | str, ...], str] = {}


def file_hash(content: bytes = b"") -> Any:
    """The hash of :func:`file_digests`, to be fed while a file is written."""
    return hashlib.blake2b(content, digest_size=16)


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
                before = os.fstat(file.fileno())
                found.append(hashlib.file_digest(file, file_hash).hexdigest())
                after = os.fstat(file.fileno())
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): check the file and its permissions") from error
        if _state(before) == _state(after) and _settled(after):
            new[name] = [*_state(after), found[-1]]
    if new:
        with contextlib.suppress(OSError):
            _write(cache / "digests.json", notes | new)
    return found


def remember(digests: dict[Path, str], cache: Path) -> None:
    """Note the digests of files that have just been written and will not be written to again."""
    new = {}
    for path, digest in digests.items():
        with contextlib.suppress(OSError):
            new[os.path.abspath(path)] = [*_state(os.stat(path)), digest]
    if new:
        with contextlib.suppress(OSError):
            _write(cache / "digests.json", _read(cache / "digests.json") | new)


def tensor_digest(file: Path, name: str, read: Callable[[], Iterable[memoryview]]) -> str:
    """SHA-256 of what ``read`` gives, the bytes of tensor ``name`` in ``file``; read again only if the file changes.

    Moving its folder leaves the file what it is.
    """
    try:
        before = os.stat(file)
    except OSError:  # reading says what is wrong
        before = None
    key = before and (before.st_dev, before.st_ctime_ns, *_state(before), name)
    if key in _TENSORS:
        return _TENSORS[key]
    digest = hashlib.sha256()
    for piece in read():
        digest.update(piece)
    if before and _state(before) == _state(os.stat(file)) and _settled(before):
        _TENSORS[key] = digest.hexdigest()
    return digest.hexdigest()


def combined_digest(digests: dict[str, str]) -> str:
    """One digest for a set of tensors, whatever shards they lie in: SHA-256 over sorted ``name:digest`` lines."""
    lines = "".join(f"{name}:{digests[name]}\n" for name in sorted(digests))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def _settled(stat: os.stat_result) -> bool:
    return time.time_ns() - stat.st_mtime_ns > SETTLED_NS


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
