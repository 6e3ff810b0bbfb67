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
from itertools import pairwise

import numpy as np
import torch

from llama_pro_fast.data.tokens import TokenSplit, TokenStore
from llama_pro_fast.errors import UserError
from llama_pro_fast.model.batch import IGNORE_INDEX, PackedBatch, padded_boundaries


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
        self._num_stores = len(stores_with_weights)
        self._stores = np.flatnonzero([weight > 0 for _, weight in stores_with_weights])  # those that train
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
        self._cached: tuple[int, _Stream] | None = None

    def sequences_in_epoch(self, epoch: int) -> int:
        """Whole sequences in epoch ``epoch``; differs between epochs when a weight is not a whole number."""
        if not self._is_drawn:
            return self._sure_sequences
        return int((self._draw(epoch)[0] * self._lengths).sum()) // self.seq_len

    @property
    def mean_document(self) -> float:
        """Tokens of a document, on average over an epoch."""
        share = self._copies + self._chance
        return float((share * self._lengths).sum() / share.sum())

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
        ``seq_len``, and ``cu_seqlens`` is padded to a power of two (see :func:`_padded`).
        """
        return _pack(self._tokens, list(self._parts(start, count)), self.seq_len)

    def documents(self, start: int, count: int) -> list[tuple[int, int]]:
        """The documents that sequences ``start`` to ``start + count`` hold or cut, each once, in their order.

        Returns:
            (index in ``stores_with_weights``, number from 0 in that store's training side).
        """
        found = [stream.documents(begin, end)[0] for stream, begin, end in self._parts(start, count)]
        sources, numbers = self._tokens.locate(np.concatenate(found))
        return list(dict.fromkeys(zip(self._stores[sources].tolist(), numbers.tolist(), strict=True)))

    def source_tokens(self, start: int, count: int) -> np.ndarray:
        """Tokens of each of ``stores_with_weights`` in sequences ``start`` to ``start + count``, int64.

        It looks at the documents of the range alone: tens of microseconds for a step's.
        """
        tokens = np.zeros(self._num_stores, np.int64)
        for stream, begin, end in self._parts(start, count):
            addresses, lengths = stream.documents(begin, end)
            np.add.at(tokens, self._stores[self._tokens.locate(addresses)[0]], lengths)
        return tokens

    def _parts(self, start: int, count: int) -> Iterator[tuple[_Stream, int, int]]:
        """Sequences ``start`` to ``start + count`` as ranges of tokens, (stream, begin, end), one for each epoch."""
        assert count >= 1, f"count is {count}"
        end = start + count
        while start < end:
            epoch, position = self.locate(start)
            stream = self._stream(epoch)
            taken = min(end - start, stream.num_tokens // self.seq_len - position)
            yield stream, position * self.seq_len, (position + taken) * self.seq_len
            start += taken

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
            self._cached = epoch, self._tokens.stream(_shuffled(documents, generator))
        return self._cached[1]


class HeldOutSample:
    """The held-out documents of a store that are measured, packed as in training.

    They are taken in an order that is mixed (the first ones stored are one file's) but always the same, whatever the
    run's seed, so that runs are measured on the same text. At ``max_tokens`` the last document is cut.

    Args:
        seq_len: S, tokens per sequence.
        max_tokens: how many are measured at most.

    Attributes:
        num_predicted: valid tokens in all batches together: of every document all but the first.
        num_bytes: UTF-8 bytes of the text that these tokens spell, so that ``nats / log(2) / num_bytes`` is bits per
            byte. The first token of a document, which nothing predicts, has neither nats nor bytes here (see
            :class:`TokenSplit`); the EOS has nats and no bytes. Of the one document that is cut, the bytes are taken
            in proportion to its tokens; of all others they are counted.
    """

    def __init__(self, store: TokenStore, *, seq_len: int, max_tokens: int):
        assert min(seq_len, max_tokens) >= 1
        split = store.held_out
        documents = _shuffled(np.arange(split.num_documents), np.random.PCG64(np.random.SeedSequence(0)))
        self.seq_len = seq_len
        self._tokens = _Tokens([split])
        self._stream = self._tokens.stream(documents)
        self._end = min(self._stream.num_tokens, max_tokens)
        most = np.diff(self._stream.begins) - 1
        predicted = np.minimum(most, (self._end - self._stream.begins[:-1]).clip(0))
        self.num_predicted = int(predicted.sum())
        self.num_bytes = round(float((split.num_bytes[documents] * (predicted / most.clip(1))).sum()))

    def documents(self) -> list[np.ndarray]:
        """The documents' tokens, int64, in the order they are measured in. Of each all but the first are predicted; of
        one that is cut, the token after the cut is predicted too and stands here."""
        last = int(np.searchsorted(self._stream.begins, self._end))
        bounds = [*self._stream.begins[:last].tolist(), min(self._end + 1, int(self._stream.begins[last]))]
        return [self._tokens[self._stream.addresses_of(begin, end)] for begin, end in pairwise(bounds)]

    def num_batches(self, micro_batch: int) -> int:
        """How many :meth:`batches` gives."""
        return -(-self._end // (self.seq_len * micro_batch))

    def batches(self, micro_batch: int) -> Iterator[PackedBatch]:
        """``micro_batch`` sequences at a time; the last batch may be shorter, and so may its last sequence."""
        step = self.seq_len * micro_batch
        for begin in range(0, self._end, step):
            yield _pack(self._tokens, [(self._stream, begin, min(begin + step, self._end))], self.seq_len)


def _shuffled(documents: np.ndarray, generator: np.random.PCG64) -> np.ndarray:
    return documents[np.argsort(generator.random_raw(len(documents)), kind="stable")]


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
        first, last, lengths = self._within(begin, end)
        return np.arange(begin, end) + np.repeat(self.addresses[first:last] - self.begins[first:last], lengths)

    def documents(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the documents that tokens [begin, end) are of: where each begins in :class:`_Tokens`, and how many of
        these tokens it has; both int64."""
        first, last, lengths = self._within(begin, end)
        return self.addresses[first:last], lengths

    def _within(self, begin: int, end: int) -> tuple[int, int, np.ndarray]:
        """The documents [first, last) that tokens [begin, end) are of, and how many of these tokens each has."""
        first = int(np.searchsorted(self.begins, begin, side="right")) - 1
        last = int(np.searchsorted(self.begins, end))
        return first, last, np.diff(self.begins[first : last + 1].clip(begin, end))


class _Tokens:
    """Several splits under one numbering of documents and tokens (addresses), one after the other."""

    def __init__(self, splits: Sequence[TokenSplit]):
        self._tokens = [split.tokens for split in splits]
        self._bases = np.cumsum([0] + [split.num_tokens for split in splits])
        parts = [split.offsets[:-1] + base for split, base in zip(splits, self._bases[:-1], strict=True)]
        self._addresses = np.concatenate([*parts, self._bases[-1:]])
        self._first = np.searchsorted(self._addresses, self._bases)  # the first document of each

    def stream(self, documents: np.ndarray) -> _Stream:
        addresses = self._addresses[documents]
        lengths = self._addresses[documents + 1] - addresses
        return _Stream(np.concatenate(([0], np.cumsum(lengths))), addresses)

    def locate(self, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The split of each document that begins at one of ``addresses``, and its number there."""
        splits = np.searchsorted(self._bases, addresses, side="right") - 1
        return splits, np.searchsorted(self._addresses, addresses) - self._first[splits]

    def __getitem__(self, addresses: np.ndarray) -> np.ndarray:
        if len(self._tokens) == 1:
            return self._tokens[0][addresses].astype(np.int64)
        found = np.empty(len(addresses), np.int64)
        for tokens, base in zip(self._tokens, self._bases[:-1], strict=True):
            inside = (base <= addresses) & (addresses < base + len(tokens))
            found[inside] = tokens[addresses[inside] - base]
        return found


def _pack(tokens: _Tokens, parts: Sequence[tuple[_Stream, int, int]], seq_len: int) -> PackedBatch:
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
    position_ids = np.arange(total) - np.repeat(bounds[:-1], np.diff(bounds))
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(_padded(bounds)),
        max_seqlen=seq_len,
        num_valid=int(np.count_nonzero(labels != IGNORE_INDEX)),
    )


def _padded(bounds: np.ndarray) -> np.ndarray:
    """``cu_seqlens`` ``[C]`` int32: the boundaries and empty documents, C the next power of two, at least 16.

    C is fixed within a bucket of batches and not for the run. Shapes should recur, so that the allocator's blocks and
    any compiled code do, but every empty document costs: PyTorch's flash-attention 2 gives each document 128 more rows
    of fp32 dq in backward, and every kernel a tile of its grid. A C that is enough for any batch of a corpus with a few
    tiny documents is a hundred times what most need (2.7 GiB of such rows at 7B width); the next power of two is at
    most twice, and takes few values. A CUDA graph, which needs one C, has to choose it for itself.
    """
    cu_seqlens = np.full(padded_boundaries(len(bounds)), bounds[-1], np.int32)
    cu_seqlens[: len(bounds)] = bounds
    return cu_seqlens
