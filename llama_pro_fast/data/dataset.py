"""The training text of a run: packed batches as a pure function of (seed, steps' size, position).

Each source goes through its documents in rounds (:mod:`rounds`), which are packed (:mod:`packing`); a rule says which
source gives each sequence (:mod:`mixing`). Sequences are numbered through all epochs. Nothing is remembered from one
batch to the next, and so the place in the data of a run is one integer.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from llama_pro_fast.data.batches import FILLING, Row, lay
from llama_pro_fast.data.drawn import DrawnOrders
from llama_pro_fast.data.mixing import Mixing
from llama_pro_fast.data.packing import Packed
from llama_pro_fast.data.rounds import Rounds
from llama_pro_fast.errors import UserError
from llama_pro_fast.model.batch import IGNORE_INDEX, PackedBatch

if TYPE_CHECKING:
    from llama_pro_fast.text.store import TokenStore


@dataclass(frozen=True)
class Mixed:
    """A source and its part in the mixture: a weight or a share. With weight 0 or neither it does not train.

    Attributes:
        weight: how often each document stands in an epoch.
        share: of the tokens of every step.
        name: for a person.
        mask: bool ``[training documents]``, False where one is left out; None leaves out none.
    """

    store: TokenStore
    weight: float | Fraction | None = None
    share: float | Fraction | None = None
    name: str = ""
    mask: np.ndarray | None = None

    @property
    def trains(self) -> bool:
        """Whether it has a part."""
        return self.share is not None or bool(self.weight)

    @functools.cached_property
    def key(self) -> str:
        """Equal keys mean equal documents that train, in the same order."""
        kept = b"" if self.mask is None else np.packbits(self.mask).tobytes()
        return hashlib.sha256(self.store.key(self.store.train).encode() + kept).hexdigest()

    @property
    def num_tokens(self) -> int:
        """Of the documents that train once each."""
        lengths = self.store.train.lengths
        return int((lengths if self.mask is None else lengths[self.mask]).sum())


class PackedDataset:
    """The training documents of several sources, packed and mixed.

    The sources with a weight fill what the shares leave of a step, and epoch e of the run ends when they have finished
    theirs. Where every source has a share, an epoch is as many sequences as all their first rounds have.

    Args:
        sources: those that do not train keep their place in what is counted by source.
        seq_len: S, tokens per sequence.
        seed: of the order.
        batch_size: sequences of a step; the mixture holds in each.
        packing: ``best_fit`` or ``concat``.
        cache: where orders that take long to draw are kept; None keeps none.
        taught: indices of sources whose sequences come last in a batch, which says how many they are.

    Raises:
        UserError: no source trains, the shares are too much or too little, an epoch has fewer tokens than one sequence,
            or a negative seed.
    """

    def __init__(
        self,
        sources: Sequence[Mixed],
        *,
        seq_len: int,
        seed: int,
        batch_size: int,
        packing: str = "best_fit",
        cache: Path | None = None,
        taught: Sequence[int] = (),
    ):
        assert min(seq_len, batch_size) >= 1, f"seq_len is {seq_len}, batch_size is {batch_size}"
        if seed < 0:
            raise UserError(f"train.seed is {seed}: give a whole number from 0 up")
        self._num_sources = len(sources)
        self._training = [i for i, source in enumerate(sources) if source.trains]
        training = [sources[i] for i in self._training]
        self._taught = [number for number, place in enumerate(self._training) if place in taught]
        shares = _shares(training)
        self.seq_len = seq_len
        self._sides = [(source.store, source.store.train) for source in training]
        self._kept_in = [None if source.mask is None else np.flatnonzero(source.mask) for source in training]
        kept = None if cache is None else DrawnOrders(cache)
        weights = [Fraction(1) if source.share is not None else Fraction(str(source.weight)) for source in training]
        self._rounds = [
            Rounds(
                source.store.train.lengths if chosen is None else source.store.train.lengths[chosen],
                weight=weight,
                seq_len=seq_len,
                packing=packing,
                seed=seed,
                source=number,
                kept=kept,
                content=source.key,
            )
            for number, (source, weight, chosen) in enumerate(zip(training, weights, self._kept_in, strict=True))
        ]
        per_epoch = int(sum(w * rounds.num_tokens for w, rounds in zip(weights, self._rounds, strict=True)))
        if per_epoch < seq_len:
            raise UserError(
                f"the training text is {per_epoch} tokens an epoch, less than one sequence of {seq_len}: "
                "lower --train.seq_len or add text"
            )
        sizes = [rounds.sequences_in_round for rounds in self._rounds]
        self._fill = [Fraction(rounds.num_tokens, size) for rounds, size in zip(self._rounds, sizes, strict=True)]
        shares = _of_sequences(shares, weights, self._fill, sizes)
        befores = [rounds.sequences_before for rounds in self._rounds]
        self._mixing = Mixing(batch_size, shares, befores, epoch=sum(sizes))
        filled = [w * size for w, size, share in zip(weights, sizes, shares, strict=True) if share is None]
        epoch = sum(filled) / (1 - sum(share or 0 for share in shares)) if filled else sum(sizes)
        self._rounds_in_epoch = [
            float(weight if share is None else share * epoch / size)
            for weight, size, share in zip(weights, sizes, shares, strict=True)
        ]

    # Places

    def sequences_in_epoch(self, epoch: int) -> int:
        """Sequences in an epoch; differs between epochs where a weight is not a whole number."""
        return self._mixing.first_sequence(epoch + 1) - self._mixing.first_sequence(epoch)

    def locate(self, sequence: int) -> tuple[int, int]:
        """(epoch, position in it) of a sequence counted from the start of the run."""
        assert sequence >= 0, f"sequence is {sequence}"
        return self._mixing.locate(sequence)

    # What stands there

    def batch(self, start: int, count: int) -> PackedBatch:
        """Sequences ``start`` to ``start + count``, counted from the start of the run, laid flat.

        A sequence's end is a document's end for attention and positions, and so is a piece's. ``T = count · seq_len``,
        ``max_seqlen`` is ``seq_len``, and ``cu_seqlens`` is padded to a power of two.
        """
        row = self.pieces(start, count)
        if not self._taught:
            return lay(row, self._sides, self.seq_len)
        # A sequence is of one source, and begins with a piece of it.
        sequence = (np.cumsum(row.lengths) - 1) // self.seq_len
        is_taught = np.isin(row.sources[np.searchsorted(sequence, np.arange(count))], self._taught)
        order = np.argsort(is_taught[sequence], kind="stable")
        batch = lay(Row(*(column[order] for column in row)), self._sides, self.seq_len)
        num_general = self.seq_len * int(is_taught.sum())
        valid = torch.count_nonzero(batch.labels[len(batch.labels) - num_general :] != IGNORE_INDEX)
        return dataclasses.replace(batch, num_general=num_general, num_valid_general=int(valid))

    def documents(self, start: int, count: int) -> list[tuple[int, int]]:
        """The documents that sequences ``start`` to ``start + count`` hold or cut, each once, in their order.

        Returns:
            (index in ``sources``, number in that source's store).
        """
        row = self.pieces(start, count)
        pieces = zip(row.sources.tolist(), row.documents.tolist(), strict=True)
        return [
            (self._training[source], int(self._sides[source][1].numbers[document]))
            for source, document in dict.fromkeys(piece for piece in pieces if piece[0] != FILLING)
        ]

    def source_tokens(self, start: int, count: int) -> np.ndarray:
        """Tokens of each of ``sources`` in sequences ``start`` to ``start + count``, int64; filling is not counted.

        It looks at the pieces of the range and reads no tokens.
        """
        row = self.pieces(start, count)
        tokens = np.zeros(self._num_sources, np.int64)
        for source, place in enumerate(self._training):
            tokens[place] = row.lengths[row.sources == source].sum()
        return tokens

    def epochs_seen(self, sequences: int) -> np.ndarray:
        """How often each of ``sources`` has been gone through after so many sequences of the run, float64."""
        seen = np.zeros(self._num_sources)
        for source, given in enumerate(self._mixing.given(sequences)):
            seen[self._training[source]] = self._rounds[source].rounds_before(given)
        return seen

    # Of an epoch

    @property
    def shares(self) -> np.ndarray:
        """Of a step's tokens, by source, in epoch 0, float64."""
        shares = np.zeros(self._num_sources)
        shares[self._training] = np.array(self._mixing.shares()) * np.array(self._fill, float)
        return shares / shares.sum()

    @property
    def mean_document(self) -> float:
        """Tokens of a document, on average over an epoch."""
        tokens = documents = 0.0
        for times, rounds in zip(self._rounds_in_epoch, self._rounds, strict=True):
            tokens += times * rounds.num_tokens
            documents += times * rounds.num_documents
        return tokens / documents

    @property
    def filled(self) -> float:
        """Share of the places of sequences that hold text; the others are filling. As in each source's first part."""
        return sum(share * part.num_tokens / part.num_sequences for share, part in self._first_parts()) / self.seq_len

    @property
    def without_beginning(self) -> float:
        """Share of the tokens that stand in a piece without the beginning of its document. As in the first parts."""
        without = sum(share * part.without_beginning / part.num_sequences for share, part in self._first_parts())
        return without / self.seq_len / self.filled

    def _first_parts(self) -> list[tuple[float, Packed]]:
        """The first part of each source and the source's share of a step."""
        return [(share, rounds.first()) for share, rounds in zip(self._mixing.shares(), self._rounds, strict=True)]

    def pieces(self, start: int, count: int) -> Row:
        """The pieces of sequences ``start`` to ``start + count``, filling included."""
        assert count >= 1, f"count is {count}"
        sources, numbers = self._mixing.rows(start, start + count)
        found = []  # with the sequence of each piece
        for source in range(len(self._rounds)):
            at = np.flatnonzero(sources == source)
            if not len(at):
                continue
            pieces = self._rounds[source].pieces(int(numbers[at[0]]), int(numbers[at[-1]]) + 1)
            documents, offsets, lengths, counts = pieces
            if (chosen := self._kept_in[source]) is not None:
                documents = chosen[documents]
            found.append((np.repeat(at, counts), np.full(len(documents), source), documents, offsets, lengths))
        of, *columns = map(np.concatenate, zip(*found, strict=True))
        filling = self.seq_len - np.bincount(of, weights=columns[-1], minlength=count).astype(np.int64)
        short = np.flatnonzero(filling)
        nothing = np.zeros(len(short), np.int64)
        of = np.concatenate([of, short])
        columns = [
            np.concatenate(pair)
            for pair in zip(columns, (nothing + FILLING, nothing, nothing, filling[short]), strict=True)
        ]
        order = np.argsort(of, kind="stable")  # a sequence's filling comes last
        return Row(*(column[order] for column in columns))


def _of_sequences(
    shares: Sequence[Fraction | None], weights: Sequence[Fraction], fill: Sequence[Fraction], sizes: Sequence[int]
) -> list[Fraction | None]:
    """Shares of a step's sequences that come to these shares of its tokens: a source of fuller ones needs fewer.

    Args:
        fill: tokens in a sequence of each source.
        sizes: sequences in a round of each.
    """
    needed = [None if share is None else share / tokens for share, tokens in zip(shares, fill, strict=True)]
    weighted = [w * size for w, size, share in zip(weights, sizes, shares, strict=True) if share is None]
    total = sum(filter(None, needed))
    if weighted:
        tokens = [w * size * t for w, size, t, share in zip(weights, sizes, fill, shares, strict=True) if share is None]
        total += (1 - sum(filter(None, shares))) * sum(weighted) / sum(tokens)
    return [None if each is None else each / total for each in needed]


def _shares(training: Sequence[Mixed]) -> list[Fraction | None]:
    """Of each source its exact share of a step, None where it has a weight."""
    if not training:
        raise UserError("no source trains: give at least one of data.domain a weight above 0")
    shares = [None if source.share is None else Fraction(str(source.share)) for source in training]
    total = sum(share for share in shares if share is not None)
    if None in shares:
        if total >= 1:
            raise UserError(
                f"the shares are {float(total):g} together and leave nothing of a step to those with a weight: "
                "lower a share, or give every source one"
            )
        return shares
    if abs(total - 1) > Fraction(1, 10**6):
        raise UserError(
            f"every source has a share, and together they are {float(total):g}: make them sum to 1, or give one source "
            "a weight instead"
        )
    return [share / total for share in shares]
