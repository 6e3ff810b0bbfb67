"""What a run is measured on: some held-out documents, packed end to end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from llama_pro_fast.data.batches import Row, lay
from llama_pro_fast.model.batch import PackedBatch

if TYPE_CHECKING:
    from llama_pro_fast.text.store import TokenStore


class HeldOutSample:
    """The held-out documents of a store that are measured, laid end to end and cut at the sequence length.

    They are taken in an order that is mixed (the first ones stored are one file's) but always the same, whatever the
    run's seed, so that runs are measured on the same text. At ``max_tokens`` the last document is cut.

    Args:
        seq_len: S, tokens per sequence.
        max_tokens: how many are measured at most.
        among: ``[n]`` int64, which of the held-out documents may be measured, in order; None: all.

    Attributes:
        num_tokens: in all batches together.
        num_predicted: valid tokens in all batches together: of every document all but the first.
        num_bytes: UTF-8 bytes of the text that these tokens spell, so that ``nats / log(2) / num_bytes`` is bits per
            byte. The first token of a document, which nothing predicts, has neither nats nor bytes here (see
            :class:`Side`); the EOS has nats and no bytes. Of the one document that is cut, the bytes are taken
            in proportion to its tokens; of all others they are counted.
    """

    def __init__(self, store: TokenStore, *, seq_len: int, max_tokens: int, among: np.ndarray | None = None):
        assert min(seq_len, max_tokens) >= 1
        side = store.held_out
        self.seq_len = seq_len
        self._store = store
        among = np.arange(side.num_documents) if among is None else among
        random = np.random.PCG64(np.random.SeedSequence(0)).random_raw(len(among))
        self._documents = among[np.argsort(random, kind="stable")]
        lengths = side.lengths[self._documents]
        self._begins = np.concatenate(([0], np.cumsum(lengths)))  # where each begins, and the end of the last
        self.num_tokens = min(int(self._begins[-1]), max_tokens)
        predicted = np.minimum(lengths - 1, (self.num_tokens - self._begins[:-1]).clip(0))
        self.num_predicted = int(predicted.sum())
        self.num_bytes = round(float((side.num_bytes[self._documents] * (predicted / (lengths - 1).clip(1))).sum()))

    def documents(self) -> list[np.ndarray]:
        """The documents' tokens, int64, in the order they are measured in. Of each all but the first are predicted; of
        one that is cut, the token after the cut is predicted too and stands here."""
        number = int(np.searchsorted(self._begins, self.num_tokens))
        bounds = np.minimum(self._begins[: number + 1], self.num_tokens + 1)
        lengths = np.diff(bounds)
        tokens = self._store.tokens(self._store.held_out.begins[self._documents[:number]], lengths)
        return np.split(tokens, np.cumsum(lengths)[:-1])

    def equals(self, other: HeldOutSample) -> bool:
        """Whether the two are the same documents in the same tokens."""
        mine, others = self.documents(), other.documents()
        return len(mine) == len(others) and all(map(np.array_equal, mine, others))

    @property
    def num_documents(self) -> float:
        """How many documents are measured; of the one that is cut the share that is."""
        return float(np.interp(self.num_tokens, self._begins, np.arange(len(self._begins))))

    def tokens_of(self, num_documents: float) -> int:
        """How many tokens the first so many documents have: what ``max_tokens`` has to be to measure these."""
        return max(1, round(float(np.interp(num_documents, np.arange(len(self._begins)), self._begins))))

    def per_document(self, values: np.ndarray) -> np.ndarray:
        """Sums over the documents that are measured, ``[..., documents]``.

        Args:
            values: ``[..., T]``, one for each token of all batches end to end.
        """
        return np.add.reduceat(values, self._begins[: np.searchsorted(self._begins, self.num_tokens)], axis=-1)

    def num_batches(self, micro_batch: int) -> int:
        """How many :meth:`batches` gives."""
        return -(-self.num_tokens // (self.seq_len * micro_batch))

    def batches(self, micro_batch: int) -> Iterator[PackedBatch]:
        """``micro_batch`` sequences at a time; the last batch may be shorter, and so may its last sequence."""
        step = self.seq_len * micro_batch
        sides = [(self._store, self._store.held_out)]
        for begin in range(0, self.num_tokens, step):
            yield lay(self._row(begin, min(begin + step, self.num_tokens)), sides, self.seq_len)

    def _row(self, begin: int, end: int) -> Row:
        """Tokens [begin, end) as pieces: they begin at each document and each sequence (``begin`` starts one)."""
        first, last = np.searchsorted(self._begins, (begin, end))
        bounds = np.union1d(self._begins[first:last], np.arange(begin, end, self.seq_len))
        at = np.searchsorted(self._begins, bounds, side="right") - 1
        lengths = np.diff(bounds, append=end)
        return Row(np.zeros(len(at), np.int64), self._documents[at], bounds - self._begins[at], lengths)
