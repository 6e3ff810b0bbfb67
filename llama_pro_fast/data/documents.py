"""The unit of text, and the split into training and held-out.

Which side a document falls on depends on nothing but its split key: not on its place in a file, not on the order of
files, not on the seed of a run. So a document stays held out when others are added, and two sources that share a
document (the same text, or the same standard-library module as code and as prose) agree on its side.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple


class Document(NamedTuple):
    """A text, and the key its side of the split is drawn by. An empty row of a file is a document without text."""

    text: str
    split_key: str


def is_held_out(split_key: str, fraction: float) -> bool:
    """Whether a document is kept out of training: its key's 64-bit hash lies in the lowest ``fraction`` of all."""
    digest = hashlib.blake2b(split_key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2.0**64
