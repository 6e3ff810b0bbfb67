"""The unit of text, and the split into training and held-out.

Which side a document falls on depends on nothing but its split key: not on its place in a file, not on the order of
files, not on the seed of a run. So a document stays held out when others are added, and two sources that share a
document (the same text, or the same standard-library module as code and as prose) agree on its side.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


class Document(NamedTuple):
    """A text, as a reader found it. An empty row of a file is a document without text.

    Attributes:
        split_key: its side of the split is drawn by it.
        line: where it begins in its file, from 1: the line, or the row of a format without lines.
    """

    text: str
    split_key: str
    line: int = 1


class Fault(NamedTuple):
    """What could not be read and is left out.

    Attributes:
        line: as a document's.
        reason: a few words, equal for faults of a kind: they are counted by it.
        detail: what is particular about this one.
        lost: bytes of the file, as it lies on disk, that are lost with it where that is more than one row.
    """

    line: int
    reason: str
    detail: str = ""
    lost: int = 0


@dataclass(frozen=True)
class SourceFile:
    """A file of a source, as it was when the source was looked up.

    Attributes:
        name: relative to the source, parts divided by ``/``.
        path: local path, or an address with ``://``.
        size: bytes on disk.
        stamp: another one when the file is another one: time of modification and inode, or what its server knows.
    """

    name: str
    path: str
    size: int
    stamp: str


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A piece of work that a process reads by itself: some files, or a stretch of one.

    Attributes:
        kind: ``files``, ``stdlib:code`` or ``stdlib:prose``.
        files: read one after the other; exactly one where ``end`` is given.
        begin, end: of jsonl the lines that begin in these bytes, of parquet these row groups, ``end`` excluded; None
            is the end of the file.
        size: bytes on disk.
        text: column of the text.
        split_by: column whose value is the split key; None: the text is.
    """

    kind: str
    files: tuple[SourceFile, ...]
    begin: int = 0
    end: int | None = None
    size: int
    text: str = "text"
    split_by: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; :meth:`from_dict` makes it a unit again."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Unit:
        return cls(**values | {"files": tuple(SourceFile(**file) for file in values["files"])})


def text_hash(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def is_held_out(split_key: str, fraction: float) -> bool:
    """Whether a document is kept out of training: its key's hash lies in the lowest ``fraction`` of all."""
    return text_hash(split_key) < fraction * 2.0**64
