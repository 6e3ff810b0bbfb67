"""The documents of one source as an endless row of rounds, packed.

A round is every document once, in an order of its own. A weight w is how many rounds an epoch has: of the row of all
rounds, epoch e takes documents [⌊e·w·D⌋, ⌊(e + 1)·w·D⌋), where D is how many documents there are. So after every epoch
each source has given what its weight says, to within one document, and none comes again before all have come.

    weight 1.5     round 0          | round 1          | round 2          | …
                   epoch 0 ····················|epoch 1 ···················|…
    parts          (0, 0, D)         (1, 0, D/2) (1, D/2, D) (2, 0, D)

What an epoch takes of one round is a part, and is packed by itself. A part is drawn when it is asked for, from nothing
but its name, the seed and the source, so any place of any epoch can be read at once. The next one is drawn in a thread
while the current one is read, and large ones are kept on disk.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from llama_pro_fast.data.drawn import DrawnOrders
from llama_pro_fast.data.packing import Packed, pack, sequences_needed

LARGE = 2**20
"""Documents of a part that takes long enough to draw (half a second) to be drawn ahead and kept."""


COUNTED = 2**16
"""Documents of a source from which on it is noted how many sequences a part of a round has."""


class Part(NamedTuple):
    """Documents [first, last) of a round."""

    round: int
    first: int
    last: int


class Rounds:
    """The sequences of one source, in their order.

    Args:
        lengths: tokens of each document, at least one document.
        weight: rounds in an epoch.
        seed, source: name the row.
        kept: where large parts are kept.
        content: names the documents, in the notes of what is kept.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        weight: Fraction,
        seq_len: int,
        packing: str,
        seed: int,
        source: int,
        kept: DrawnOrders | None = None,
        content: str = "",
    ):
        assert len(lengths), "a source without documents"
        self.num_documents, self.num_tokens = len(lengths), int(lengths.sum())
        self._lengths, self._weight, self._seq_len, self._packing = lengths, weight, seq_len, packing
        self._seed, self._source, self._kept, self._content = seed, source, kept, content
        self._parts: list[Part] = []
        self._epochs = [0]  # how many parts come before epochs 0, 1, …
        self._begins = [0]  # how many sequences come before parts 0, 1, …
        self._drawn: dict[int, Packed] = {}  # the last two that were read
        self._ahead: tuple[int, threading.Thread, list[Packed]] | None = None
        self._in_round: int | None = None
        self._counts: dict[Part, int] = {}

    def sequences_before(self, epoch: int) -> int:
        """How many sequences come before an epoch."""
        return self._begin(self._parts_before(epoch))

    @property
    def sequences_in_round(self) -> int:
        """How many sequences every whole round is."""
        if self._in_round is None:
            self._in_round = sequences_needed(self._packing, self._lengths, self._seq_len)
        return self._in_round

    def first(self) -> Packed:
        """The first part."""
        return self._read(0)

    def rounds_before(self, sequence: int) -> float:
        """How many rounds the sequences before ``sequence`` are."""
        index = self._find(sequence)
        done = (sequence - self._begin(index)) / (self._begin(index + 1) - self._begin(index))
        part = self._parts[index]
        return part.round + (part.first + done * (part.last - part.first)) / self.num_documents

    def pieces(self, begin: int, end: int) -> tuple[np.ndarray, ...]:
        """The pieces of sequences [begin, end), as :meth:`Packed.pieces` gives them."""
        found = []
        while begin < end:
            index = self._find(begin)
            first = self._begin(index)
            last = min(end, self._begin(index + 1))
            found.append(self._read(index).pieces(begin - first, last - first, self._lengths, self._seq_len))
            if 2 * (last - first) > self._begin(index + 1) - first:
                self._draw_ahead(index + 1)
            begin = last
        return found[0] if len(found) == 1 else tuple(map(np.concatenate, zip(*found, strict=True)))

    def _parts_before(self, epoch: int) -> int:
        while len(self._epochs) <= epoch:
            begin, end = (int((len(self._epochs) + n) * self._weight * self.num_documents) for n in (-1, 0))
            while begin < end:
                round, first = divmod(begin, self.num_documents)
                last = min(self.num_documents, first + end - begin)
                self._parts.append(Part(round, first, last))
                begin += last - first
            self._epochs.append(len(self._parts))
        return self._epochs[epoch]

    def _part(self, index: int) -> Part:
        while len(self._parts) <= index:
            self._parts_before(len(self._epochs))
        return self._parts[index]

    def _begin(self, index: int) -> int:
        """How many sequences come before a part."""
        while len(self._begins) <= index:
            last = len(self._begins) - 1
            self._begins.append(self._begins[-1] + self._num_sequences(last))
        return self._begins[index]

    def _num_sequences(self, index: int) -> int:
        part = self._part(index)
        if part.last - part.first == self.num_documents:
            return self.sequences_in_round
        return self._drawn[index].num_sequences if index in self._drawn else self._count(part)

    def _count(self, part: Part) -> int:
        """How many sequences a part of a round has; two parts of one epoch may be counted by two threads."""
        if part not in self._counts:

            def count() -> int:
                return sequences_needed(self._packing, self._lengths[self._documents(part)], self._seq_len)

            is_kept = self._kept is not None and self.num_documents >= COUNTED
            self._counts[part] = self._kept.number(self._named(part), count) if is_kept else count()
        return self._counts[part]

    def _find(self, sequence: int) -> int:
        """The part that a sequence is in."""
        while self._begins[-1] <= sequence:
            self._begin(len(self._begins))
        return bisect_right(self._begins, sequence) - 1

    def _read(self, index: int) -> Packed:
        if index in self._drawn:
            return self._drawn[index]
        if self._ahead is not None and self._ahead[0] == index:
            _, thread, found = self._ahead
            while not found and thread.is_alive():  # it may go on counting
                thread.join(0.05)
            self._ahead = None
        else:
            found = []
        packed = found[0] if found else self._draw(self._part(index))
        self._drawn = dict([*self._drawn.items()][-1:]) | {index: packed}
        return packed

    def _draw_ahead(self, index: int) -> None:
        part = self._part(index)
        if part.last - part.first < LARGE or index in self._drawn:
            return
        if self._ahead is not None and (self._ahead[0] == index or self._ahead[1].is_alive()):
            return
        # What comes after the epoch of this part is asked for at its end.
        following = self._parts[index + 1 : self._parts_before(bisect_right(self._epochs, index) + 1)]
        found: list[Packed] = []

        def draw() -> None:
            found.append(self._draw(part))
            for later in following:
                if later.last - later.first < self.num_documents:
                    self._count(later)

        # A daemon: a run that ends does not wait for an order that nobody will read.
        thread = threading.Thread(target=draw, daemon=True, name="next order")
        self._ahead = index, thread, found
        thread.start()

    def _draw(self, part: Part) -> Packed:
        if self._kept is None or part.last - part.first < LARGE:
            return self._pack(part)
        return self._kept.get(self._named(part), lambda: self._pack(part))

    def _named(self, part: Part) -> list[Any]:
        return [self._content, self._seq_len, self._packing, self._seed, self._source, *part]

    def _pack(self, part: Part) -> Packed:
        generator = self._generator(2, part.round, part.first)
        return pack(self._packing, self._documents(part), self._lengths, self._seq_len, generator)

    def _documents(self, part: Part) -> np.ndarray:
        return permutation(self.num_documents, self._generator(1, part.round))[part.first : part.last]

    def _generator(self, *words: int) -> np.random.PCG64:
        return np.random.PCG64(np.random.SeedSequence((self._seed, self._source, *words)))


def permutation(number: int, generator: np.random.PCG64) -> np.ndarray:
    """A random order of 0 … number - 1, int64.

    The numbers stand in the low bits of random ones, which are sorted. All differ, so every way to sort them, the
    fastest too, has one result.
    """
    low = np.uint64((1 << number.bit_length()) - 1)
    keys = generator.random_raw(number)
    keys &= ~low
    keys |= np.arange(number, dtype=np.uint64)
    keys.sort()
    keys &= low
    return keys.view(np.int64)
