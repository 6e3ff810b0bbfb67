"""Knowing one's text: how much there is, how long, how often the same, and what of the held-out side is not held out.

A held-out document stands in training nearly whole where most of its stretches of ``STRETCH`` tokens do. Every stretch
is known by a hash; of all hashes those that are 0 modulo ``KEPT`` are compared, which picks the same stretches on both
sides (as in winnowing, Schleimer et al. 2003).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llama_pro_fast.data.corpus import Corpus, repeated
from llama_pro_fast.text.store import Side, TokenStore

STRETCH, KEPT = 24, 4
NEARLY_WHOLE = 0.8
FEWEST = 4
"""A document with fewer compared stretches than this is too short to say."""
CHUNK = 2**20
"""Tokens read at a time."""
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class SourceStatistics:
    """Of one source.

    Attributes:
        documents, tokens: of both sides.
        held_out: documents of them that never train.
        lengths: tokens of a document at ``PERCENTILES``, and the most.
        longer: documents longer than a sequence.
        repeated, repeated_tokens: documents that repeat one before them, and their tokens.
        leaked: held-out documents that stand in some source's training side nearly whole, as places.
        compared: held-out documents long enough to say.
    """

    name: str
    documents: int
    tokens: int
    held_out: int
    lengths: tuple[int, ...]
    longer: int
    repeated: int
    repeated_tokens: int
    leaked: list[str]
    compared: int


def statistics(corpus: Corpus, seq_len: int) -> list[SourceStatistics]:
    """Of each source of ``corpus``, in its order."""
    leaked, compared = _leaks(corpus)
    return [
        _of_source(text.source.name, text.store, seq_len, leaked[n], compared[n])
        for n, text in enumerate(corpus.held_out)
    ]


def shared_documents(corpus: Corpus) -> dict[tuple[str, str], int]:
    """How many documents of a source, counted once each, stand in another one too, by the two names."""
    kept = [np.unique(text.store.digests) for text in corpus.held_out]
    names = [text.source.name for text in corpus.held_out]
    found = {}
    for a in range(len(kept)):
        for b in range(a + 1, len(kept)):
            if count := len(np.intersect1d(kept[a], kept[b], assume_unique=True)):
                found[names[a], names[b]] = count
    return found


def _of_source(name: str, store: TokenStore, seq_len: int, leaked: list[str], compared: int) -> SourceStatistics:
    again = repeated(store)
    lengths = np.empty(len(again), np.int64)
    for side in (store.train, store.held_out):
        lengths[side.numbers] = side.lengths
    return SourceStatistics(
        name=name,
        documents=len(lengths),
        tokens=int(lengths.sum()),
        held_out=store.held_out.num_documents,
        lengths=(*(int(value) for value in np.percentile(lengths, PERCENTILES)), int(lengths.max())),
        longer=int((lengths > seq_len).sum()),
        repeated=int(again.sum()),
        repeated_tokens=int(lengths[again].sum()),
        leaked=leaked,
        compared=compared,
    )


def _leaks(corpus: Corpus) -> tuple[list[list[str]], list[int]]:
    """Of each source, the places of its leaked held-out documents, and how many were compared."""
    hashes, owners = [], []
    number = 0
    for text in corpus.held_out:
        for found, at in _stretches(text.store, text.store.held_out):
            hashes.append(found)
            owners.append(at + number)
        number += text.store.held_out.num_documents
    if not hashes:
        return [[] for _ in corpus.held_out], [0] * len(corpus.held_out)
    hashes, owners = np.concatenate(hashes), np.concatenate(owners)
    wanted, inverse = np.unique(hashes, return_inverse=True)
    seen = np.zeros(len(wanted), bool)
    for text, each in zip(corpus.held_out, corpus.mixed, strict=True):
        for found, _ in _stretches(text.store, text.store.train) if each.trains else ():
            place = np.searchsorted(wanted, found).clip(max=max(0, len(wanted) - 1))
            seen[place[wanted[place] == found] if len(wanted) else []] = True
    kept = np.bincount(owners, minlength=number)
    again = np.bincount(owners, weights=seen[inverse], minlength=number)
    is_compared = kept >= FEWEST
    is_leaked = is_compared & (again >= NEARLY_WHOLE * kept)
    places, counts, first = [], [], 0
    for text in corpus.held_out:
        of = slice(first, first + text.store.held_out.num_documents)
        numbers = text.store.held_out.numbers[is_leaked[of]]
        places.append([f"{file} line {line:,}" for file, line in map(text.store.place, numbers.tolist())])
        counts.append(int(is_compared[of].sum()))
        first = of.stop
    return places, counts


def _stretches(store: TokenStore, side: Side) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Hashes of the compared stretches of a side's documents, uint64, and the number on the side of each one's own."""
    # A long document is read in pieces that overlap by all but one token of a stretch.
    step = CHUNK - STRETCH + 1
    pieces = np.maximum(1, -(-(side.lengths - STRETCH + 1) // step))
    owners = np.repeat(np.arange(side.num_documents), pieces)
    offsets = step * (np.arange(len(owners)) - np.repeat(np.cumsum(pieces) - pieces, pieces))
    begins, lengths = side.begins[owners] + offsets, np.minimum(side.lengths[owners] - offsets, CHUNK)
    ends = np.cumsum(lengths)
    first = 0
    while first < len(owners):
        last = max(first + 1, int(np.searchsorted(ends, ends[first] - lengths[first] + CHUNK, side="right")))
        here = slice(first, last)
        tokens = store.tokens(begins[here], lengths[here]).astype(np.uint64)
        if len(tokens) >= STRETCH:
            rolled = np.zeros(len(tokens) - STRETCH + 1, np.uint64)
            for offset in range(STRETCH):
                rolled = rolled * np.uint64(0x9E3779B97F4A7C15) + tokens[offset : offset + len(rolled)] + np.uint64(1)
            rolled ^= rolled >> np.uint64(29)
            of = np.repeat(np.arange(first, last), lengths[here])
            kept = (of[: len(rolled)] == of[STRETCH - 1 :]) & (rolled % np.uint64(KEPT) == 0)
            yield rolled[kept], owners[of[: len(rolled)][kept]]
        first = last
