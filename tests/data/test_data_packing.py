"""Packing: what a sequence holds, in which order, and that only (seed, epoch, position) decides it."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_pro_fast.data.packing import PackedDataset
from llama_pro_fast.data.tokens import TokenSplit, TokenStore
from llama_pro_fast.errors import UserError
from llama_pro_fast.model.batch import IGNORE_INDEX, PackedBatch

quick = settings(deadline=None, max_examples=40)


def split_of(documents: list[list[int]]) -> TokenSplit:
    tokens = np.array([token for document in documents for token in document], np.uint32)
    offsets = np.cumsum([0] + [len(document) for document in documents])
    num_bytes = np.array([4 * (len(document) - 1) for document in documents], np.int64)
    return TokenSplit(tokens, offsets.astype(np.int64), num_bytes)


def store_of(*, train=(), held_out=()) -> TokenStore:
    return TokenStore(split_of(list(train)), split_of(list(held_out)), num_skipped=0, key="")


def stores_of(lengths: list[list[int]]) -> tuple[list[TokenStore], list[list[list[int]]]]:
    """Stores whose every token is a different number, so that a token says where it comes from."""
    counter = iter(range(10**6))
    corpora = [[[next(counter) for _ in range(n)] for n in of_store] for of_store in lengths]
    return [store_of(train=documents) for documents in corpora], corpora


def equal(a: PackedBatch, b: PackedBatch) -> bool:
    names = ("input_ids", "labels", "position_ids", "cu_seqlens")
    return (a.max_seqlen, a.num_valid) == (b.max_seqlen, b.num_valid) and all(
        torch.equal(getattr(a, name), getattr(b, name)) and getattr(a, name).dtype == getattr(b, name).dtype
        for name in names
    )


def from_documents(row: list[list[int]], begin: int, end: int, seq_len: int, **kwargs) -> PackedBatch:
    """The definition: tokens [begin, end) of documents laid end to end, cut at seq_len."""
    tokens = [(token, number) for number, document in enumerate(row) for token in document]
    pieces, following = [], []
    for start in range(begin, end, seq_len):
        stop = min(start + seq_len, end)
        numbers = sorted({number for _, number in tokens[start:stop]})
        for number in numbers:
            pieces.append([token for token, of in tokens[start:stop] if of == number])
            after = tokens[stop] if stop < len(tokens) else (None, None)
            following.append(after[0] if after[1] == number else None)
    return PackedBatch.from_documents(pieces, next_tokens=following, max_seqlen=seq_len, **kwargs)


def row_of_epoch(dataset: PackedDataset, corpora: list[list[list[int]]], epoch: int) -> list[list[int]]:
    """The documents of an epoch in their order (from the private stream, which knows the dropped tail too)."""
    stream = dataset._stream(epoch)
    by_first = {document[0]: document for documents in corpora for document in documents}
    firsts = dataset._tokens[stream.addresses]
    return [by_first[int(first)] for first in firsts]


lengths_and_weights = st.lists(
    st.tuples(
        st.lists(st.integers(1, 9), min_size=1, max_size=12),
        st.sampled_from([0.3, 0.5, 1.0, 1.5, 2.0, 2.25]),
    ),
    min_size=1,
    max_size=3,
)


def dataset_of(sources, seq_len: int, seed: int):
    """None where the text is shorter than a sequence."""
    stores, corpora = stores_of([lengths for lengths, _ in sources])
    weights = [weight for _, weight in sources]
    if int(sum(weight * sum(lengths) for lengths, weight in sources)) < seq_len:
        return None, corpora
    return PackedDataset(list(zip(stores, weights, strict=True)), seq_len=seq_len, seed=seed), corpora


@quick
@given(lengths_and_weights, st.integers(1, 12), st.integers(0, 2**40), st.integers(0, 3))
def test_an_epoch_is_its_documents_in_order_cut_at_seq_len(sources, seq_len, seed, epoch):
    dataset, corpora = dataset_of(sources, seq_len, seed)
    if dataset is None or not dataset.sequences_in_epoch(epoch):
        return
    row = row_of_epoch(dataset, corpora, epoch)
    count = dataset.sequences_in_epoch(epoch)
    assert count == sum(map(len, row)) // seq_len
    start = sum(dataset.sequences_in_epoch(e) for e in range(epoch))
    batch = dataset.batch(start, count)
    expected = from_documents(row, 0, count * seq_len, seq_len, cu_seqlens_length=len(batch.cu_seqlens))
    assert equal(batch, expected)


@quick
@given(lengths_and_weights, st.integers(1, 12), st.integers(0, 2**40))
def test_every_document_appears_as_often_as_its_weight_says(sources, seq_len, seed):
    dataset, corpora = dataset_of(sources, seq_len, seed)
    if dataset is None:
        return
    for epoch in range(3):
        counted = Counter(document[0] for document in row_of_epoch(dataset, corpora, epoch))
        for (_, weight), documents in zip(sources, corpora, strict=True):
            for document in documents:
                assert counted[document[0]] in {math.floor(weight), math.ceil(weight)}


def test_a_fractional_weight_is_met_on_average():
    stores, corpora = stores_of([[3] * 2000])
    dataset = PackedDataset([(stores[0], 1.25)], seq_len=8, seed=0)
    rows = [row_of_epoch(dataset, corpora, epoch) for epoch in range(2)]
    for row in rows:
        assert abs(len(row) - 2500) < 4 * math.sqrt(2000 * 0.25 * 0.75)
    twice = [{first for first, n in Counter(document[0] for document in row).items() if n == 2} for row in rows]
    assert twice[0] != twice[1]


@quick
@given(lengths_and_weights, st.integers(1, 12), st.integers(0, 99), st.lists(st.integers(0, 40), max_size=4), st.data())
def test_a_batch_depends_on_nothing_but_its_place(sources, seq_len, seed, asked_before, data):
    dataset, _ = dataset_of(sources, seq_len, seed)
    if dataset is None:
        return
    start, count = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 7))
    fresh = dataset_of(sources, seq_len, seed)[0].batch(start, count)
    for earlier in asked_before:
        dataset.batch(earlier, 2)
    assert equal(dataset.batch(start, count), fresh)
    # One batch of many sequences is many batches of one.
    singles = [dataset.batch(start + i, 1) for i in range(count)]
    assert torch.equal(torch.cat([single.input_ids for single in singles]), fresh.input_ids)
    assert torch.equal(torch.cat([single.labels for single in singles]), fresh.labels)
    assert torch.equal(torch.cat([single.position_ids for single in singles]), fresh.position_ids)
    assert sum(single.num_valid for single in singles) == fresh.num_valid == (fresh.labels != IGNORE_INDEX).sum()


@quick
@given(lengths_and_weights, st.integers(1, 12), st.integers(0, 99), st.integers(1, 6))
def test_cu_seqlens_are_padded_to_the_next_power_of_two(sources, seq_len, seed, count):
    dataset, _ = dataset_of(sources, seq_len, seed)
    if dataset is None:
        return
    for start in range(30):
        batch = dataset.batch(start, count)
        cu_seqlens, pieces = batch.cu_seqlens.tolist(), batch.position_ids.tolist().count(0)
        assert (cu_seqlens[0], cu_seqlens[-1]) == (0, count * seq_len)
        assert cu_seqlens == sorted(cu_seqlens)
        assert set(range(0, count * seq_len, seq_len)) <= set(cu_seqlens)
        assert len(set(cu_seqlens)) == pieces + 1 <= len(cu_seqlens)
        assert len(cu_seqlens) == 16 or len(cu_seqlens) in {2**i for i in range(5, 12)}
        assert len(cu_seqlens) == 16 or len(cu_seqlens) < 2 * (pieces + 1)


def test_a_few_tiny_documents_do_not_cost_empty_ones_everywhere():
    # Every empty document takes memory and time in attention's backward; 1 % of 3 tokens once meant 1,367 of them.
    stores, _ = stores_of([[1000] * 396 + [3] * 4])
    dataset = PackedDataset([(stores[0], 1.0)], seq_len=4096, seed=0)
    assert {len(dataset.batch(start, 1).cu_seqlens) for start in range(50)} == {16}


def test_seed_and_epoch_decide_the_order():
    stores, corpora = stores_of([[1] * 50])

    def order(seed, epoch):
        return row_of_epoch(PackedDataset([(stores[0], 1.0)], seq_len=5, seed=seed), corpora, epoch)

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert order(0, 0) == orders[0]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert all(sorted(row) == corpora[0] for row in orders)


def test_the_order_is_the_same_on_every_machine_and_numpy():
    # Written down once: a change here means that no stored run can be resumed.
    stores, _ = stores_of([[1] * 8])
    dataset = PackedDataset([(stores[0], 1.5)], seq_len=8, seed=7)
    assert dataset.batch(0, 1).input_ids.tolist() == [3, 3, 2, 4, 1, 4, 5, 7]


def test_a_batch_crosses_the_end_of_an_epoch():
    stores, _ = stores_of([[4, 3, 4]])
    dataset = PackedDataset([(stores[0], 1.0)], seq_len=5, seed=0)  # 11 tokens: 2 sequences, 1 token dropped
    assert [dataset.locate(i) for i in range(5)] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert dataset.batch(1, 4).input_ids.tolist() == [
        token for i in range(1, 5) for token in dataset.batch(i, 1).input_ids.tolist()
    ]


def test_epochs_without_a_sequence_are_passed_over():
    stores, _ = stores_of([[4]])
    dataset = PackedDataset([(stores[0], 0.5)], seq_len=2, seed=0)
    sequences = [dataset.sequences_in_epoch(epoch) for epoch in range(12)]
    assert set(sequences) == {0, 2}
    non_empty = [epoch for epoch, n in enumerate(sequences) if n]
    assert [dataset.locate(i) for i in range(4)] == [(non_empty[i // 2], i % 2) for i in range(4)]


def test_a_source_of_weight_0_does_not_train():
    stores, _ = stores_of([[5], [5]])
    dataset = PackedDataset([(stores[0], 0.0), (stores[1], 1.0)], seq_len=5, seed=0)
    assert dataset.batch(0, 1).input_ids.tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("weights", "seq_len", "seed", "words"),
    [
        ([1.0], 6, 0, ["5 tokens", "6", "--train.seq_len"]),
        ([0.5], 5, 0, ["2 tokens", "--train.seq_len"]),
        ([0.0], 2, 0, ["no source trains", "weight"]),
        ([1.0], 2, -1, ["train.seed", "-1"]),
    ],
)
def test_errors_name_the_thing_and_the_remedy(weights, seq_len, seed, words):
    stores, _ = stores_of([[2, 3]])
    with pytest.raises(UserError) as caught:
        PackedDataset(list(zip(stores, weights, strict=True)), seq_len=seq_len, seed=seed)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.slow
def test_packing_needs_neither_datasets_nor_transformers():
    code = (
        "import sys, llama_pro_fast.data.packing; "
        "print(sorted({'datasets', 'transformers', 'pyarrow', 'tokenizers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_mean_document_is_weighed_as_an_epoch_is():
    """Tokens over documents, each as often as it stands in an epoch."""
    stores, _ = stores_of([[10, 20], [100], [7]])
    dataset = PackedDataset([(stores[0], 1), (stores[1], 2.5), (stores[2], 0)], seq_len=8, seed=0)
    assert dataset.mean_document == pytest.approx((10 + 20 + 2.5 * 100) / (1 + 1 + 2.5))


@quick
@given(lengths_and_weights, st.integers(1, 12), st.integers(0, 2**40), st.integers(0, 9), st.integers(1, 9), st.data())
def test_documents_and_tokens_by_source_are_those_of_the_batch(sources, seq_len, seed, start, count, data):
    """Every token is a different number, so the batch itself says which documents it holds."""
    dataset, corpora = dataset_of(sources, seq_len, seed)
    if dataset is None or not dataset.sequences_in_epoch(0):
        return
    # A store that only is measured, anywhere among them, is counted and holds nothing.
    at = data.draw(st.integers(0, len(corpora)))
    stores, corpora = stores_of([*(lengths for lengths, _ in sources[:at]), [3], *(of for of, _ in sources[at:])])
    weights = [weight for _, weight in sources]
    weights.insert(at, 0.0)
    dataset = PackedDataset(list(zip(stores, weights, strict=True)), seq_len=seq_len, seed=seed)
    home = {t: (s, d) for s, documents in enumerate(corpora) for d, document in enumerate(documents) for t in document}
    homes = [home[token] for token in dataset.batch(start, count).input_ids.tolist()]
    assert dataset.documents(start, count) == list(dict.fromkeys(homes))
    counted = Counter(source for source, _ in homes)
    assert dataset.source_tokens(start, count).tolist() == [counted[source] for source in range(len(corpora))]
