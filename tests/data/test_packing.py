"""Packing: nothing is lost, nothing is cut without need, little is left empty, long documents are spread."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_pro_fast.data.packing import Packed, fit_best, pack, sequences_needed

quick = settings(deadline=None, max_examples=100)
packings = st.sampled_from(["best_fit", "concat"])
documents = st.lists(st.integers(1, 40), min_size=1, max_size=40)


def generator(seed: int) -> np.random.PCG64:
    return np.random.PCG64(np.random.SeedSequence(seed))


def packed(packing: str, lengths: list[int], seq_len: int, seed: int = 0) -> Packed:
    order = np.random.default_rng(seed).permutation(len(lengths))
    return pack(packing, order, np.array(lengths), seq_len, generator(seed))


def sequences(packing: str, lengths: list[int], seq_len: int, seed: int = 0) -> list[list[tuple[int, int, int]]]:
    """Of each sequence its pieces: (document, offset, length)."""
    found = packed(packing, lengths, seq_len, seed)
    documents, offsets, sizes, counts = found.pieces(0, found.num_sequences, np.array(lengths), seq_len)
    pieces = iter(zip(documents.tolist(), offsets.tolist(), sizes.tolist(), strict=True))
    return [[next(pieces) for _ in range(count)] for count in counts]


def log_normal(number: int, *, mean: float = 800, sigma: float = 1.3, seed: int = 0) -> np.ndarray:
    """Lengths as a crawl has them: most are short, a few are very long."""
    drawn = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, number)
    return drawn.astype(np.int64).clip(1)


@quick
@given(packings, documents, st.integers(1, 20), st.integers(0, 99))
def test_every_token_of_every_document_stands_in_one_sequence(packing, lengths, seq_len, seed):
    pieces = [piece for sequence in sequences(packing, lengths, seq_len, seed) for piece in sequence]
    tokens = Counter((document, offset + i) for document, offset, length in pieces for i in range(length))
    assert tokens == Counter((document, i) for document, length in enumerate(lengths) for i in range(length))
    assert all(length >= 1 for _, _, length in pieces)


@quick
@given(packings, documents, st.integers(1, 20), st.integers(0, 99))
def test_no_sequence_is_too_long_or_empty(packing, lengths, seq_len, seed):
    found = sequences(packing, lengths, seq_len, seed)
    assert all(1 <= sum(length for _, _, length in sequence) <= seq_len for sequence in found)
    assert len(found) == sequences_needed(packing, np.array(lengths), seq_len)


@quick
@given(documents, st.integers(1, 20), st.integers(0, 99))
def test_best_fit_cuts_only_what_is_too_long_and_only_at_the_sequence_length(lengths, seq_len, seed):
    pieces = [piece for sequence in sequences("best_fit", lengths, seq_len, seed) for piece in sequence]
    for document, offset, length in pieces:
        assert offset % seq_len == 0
        assert length == min(seq_len, lengths[document] - offset)


@quick
@given(documents, st.integers(1, 20), st.integers(0, 99))
def test_concat_fills_every_sequence_but_one(lengths, seq_len, seed):
    sizes = sorted(sum(length for _, _, length in sequence) for sequence in sequences("concat", lengths, seq_len, seed))
    assert sizes[1:] == [seq_len] * (len(sizes) - 1)


@quick
@given(packings, documents, st.integers(1, 20), st.integers(0, 99))
def test_tokens_without_their_beginning_are_counted(packing, lengths, seq_len, seed):
    found = packed(packing, lengths, seq_len, seed)
    _, offsets, sizes, _ = found.pieces(0, found.num_sequences, np.array(lengths), seq_len)
    assert found.num_tokens == sum(lengths)
    assert found.without_beginning == sizes[offsets > 0].sum()


def best_fit_one_by_one(lengths: list[int], seq_len: int) -> list[int]:
    """The definition: the longest first, each where the least room takes it. How full each bin is, sorted."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        room = min(fitting, default=seq_len)
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
    return sorted(seq_len - room for room in rooms)


@quick
@given(st.lists(st.integers(1, 29), max_size=80))
def test_the_histogram_gives_what_best_fit_decreasing_gives(lengths):
    ranges, bins = fit_best(np.bincount(lengths, minlength=30).tolist(), 30)
    full, held, items = [0] * bins, [0] * bins, iter(sorted(lengths, reverse=True))
    for first, number, each, before in ranges:
        for bin in range(first, first + number):
            assert held[bin] == before
            held[bin] += each
            full[bin] += sum(next(items) for _ in range(each))
    assert next(items, None) is None
    assert sorted(full) == best_fit_one_by_one(lengths, 30)


@pytest.mark.parametrize("seq_len", [1024, 4096])
def test_less_than_half_a_percent_of_real_lengths_is_left_empty(seq_len):
    lengths = log_normal(50_000)
    found = packed("best_fit", lengths.tolist(), seq_len)
    assert found.num_tokens / (found.num_sequences * seq_len) > 0.995


def test_a_documents_companions_differ_from_order_to_order():
    lengths = [3, 4, 5] * 40
    companions = [
        {
            frozenset(document for document, _, _ in sequence)
            for sequence in sequences("best_fit", lengths, 8, seed)
            if len(sequence) > 1
        }
        for seed in range(4)
    ]
    for one, other in pairwise(companions):
        assert len(one & other) < len(one) / 4


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_pieces_of_a_long_document_are_far_apart(packing):
    # One document of 100 sequences among 1,900 others: one of its pieces in 20 sequences, as even as strata make it.
    found = sequences(packing, [800] + [8] * 1900, 8)
    places = [i for i, sequence in enumerate(found) if [piece[0] for piece in sequence] == [0]]
    assert len(places) >= 99
    assert max(sum(1 for place in places if start <= place < start + 16) for start in range(len(found))) <= 4
    offsets = [found[place][0][1] for place in places]
    assert offsets != sorted(offsets), "its beginning always comes first in the epoch"


def test_lengths_beyond_what_16_bits_sort_are_packed_too():
    lengths = log_normal(300, mean=60_000)
    found = packed("best_fit", lengths.tolist(), 2**17)
    _, _, sizes, _ = found.pieces(0, found.num_sequences, lengths, 2**17)
    assert sizes.sum() == lengths.sum()
    assert sizes.max() <= 2**17
