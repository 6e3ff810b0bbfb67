"""Documents -> sequences of one length S: which pieces stand in a sequence, and in which order sequences come.

    concat      documents end to end, cut every S        aaaaaaab bbcccccc ccccdd··       S = 8
    best_fit    only what is longer than S is cut        aaaaaaa· bbb····· cccccccc ccdd····

`best_fit` is best-fit decreasing: the longest piece first, each into the sequence with the least room that takes it.
Pieces of one length are interchangeable and so are sequences of one room. So it is decided on the histogram of lengths,
and what it decides is a range of pieces for a range of sequences: thousands of ranges for millions of documents.

What a sequence does not fill (·) has no targets. In both packings every token of every document stands in exactly one
sequence. In the end the sequences are permuted, and those of one long document are spread over all the others.

Random numbers are the raw 64-bit output of PCG64, which NumPy promises never to change.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Packed:
    """Sequences in their order, and the pieces they consist of.

    A piece runs from its offset to the end of its document or of its sequence, whichever comes first.

    Attributes:
        starts: ``[sequences + 1]`` int64, the first piece of each sequence, and the number of pieces.
        documents: ``[pieces]`` int32 (int64 where that is too small), the document each is of.
        offsets: ``[pieces]``, same type, tokens of the document before it.
        num_tokens: of all pieces.
        without_beginning: tokens in pieces that do not begin where their document does.
    """

    starts: np.ndarray
    documents: np.ndarray
    offsets: np.ndarray
    num_tokens: int
    without_beginning: int

    @property
    def num_sequences(self) -> int:
        return len(self.starts) - 1

    def pieces(self, begin: int, end: int, lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, ...]:
        """The pieces of sequences [begin, end).

        Args:
            lengths: of all documents.

        Returns:
            Document, offset and length of each piece, and how many pieces each sequence has; all int64.
        """
        starts = np.array(self.starts[begin : end + 1])
        documents, offsets = (
            np.array(array[starts[0] : starts[-1]], np.int64) for array in (self.documents, self.offsets)
        )
        counts, firsts = np.diff(starts), starts[:-1] - starts[0]
        ends = np.cumsum(lengths[documents] - offsets)
        ends -= np.repeat(np.concatenate(([0], ends))[firsts], counts)  # counted from where its sequence begins
        ends = np.minimum(ends, seq_len)
        begins = np.concatenate(([0], ends[:-1]))
        begins[firsts] = 0
        return documents, offsets, ends - begins, counts


def pack(packing: str, documents: np.ndarray, lengths: np.ndarray, seq_len: int, generator: np.random.PCG64) -> Packed:
    """Pack some documents.

    Args:
        packing: ``best_fit`` or ``concat``.
        documents: ``[n]`` numbers of documents, in an order that also decides between equal lengths.
        lengths: tokens of every document there is, at least 1.
        seq_len: S.
        generator: of the order of the sequences.
    """
    own = lengths[documents]
    compact = np.int32 if max(len(lengths), int(own.max(initial=0))) < 2**31 else np.int64
    num_tokens = int(own.sum())
    own = own.astype(compact)
    decided = (_best_fit if packing == "best_fit" else _concat)(own, seq_len)
    order = _spread(len(decided.counts), decided.whole, decided.owners, generator)
    starts = np.concatenate(([0], np.cumsum(decided.counts[order])))
    places = np.empty(len(order), np.int64)
    places[order] = starts[:-1]
    of, offsets = np.empty(starts[-1], compact), np.empty(starts[-1], compact)
    for group in decided.groups:
        at = places[group.sequences]
        at += group.slots
        of[at] = documents[group.which]
        offsets[at] = group.offsets
    return Packed(starts, of, offsets, num_tokens, decided.without_beginning)


def sequences_needed(packing: str, lengths: np.ndarray, seq_len: int) -> int:
    """How many sequences documents of these lengths make, in whatever order they come."""
    if packing == "concat":
        return -(-int(lengths.sum()) // seq_len)
    rests = np.bincount(lengths % seq_len, minlength=seq_len)
    return int((lengths // seq_len).sum()) + fit_best(rests.tolist(), seq_len)[1]


class _Group(NamedTuple):
    """Some pieces: which document each is of, its offset there, its sequence, and how many pieces stand before it."""

    which: np.ndarray
    offsets: np.ndarray
    sequences: np.ndarray
    slots: np.ndarray | int


class _Decided(NamedTuple):
    """A packing before its sequences are permuted.

    Attributes:
        counts: ``[sequences]``, pieces in each.
        whole: the sequences that are one piece of full length.
        owners: the document each of these is of, ascending.
    """

    counts: np.ndarray
    whole: np.ndarray
    owners: np.ndarray
    groups: list[_Group]
    without_beginning: int


def _best_fit(lengths: np.ndarray, seq_len: int) -> _Decided:
    number, compact = len(lengths), lengths.dtype
    whole, rests = lengths // seq_len, lengths % seq_len
    owners = np.repeat(np.arange(number, dtype=compact), whole)
    num_whole = len(owners)
    nth = np.arange(num_whole, dtype=compact) - np.repeat(np.cumsum(whole) - whole, whole).astype(compact)

    which = np.flatnonzero(rests).astype(compact)
    rests = rests[which]
    ranges, num_bins = fit_best(np.bincount(rests, minlength=seq_len).tolist(), seq_len)
    # 16 bits where they are enough: NumPy sorts those by radix.
    small = np.uint16 if seq_len <= 2**16 else np.int64
    which = which[np.argsort((seq_len - rests).astype(small), kind="stable")]
    sequences, slots = np.empty(len(which), compact), np.empty(len(which), small)
    counts = np.ones(num_whole + num_bins, np.int64)
    at = 0
    for first, bins, each, slot in ranges:
        here = slice(at, at + bins * each)
        sequences[here] = np.repeat(np.arange(num_whole + first, num_whole + first + bins), each)
        slots[here] = np.tile(np.arange(slot, slot + each), bins)
        counts[num_whole + first : num_whole + first + bins] = slot + each  # the last range of a bin has the last word
        at += bins * each
    groups = [
        _Group(owners, nth * seq_len, np.arange(num_whole), 0),
        _Group(which, whole[which] * seq_len, sequences, slots),
    ]
    beginnings = int(np.minimum(lengths, seq_len).sum(dtype=np.int64))
    return _Decided(counts, np.arange(num_whole), owners, groups, int(lengths.sum(dtype=np.int64)) - beginnings)


def fit_best(histogram: Sequence[int], seq_len: int) -> tuple[list[tuple[int, int, int, int]], int]:
    """Best-fit decreasing on a histogram.

    Args:
        histogram: how many pieces have length 0, 1, …, S - 1; those of length 0 are left out.

    Returns:
        For the pieces from the longest to the shortest: (first bin, number of bins, pieces for each of them, pieces
        that each held before); and the number of bins.
    """
    ranges, num_bins = [], 0
    rooms: list[int] = []  # ascending: room that some bins have left
    bins_with = defaultdict(deque)  # room -> ranges of bins: (first, number, pieces in each)
    for length in range(seq_len - 1, 0, -1):
        left = histogram[length]
        while left:
            at = bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms[at]
                first, number, held = bins_with[room].popleft()
            else:
                room = seq_len
                first, number, held = num_bins, max(1, left // (seq_len // length)), 0
                num_bins += number
            each = min(room // length, left)
            taken = min(number, left // each)
            if taken < number:
                bins_with[room].appendleft((first + taken, number - taken, held))
            elif at < len(rooms) and not bins_with[room]:
                del rooms[at]
            ranges.append((first, taken, each, held))
            left -= taken * each
            if room := room - each * length:
                if not bins_with[room]:
                    insort(rooms, room)
                bins_with[room].append((first, taken, held + each))
    return ranges, num_bins


def _concat(lengths: np.ndarray, seq_len: int) -> _Decided:
    number, compact = len(lengths), lengths.dtype
    ends = np.cumsum(lengths, dtype=np.int64)
    begins = ends - lengths
    first = begins // seq_len
    pieces = (ends - 1) // seq_len - first + 1
    which = np.repeat(np.arange(number, dtype=compact), pieces)
    sequences = np.arange(len(which)) - np.repeat(np.cumsum(pieces) - pieces - first, pieces)
    offsets = np.maximum(sequences * seq_len - begins[which], 0)
    counts = np.bincount(sequences)
    slots = np.arange(len(which)) - (np.cumsum(counts) - counts)[sequences]
    is_whole = (slots == 0) & (lengths[which] - offsets >= seq_len)
    beginnings = int(np.minimum(lengths, (first + 1) * seq_len - begins).sum())
    return _Decided(
        counts,
        sequences[is_whole],
        which[is_whole],
        [_Group(which, offsets, sequences, slots)],
        int(ends[-1]) - beginnings,
    )


def _spread(number: int, whole: np.ndarray, owners: np.ndarray, generator: np.random.PCG64) -> np.ndarray:
    """A random order of ``number`` sequences in which each document's whole ones are far apart.

    Sequences are sorted by a random key in [0, 1). Of a document's m whole sequences each has its own m-th of that.
    """
    keys = (generator.random_raw(number) >> 11) * 2.0**-53
    if len(whole):
        begins = np.flatnonzero(np.diff(owners, prepend=-1))
        sizes = np.diff(begins, append=len(owners))
        strata = np.empty(len(owners), np.int64)
        strata[np.lexsort((generator.random_raw(len(owners)), owners))] = np.arange(len(owners))
        strata -= np.repeat(begins, sizes)
        keys[whole] = (strata + keys[whole]) / np.repeat(sizes, sizes)
    return np.argsort(keys, kind="stable")
