"""Tokens on disk -> packed batches, as a pure function of (seed, epoch, position).

An epoch is a row of documents: each training document of a source of weight w stands in it floor(w) times, and once
more with probability frac(w); their order is a permutation. Laid end to end they are one long row of tokens, and
sequence p of the epoch is tokens [p·S, (p+1)·S) of it, S being the sequence length:

    documents   aaaaaaa|bbb|cccccccccc|dd|ee…        S = 8
    sequences   aaaaaaab bbcccccc ccccddee           what is left at the end of the epoch is dropped
    pieces      aaaaaaa|b bb|cccccc cccc|dd|ee       attention stays inside a piece, positions restart with each

A document that is cut goes on in the next sequence without its past, but the last token before the cut still learns
to predict the first one after it; only a document's very last token predicts nothing.

Nothing is remembered from one batch to the next. The draw and the order come from the raw 64-bit output of PCG64
seeded by (seed, epoch), which NumPy promises never to change (it does not for `Generator.permutation`), sequences are
numbered through all epochs, and so the place in the data of a run is one integer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llama_pro_fast.batch import IGNORE_INDEX, PackedBatch
from llama_pro_fast.data.tokens import TokenSplit, TokenStore
from llama_pro_fast.errors import UserError


class PackedDataset:
    """The training documents of several stores, mixed by weight and packed.

    Args:
        stores_with_weights: (store, weight) pairs; a store of weight 0 is left out.
        seq_len: S, tokens per sequence.
        seed: of the order and the draw.

    Raises:
        UserError: no store has a weight, an epoch has fewer tokens than one sequence, or a negative seed.
    """

    def __init__(self, stores_with_weights: Sequence[tuple[TokenStore, float]], *, seq_len: int, seed: int):
        assert seq_len >= 1, f"seq_len is {seq_len}"
        if seed < 0:
            raise UserError(f"train.seed is {seed}: give a whole number from 0 up")
        training = [(store.train, weight) for store, weight in stores_with_weights if weight > 0]
        if not training:
            raise UserError("no source trains: give at least one of data.domain a weight above 0")
        self.seq_len = seq_len
        self.seed = seed
        self._tokens = _Tokens([split for split, _ in training])
        self._lengths = np.concatenate([np.diff(split.offsets) for split, _ in training])
        weights = np.repeat([weight for _, weight in training], [split.num_documents for split, _ in training])
        self._copies = np.floor(weights).astype(np.int64)
        self._chance = weights - self._copies
        self._is_drawn = bool(self._chance.any())
        per_epoch = int((weights * self._lengths).sum())
        if per_epoch < seq_len:
            raise UserError(
                f"the training text is {per_epoch} tokens an epoch, less than one sequence of {seq_len}: "
                "lower --train.seq_len or add text"
            )
        self._sure_sequences = int((self._copies * self._lengths).sum()) // seq_len  # in every epoch, whatever is drawn
        self._first_sequence = [0]  # of epochs 0, 1, …, as far as they have been asked for
        self._cu_seqlens_lengths: dict[int, int] = {}
        self._cached: tuple[int, _Stream] | None = None

    def sequences_in_epoch(self, epoch: int) -> int:
        """Whole sequences in epoch ``epoch``; differs between epochs when a weight is not a whole number."""
        if not self._is_drawn:
            return self._sure_sequences
        return int((self._draw(epoch)[0] * self._lengths).sum()) // self.seq_len

    def locate(self, sequence: int) -> tuple[int, int]:
        """(epoch, position in it) of a sequence counted from the start of the run."""
        assert sequence >= 0, f"sequence is {sequence}"
        if not self._is_drawn:
            return divmod(sequence, self.sequences_in_epoch(0))
        while self._first_sequence[-1] <= sequence:
            epoch = len(self._first_sequence) - 1
            self._first_sequence.append(self._first_sequence[-1] + self.sequences_in_epoch(epoch))
        epoch = bisect_right(self._first_sequence, sequence) - 1
        return epoch, sequence - self._first_sequence[epoch]

    def batch(self, start: int, count: int) -> PackedBatch:
        """Sequences ``start`` to ``start + count``, counted from the start of the run, laid flat.

        A sequence's end is a document's end for attention and positions. ``T = count · seq_len``, ``max_seqlen`` is
        ``seq_len``, and ``cu_seqlens`` has :meth:`cu_seqlens_length` entries whatever ``start``.
        """
        assert count >= 1, f"count is {count}"
        parts, end = [], start + count
        while start < end:
            epoch, position = self.locate(start)
            stream = self._stream(epoch)
            taken = min(end - start, stream.num_tokens // self.seq_len - position)
            parts.append((stream, position * self.seq_len, (position + taken) * self.seq_len))
            start += taken
        return _pack(self._tokens, parts, self.seq_len, self.cu_seqlens_length(count))

    def cu_seqlens_length(self, count: int) -> int:
        """Entries of ``cu_seqlens`` in a batch of ``count`` sequences: enough for every batch of every epoch.

        A sequence begins and ends with at most one cut piece each; all other pieces are whole documents. So
        ``count · S`` tokens have at most ``2 · count`` cut pieces, and beside them no more whole documents than the
        shortest ones, each as often as the epochs in reach of one batch can hold it, that fit the remaining
        tokens. (A cut piece takes at least one token, which holds at most one whole document: to assume all
        ``2 · count`` is the worst case.)
        """
        if count in self._cu_seqlens_lengths:
            return self._cu_seqlens_lengths[count]
        tokens, cut = count * self.seq_len, 2 * count
        copies = self._copies + (self._chance > 0)
        epochs = 1 if count == 1 else 2 + (count - 2) // max(1, self._sure_sequences)
        order = np.argsort(self._lengths)
        room = np.cumsum((self._lengths * copies)[order]) * epochs
        budget = max(0, tokens - cut)
        full = int(np.searchsorted(room, budget, side="right"))  # documents of which every copy fits
        whole = int(copies[order[:full]].sum()) * epochs
        if full < len(order):
            whole += (budget - (int(room[full - 1]) if full else 0)) // int(self._lengths[order[full]])
        self._cu_seqlens_lengths[count] = 1 + min(tokens, whole + cut)
        return self._cu_seqlens_lengths[count]

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.random.PCG64]:
        """How often each document stands in an epoch, ``[documents]`` int64, and the generator for its order."""
        generator = np.random.PCG64(np.random.SeedSequence((self.seed, epoch)))
        if not self._is_drawn:
            return self._copies, generator
        drawn = (generator.random_raw(len(self._chance)) >> 11) * 2.0**-53 < self._chance
        return self._copies + drawn, generator

    def _stream(self, epoch: int) -> _Stream:
        if self._cached is None or self._cached[0] != epoch:
            self._cached = None  # so that two epochs are never in memory
            copies, generator = self._draw(epoch)
            documents = np.repeat(np.arange(len(copies)), copies)
            documents = documents[np.argsort(generator.random_raw(len(documents)), kind="stable")]
            self._cached = epoch, self._tokens.stream(documents)
        return self._cached[1]


def held_out_batches(store: TokenStore, *, seq_len: int, micro_batch: int, max_tokens: int) -> Iterator[PackedBatch]:
    """The held-out documents in stored order, packed as in training, ``micro_batch`` sequences at a time.

    Only the first ``max_tokens`` tokens are taken. The last batch may be shorter, and so may its last sequence; every
    batch has ``cu_seqlens`` of one length. Bits per byte take ``store.held_out.bytes_per_token``.
    """
    assert min(seq_len, micro_batch, max_tokens) >= 1
    tokens = _Tokens([store.held_out])
    stream = tokens.stream(np.arange(store.held_out.num_documents))
    end, step = min(stream.num_tokens, max_tokens), seq_len * micro_batch
    ranges = [(begin, min(begin + step, end)) for begin in range(0, end, step)]
    length = 1 + max(len(stream.cut(begin, stop, seq_len)) for begin, stop in ranges)
    for begin, stop in ranges:
        yield _pack(tokens, [(stream, begin, stop)], seq_len, length)


@dataclass(frozen=True)
class _Stream:
    """Documents in the order in which they are read, as one row of tokens.

    Attributes:
        begins: ``[n + 1]`` int64, where in the row each document begins, and the end of the last.
        addresses: ``[n]`` int64, where in :class:`_Tokens` each document begins.
    """

    begins: np.ndarray
    addresses: np.ndarray

    @property
    def num_tokens(self) -> int:
        return int(self.begins[-1])

    def cut(self, begin: int, end: int, seq_len: int) -> np.ndarray:
        """Where the pieces of tokens [begin, end) begin: at each document and each sequence (``begin`` starts one)."""
        first, last = np.searchsorted(self.begins, (begin, end))
        return np.union1d(self.begins[first:last], np.arange(begin, end, seq_len))

    def addresses_of(self, begin: int, end: int) -> np.ndarray:
        """Where tokens [begin, end) of the row lie, ``[end - begin]`` int64."""
        first = int(np.searchsorted(self.begins, begin, side="right")) - 1
        last = int(np.searchsorted(self.begins, end))
        lengths = np.diff(self.begins[first : last + 1].clip(begin, end))
        return np.arange(begin, end) + np.repeat(self.addresses[first:last] - self.begins[first:last], lengths)


class _Tokens:
    """Several splits under one numbering of documents and tokens (addresses), one after the other."""

    def __init__(self, splits: Sequence[TokenSplit]):
        self._tokens = [split.tokens for split in splits]
        self._bases = np.cumsum([0] + [split.num_tokens for split in splits])
        parts = [split.offsets[:-1] + base for split, base in zip(splits, self._bases[:-1], strict=True)]
        self._addresses = np.concatenate([*parts, self._bases[-1:]])

    def stream(self, documents: np.ndarray) -> _Stream:
        addresses = self._addresses[documents]
        lengths = self._addresses[documents + 1] - addresses
        return _Stream(np.concatenate(([0], np.cumsum(lengths))), addresses)

    def __getitem__(self, addresses: np.ndarray) -> np.ndarray:
        if len(self._tokens) == 1:
            return self._tokens[0][addresses].astype(np.int64)
        found = np.empty(len(addresses), np.int64)
        for tokens, base in zip(self._tokens, self._bases[:-1], strict=True):
            inside = (base <= addresses) & (addresses < base + len(tokens))
            found[inside] = tokens[addresses[inside] - base]
        return found


def _pack(
    tokens: _Tokens, parts: Sequence[tuple[_Stream, int, int]], seq_len: int, cu_seqlens_length: int
) -> PackedBatch:
    """The batch of the token ranges ``parts``, each (stream, begin, end) with ``begin`` at the start of a sequence."""
    total = sum(end - begin for _, begin, end in parts)
    input_ids = np.empty(total, np.int64)
    labels = np.full(total, IGNORE_INDEX, np.int64)
    pieces, at = [], 0
    for stream, begin, end in parts:
        # One token more: what the last one predicts, if its document goes on.
        found = tokens[stream.addresses_of(begin, min(end + 1, stream.num_tokens))]
        here = slice(at, at + end - begin)
        input_ids[here] = found[: end - begin]
        labels[here][: len(found) - 1] = found[1:]
        first, last = np.searchsorted(stream.begins, (begin, end), side="right")
        labels[here][stream.begins[first:last] - 1 - begin] = IGNORE_INDEX  # the token before a document's begin
        pieces.append(stream.cut(begin, end, seq_len) - begin + at)
        at += end - begin
    bounds = np.concatenate([*pieces, [total]])
    cu_seqlens = np.full(cu_seqlens_length, total, np.int32)
    cu_seqlens[: len(bounds)] = bounds
    position_ids = np.arange(total) - np.repeat(bounds[:-1], np.diff(bounds))
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=seq_len,
        num_valid=int(np.count_nonzero(labels != IGNORE_INDEX)),
    )
