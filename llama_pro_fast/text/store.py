"""A source's tokens: its shards as one row of tokens (addresses) and one of documents, in two sides."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_pro_fast.digests import file_hash
from llama_pro_fast.text.shards import read_meta


def default_cache() -> Path:
    """`llama-pro-fast` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "llama-pro-fast"


@dataclass(frozen=True)
class Side:
    """One side of the split, training or held-out.

    Attributes:
        begins: ``[n]`` int64, address of each document's first token.
        lengths: ``[n]`` int64, tokens of each document, the EOS included; at least 1.
        num_bytes: ``[n]`` int64 on the held-out side, else empty: UTF-8 bytes of each document's text after its first
            token, which nothing predicts (see :meth:`Encoder.encode`).
        numbers: ``[n]`` int64, the documents' numbers in the store.
    """

    begins: np.ndarray
    lengths: np.ndarray
    num_bytes: np.ndarray
    numbers: np.ndarray

    @property
    def num_documents(self) -> int:
        return len(self.begins)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())


@dataclass(frozen=True)
class Shard:
    """The tokens of some documents.

    Attributes:
        tokens: ``[tokens]`` uint16 or uint32.
        documents: gives ``[documents]`` of :data:`DOCUMENT`, read again each time: a store may have 30 million.
        counts: gives int64, how often each token stands in documents that train, anywhere but first, as far as ids
            occur.
        learned: uint8, a bit for each token (``np.packbits``); None: all are to be predicted.
        num_empty: documents of which the tokenizer made nothing; they are not among ``documents``.
        files: of each file its name and the line that the documents' lines are counted from.
    """

    tokens: np.ndarray
    documents: Callable[[], np.ndarray]
    counts: Callable[[], np.ndarray]
    learned: np.ndarray | None = None
    num_empty: int = 0
    files: Sequence[tuple[str, int]] = ()

    @classmethod
    def open(cls, folder: Path, files: Sequence[tuple[str, int]]) -> Shard:
        """The shard in a folder that holds a complete one."""
        meta = read_meta(folder)
        assert meta is not None, folder
        learned = _mapped(folder / "learned.bin", np.dtype(np.uint8)) if "learned.bin" in meta["files"] else None
        tokens = _mapped(folder / "tokens.bin", np.dtype(meta["dtype"]))
        documents, counts = (partial(np.load, folder / f"{name}.npy", "r") for name in ("documents", "counts"))
        return cls(tokens, documents, counts, learned, meta["empty"], files)


class FaultCount(NamedTuple):
    """Rows of a source that could not be read for one reason: how many, and (file, line, detail) of the first."""

    reason: str
    count: int
    places: list[tuple[str, int, str]]


@dataclass(frozen=True)
class RowCounts:
    """What the reading of a source found.

    Attributes:
        rows: all there were.
        empty: those without text.
        first_empty: file and line of one.
        faults: those that could not be read, by reason, the most frequent first.
        lost_bytes, all_bytes: of the files, as they lie on disk: those that could not be read, and all.
    """

    rows: int = 0
    empty: int = 0
    first_empty: tuple[str, int] | None = None
    faults: list[FaultCount] = field(default_factory=list)
    lost_bytes: int = 0
    all_bytes: int = 0

    @property
    def faulty(self) -> int:
        return sum(fault.count for fault in self.faults)

    @property
    def bad_share(self) -> float:
        """Of the rows or of the bytes, whichever is more."""
        return max(self.faulty / max(1, self.rows), self.lost_bytes / max(1, self.all_bytes))


class TokenStore:
    """A tokenised source: one numbering of tokens (addresses) and of documents over all its shards.

    Args:
        shards: in the order of the source.
        encoder: names what made tokens of the texts.
        rows: of the rows that were read.

    Attributes:
        train: documents to train on.
        held_out: documents kept out of training.
    """

    def __init__(self, shards: Sequence[Shard], *, encoder: str, rows: RowCounts | None = None) -> None:
        self._encoder, self.rows = encoder, rows or RowCounts()
        self._shards = shards
        documents = [shard.documents() for shard in shards]
        self._tokens = np.cumsum([0, *(len(shard.tokens) for shard in shards)])
        self._documents = np.cumsum([0, *map(len, documents)])
        ends = _joined([rows["end"] + base for rows, base in zip(documents, self._tokens[:-1], strict=True)])
        num_bytes = _joined([rows["num_bytes"] for rows in documents])
        lengths = np.diff(ends, prepend=0)
        begins = ends - lengths
        train, held_out = np.flatnonzero(num_bytes < 0), np.flatnonzero(num_bytes >= 0)
        self.train = Side(begins[train], lengths[train], np.empty(0, np.int64), train)
        self.held_out = Side(begins[held_out], lengths[held_out], num_bytes[held_out], held_out)

    def key(self, side: Side) -> str:
        """Equal keys mean equal documents on a side, in the same order, and equal tokens."""
        digests = np.ascontiguousarray(self.digests[side.numbers])
        return file_hash(self._encoder.encode() + digests.tobytes()).hexdigest()

    @property
    def num_empty(self) -> int:
        """Rows without text, and those of which the tokenizer made nothing."""
        return self.rows.empty + sum(shard.num_empty for shard in self._shards)

    @property
    def faults(self) -> list[FaultCount]:
        return self.rows.faults

    @property
    def digests(self) -> np.ndarray:
        """``[documents]`` uint64, a hash of each document's text."""
        return np.concatenate([np.empty(0, np.uint64), *(shard.documents()["digest"] for shard in self._shards)])

    @property
    def counts(self) -> np.ndarray:
        """How often each token stands on the training side, anywhere but first in a document, where nothing predicts
        it; int64, as far as ids occur."""
        counts = np.zeros(0, np.int64)
        for shard in self._shards:
            longer, shorter = sorted((counts, shard.counts()), key=len, reverse=True)
            counts = longer.copy()
            counts[: len(shorter)] += shorter
        return counts

    def tokens(self, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Ranges of tokens end to end, int64.

        Args:
            begins: int64 addresses; each range lies within one document.
            lengths: int64.
        """
        found, at = np.empty(int(lengths.sum()), np.int64), 0
        for shard, begin, length in self._ranges(begins, lengths):
            found[at : at + length] = shard.tokens[begin : begin + length]
            at += length
        return found

    def learned(self, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
        """For the same ranges, bool: False where a token is not to be predicted; None where all are."""
        if all(shard.learned is None for shard in self._shards):
            return None
        found, at = np.ones(int(lengths.sum()), bool), 0
        for shard, begin, length in self._ranges(begins, lengths):
            if shard.learned is not None:
                bits = np.unpackbits(shard.learned[begin // 8 : -(-(begin + length) // 8)])
                found[at : at + length] = bits[begin % 8 : begin % 8 + length]
            at += length
        return found

    def place(self, document: int) -> tuple[str, int]:
        """File (its name relative to the source) and line of a document, by its number in the store."""
        number, within = self._find(document)
        shard = self._shards[number]
        row = shard.documents()[within]
        name, first_line = shard.files[row["file"]]
        return name, first_line + int(row["line"])

    def extent(self, document: int) -> tuple[int, int]:
        """Address of a document's first token, and how many it has, by its number in the store."""
        number, within = self._find(document)
        ends = self._shards[number].documents()["end"]
        begin = int(ends[within - 1]) if within else 0
        return int(self._tokens[number]) + begin, int(ends[within]) - begin

    def _find(self, document: int) -> tuple[int, int]:
        """The shard of a document, and its number there."""
        number = int(np.searchsorted(self._documents, document, side="right")) - 1
        return number, document - int(self._documents[number])

    def _ranges(self, begins: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[Shard, int, int]]:
        numbers = np.searchsorted(self._tokens, begins, side="right") - 1
        within = begins - self._tokens[numbers]
        for number, begin, length in zip(numbers.tolist(), within.tolist(), lengths.tolist(), strict=True):
            yield self._shards[number], begin, length


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *parts])


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    # An empty file cannot be mapped; and slices of a np.memmap are slow.
    return np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype)
