"""The training text: what a batch holds, that only its place decides it, and how often each document comes."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from math import floor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import in_memory_store, numbered_stores

from llama_pro_fast.data.dataset import Mixed, PackedDataset
from llama_pro_fast.errors import UserError
from llama_pro_fast.model.batch import IGNORE_INDEX, PackedBatch

quick = settings(deadline=None, max_examples=25)
packings = st.sampled_from(["best_fit", "concat"])
WEIGHTS = [0.1, 0.3, 0.3333, 1.0, 1.5, 2.0]


def equal(a: PackedBatch, b: PackedBatch) -> bool:
    names = ("input_ids", "labels", "position_ids", "cu_seqlens")
    return (a.max_seqlen, a.num_valid) == (b.max_seqlen, b.num_valid) and all(
        torch.equal(getattr(a, name), getattr(b, name)) and getattr(a, name).dtype == getattr(b, name).dtype
        for name in names
    )


@st.composite
def mixtures(draw) -> dict:
    """Arguments of a dataset: up to 4 sources with weights or shares, tokens that are all different, from 1 up."""
    number = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=12), min_size=number, max_size=number))
    stores, _ = numbered_stores(lengths)
    sources = [Mixed(store, weight=draw(st.sampled_from(WEIGHTS))) for store in stores]
    for i in range(draw(st.integers(0, number - 1))):
        sources[i] = Mixed(stores[i], share=draw(st.sampled_from([0.05, 0.2, 0.3])))
    if draw(st.booleans()):
        sources.insert(draw(st.integers(0, number)), Mixed(in_memory_store(train=[[0]]), weight=0.0))
    arguments = {
        "sources": sources,
        "seq_len": draw(st.integers(1, 9)),
        "seed": draw(st.integers(0, 2**40)),
        "batch_size": draw(st.integers(1, 17)),
        "packing": draw(packings),
    }
    try:
        PackedDataset(**arguments)
    except UserError:  # less than a sequence
        arguments["seq_len"] = 1
        arguments["sources"] = [replace(s, weight=s.weight and 1.0) for s in sources]
    return arguments


def pieces_of(batch: PackedBatch) -> list[tuple[list[int], list[int]]]:
    """Inputs and labels of each piece."""
    bounds = sorted(set(batch.cu_seqlens.tolist()))
    return [(batch.input_ids[a:b].tolist(), batch.labels[a:b].tolist()) for a, b in pairwise(bounds)]


@quick
@given(mixtures(), st.integers(0, 60), st.integers(1, 9))
def test_a_piece_is_one_document_and_predicts_no_other(arguments, start, count):
    batch = PackedDataset(**arguments).batch(start, count)
    seq_len = arguments["seq_len"]
    ends = {int(begin + length) for s in arguments["sources"] for begin, length in _spans(s)}  # after its last token
    assert len(batch.input_ids) == count * seq_len
    assert set(range(0, count * seq_len + 1, seq_len)) <= set(batch.cu_seqlens.tolist())
    for inputs, labels in pieces_of(batch):
        if inputs[0] == 0:  # filling
            assert set(inputs) == {0}
            assert set(labels) == {IGNORE_INDEX}
            continue
        assert inputs == list(range(inputs[0], inputs[0] + len(inputs)))
        assert not ends & set(inputs[1:]), "two documents in a piece"
        after = inputs[-1] + 1
        assert labels == [*inputs[1:], IGNORE_INDEX if after in ends else after]
    assert batch.num_valid == int((batch.labels != IGNORE_INDEX).sum())


def _spans(source: Mixed):
    """First token and length of each document that trains."""
    side = source.store.train
    firsts = source.store.tokens(side.begins, np.ones_like(side.begins))
    return zip(firsts.tolist(), side.lengths.tolist(), strict=True)


@quick
@given(mixtures(), st.integers(0, 60), st.integers(1, 9))
def test_positions_restart_with_each_piece(arguments, start, count):
    batch = PackedDataset(**arguments).batch(start, count)
    bounds = sorted(set(batch.cu_seqlens.tolist()))
    assert batch.position_ids.tolist() == [i for a, b in pairwise(bounds) for i in range(b - a)]
    # Padded to the next power of two: shapes recur, and empty documents are few.
    assert len(batch.cu_seqlens) in {2**i for i in range(4, 12)}
    assert len(batch.cu_seqlens) == 16 or len(batch.cu_seqlens) < 2 * len(bounds)


@quick
@given(mixtures(), st.integers(0, 60), st.integers(1, 9), st.lists(st.integers(0, 80), max_size=3))
def test_a_batch_depends_on_nothing_but_its_place(arguments, start, count, asked_before):
    fresh = PackedDataset(**arguments).batch(start, count)
    straight = PackedDataset(**arguments)
    for earlier in asked_before:
        straight.batch(earlier, 2)
    assert equal(straight.batch(start, count), fresh)
    singles = [straight.batch(start + i, 1) for i in range(count)]
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(torch.cat([getattr(single, name) for single in singles]), getattr(fresh, name))
    assert sum(single.num_valid for single in singles) == fresh.num_valid


@quick
@given(st.lists(st.integers(1, 20), min_size=1, max_size=15), st.integers(1, 9), packings, st.integers(0, 9))
def test_every_token_stands_once_in_an_epoch(lengths, seq_len, packing, seed):
    stores, corpora = numbered_stores([lengths])
    if sum(lengths) < seq_len:
        return
    dataset = PackedDataset([Mixed(stores[0], 1)], seq_len=seq_len, seed=seed, batch_size=4, packing=packing)
    start = 0
    for epoch in range(2):
        count = dataset.sequences_in_epoch(epoch)
        tokens = dataset.batch(start, count).input_ids
        assert sorted(tokens[tokens > 0].tolist()) == [token for document in corpora[0] for token in document]
        start += count


documents_and_weights = st.tuples(st.integers(1, 12), st.sampled_from([1.5, 0.1, 0.3, 2, 0.3333, Fraction(1, 3)]))


@settings(deadline=None, max_examples=25)
@given(st.lists(documents_and_weights, min_size=1, max_size=3), packings, st.integers(0, 99))
def test_weights_are_exact_in_documents_and_none_repeats_before_all_have_come(sources, packing, seed):
    stores, _ = numbered_stores([[3] * number for number, _ in sources])
    mixed = [Mixed(store, weight=weight) for store, (_, weight) in zip(stores, sources, strict=True)]
    if sum(3 * number * weight for number, weight in sources) < 3:
        return
    dataset = PackedDataset(mixed, seq_len=3, seed=seed, batch_size=4, packing=packing)
    came = [Counter() for _ in sources]  # a document is a sequence, in both packings
    start = 0
    for epoch in range(1, 8):
        end = start + dataset.sequences_in_epoch(epoch - 1)
        for sequence in range(start, end):
            ((source, document),) = dataset.documents(sequence, 1)
            came[source][document] += 1
            times = [came[source][document] for document in range(sources[source][0])]
            assert max(times) - min(times) <= 1, "a document came again before all had come"
        for (number, weight), counted in zip(sources, came, strict=True):
            assert counted.total() == floor(epoch * Fraction(str(weight)) * number)
        start = end


@quick
@given(mixtures(), st.integers(0, 60), st.integers(1, 9))
def test_documents_and_tokens_by_source_are_those_of_the_batch(arguments, start, count):
    dataset = PackedDataset(**arguments)
    home = {
        token: (source, document)
        for source, mixed in enumerate(arguments["sources"])
        for document, (first, length) in enumerate(_spans(mixed))
        for token in range(first, first + length)
    }
    homes = [home[token] for token in dataset.batch(start, count).input_ids.tolist() if token]
    assert dataset.documents(start, count) == list(dict.fromkeys(homes))
    counted = Counter(source for source, _ in homes)
    tokens = dataset.source_tokens(start, count)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == [counted[source] for source in range(len(arguments["sources"]))]


def test_tokens_that_are_not_learned_are_no_targets():
    store = in_memory_store(train=[[1, 2, 3, 4, 5, 6]], learned=[True, True, False, True, False, True])
    for packing in ("best_fit", "concat"):
        dataset = PackedDataset([Mixed(store, 1)], seq_len=4, seed=0, batch_size=1, packing=packing)
        after = dict(zip(*(getattr(dataset.batch(0, 2), n).tolist() for n in ("input_ids", "labels")), strict=True))
        assert [after[token] for token in range(1, 7)] == [2, IGNORE_INDEX, 4, IGNORE_INDEX, 6, IGNORE_INDEX]


def test_masked_documents_do_not_train():
    store = in_memory_store(train=[[1] * 4, [2] * 4, [3] * 4, [4] * 4], held_out=[[9]])
    mask = np.array([True, False, True, False])
    dataset = PackedDataset([Mixed(store, 1, mask=mask)], seq_len=4, seed=0, batch_size=1)
    assert dataset.sequences_in_epoch(0) == 2
    assert set(dataset.batch(0, 10).input_ids.tolist()) == {1, 3}
    assert {document for _, document in dataset.documents(0, 10)} == {0, 2}


def test_the_order_is_the_same_on_every_machine_and_numpy():
    # Written down once: a change here means that no stored run can be resumed.
    stores, _ = numbered_stores([[1] * 8, [9, 2], [3] * 4])
    sources = [Mixed(stores[0], 1.5), Mixed(stores[1], 1), Mixed(stores[2], share=0.25)]
    expected = {
        "best_fit": [7, 5, 1, 4, 13, 14, 15, 16, 29, 30, 31, 0, 6, 2, 3, 8, 18, 19, 17, 0, 8, 5, 7, 1],
        "concat": [7, 5, 1, 4, 11, 12, 13, 14, 26, 27, 28, 23, 6, 2, 3, 8, 15, 16, 17, 0, 8, 5, 7, 1],
    }
    for packing, tokens in expected.items():
        dataset = PackedDataset(sources, seq_len=4, seed=7, batch_size=4, packing=packing)
        assert dataset.batch(0, 6).input_ids.tolist() == tokens


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_seed_epoch_and_source_decide_the_order(packing):
    stores, _ = numbered_stores([[3, 1, 2] * 30] * 2)

    def order(seed: int, epoch: int, source: int) -> list[int]:
        sources = [Mixed(store, 1) for store in stores]
        dataset = PackedDataset(sources, seq_len=4, seed=seed, batch_size=2, packing=packing)
        count = dataset.sequences_in_epoch(0)
        return [document for of, document in dataset.documents(epoch * count, count) if of == source]

    orders = [order(seed, epoch, source) for seed in (0, 1) for epoch in (0, 1) for source in (0, 1)]
    assert order(0, 0, 0) == orders[0]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


# One document does not fill a step


def largest_part(dataset: PackedDataset, corpora: list[list[list[int]]], steps: int, batch_size: int) -> float:
    """How much of a step is one document, at most."""
    firsts = np.array([document[0] for documents in corpora for document in documents])
    tokens = dataset.batch(0, steps * batch_size).input_ids.numpy().reshape(steps, -1)
    of = np.searchsorted(firsts, tokens, side="right")  # 0 is filling
    return max(int(np.bincount(row[row > 0]).max()) for row in of) / tokens.shape[1]


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_no_step_of_16_is_over_half_one_document_that_is_at_most_5_percent_of_the_corpus(packing):
    adversaries = [
        [[80] * 20],  # twenty documents of 5 %
        [[81] * 20],
        [[400] * 20],
        [[80] * 10, [80] * 10],
        [[160] * 19 + [3] * 60],
        [[160] * 2, [160] * 18],
        [[900], [8] * 2200],  # all of a source, and long
        [[900] + [8] * 100, [40] * 450],
    ]
    for lengths in adversaries:
        stores, corpora = numbered_stores(lengths)
        assert max(map(max, lengths)) <= 0.05 * sum(map(sum, lengths))
        for seed in range(24):
            sources = [Mixed(store, 1) for store in stores]
            dataset = PackedDataset(sources, seq_len=8, seed=seed, batch_size=16, packing=packing)
            steps = min(30, 2 * dataset.sequences_in_epoch(0) // 16 + 1)
            assert largest_part(dataset, corpora, steps, 16) <= 0.5, (lengths, seed)


# What a person and the planner are told


def test_what_is_said_of_an_epoch_is_what_its_batches_hold():
    stores, _ = numbered_stores([[5, 3, 20, 7, 1, 2, 9], [4] * 10])
    for packing in ("best_fit", "concat"):
        dataset = PackedDataset(
            [Mixed(stores[0], 2), Mixed(stores[1], 1)], seq_len=8, seed=0, batch_size=4, packing=packing
        )
        count = dataset.sequences_in_epoch(0)
        batch = dataset.batch(0, count)
        tokens = int(dataset.source_tokens(0, count).sum())
        assert dataset.mean_document == tokens / (2 * 7 + 10)
        assert dataset.filled == pytest.approx(tokens / (8 * count), abs=0.03)
        begins = {first for store in stores for first, _ in _spans(Mixed(store))}
        without = sum(len(inputs) for inputs, _ in pieces_of(batch) if inputs[0] and inputs[0] not in begins)
        assert dataset.without_beginning == pytest.approx(without / tokens, abs=0.05)


def test_the_mean_document_of_shares_is_that_of_the_steps():
    stores, _ = numbered_stores([[4] * 10, [8] * 3, [2] * 400])
    sources = [Mixed(stores[0], 1), Mixed(stores[1], share=0.5), Mixed(stores[2], share=0.25)]
    dataset = PackedDataset(sources, seq_len=8, seed=0, batch_size=16)
    tokens = dataset.source_tokens(0, 1600)
    documents = [tokens[0] / 4, tokens[1] / 8, tokens[2] / 2]
    assert dataset.mean_document == pytest.approx(tokens.sum() / sum(documents), rel=0.01)


def test_shares_and_rounds_are_told_by_source():
    stores, _ = numbered_stores([[8] * 20, [8], [8] * 5, [8] * 20])
    sources = [Mixed(stores[0], 1.5), Mixed(stores[1]), Mixed(stores[2], share=0.2), Mixed(stores[3], 0.5)]
    dataset = PackedDataset(sources, seq_len=8, seed=0, batch_size=10)
    assert dataset.shares.tolist() == pytest.approx([0.6, 0, 0.2, 0.2])
    assert dataset.sequences_in_epoch(0) == 50
    assert dataset.epochs_seen(50).tolist() == [1.5, 0, 2, 0.5]
    assert dataset.epochs_seen(0).tolist() == [0, 0, 0, 0]


def test_where_every_source_has_a_share_an_epoch_is_all_first_rounds_together():
    stores, _ = numbered_stores([[8] * 20, [8] * 5])
    sources = [Mixed(stores[0], share=0.7), Mixed(stores[1], share=0.3)]
    dataset = PackedDataset(sources, seq_len=8, seed=0, batch_size=10)
    assert [dataset.locate(i) for i in (0, 24, 25, 51)] == [(0, 0), (0, 24), (1, 0), (2, 1)]
    for step in range(10):
        assert dataset.source_tokens(10 * step, 10).tolist() == [7 * 8, 3 * 8]


def test_epochs_without_a_sequence_are_passed_over():
    stores, _ = numbered_stores([[4]])
    dataset = PackedDataset([Mixed(stores[0], 0.5)], seq_len=2, seed=0, batch_size=1)
    assert [dataset.sequences_in_epoch(epoch) for epoch in range(6)] == [0, 2, 0, 2, 0, 2]
    assert [dataset.locate(i) for i in range(4)] == [(1, 0), (1, 1), (3, 0), (3, 1)]


@pytest.mark.parametrize(
    ("mixture", "seq_len", "seed", "words"),
    [
        ([{"weight": 1.0}], 6, 0, ["5 tokens", "6", "--train.seq_len"]),
        ([{"weight": 0.5}], 5, 0, ["2 tokens", "--train.seq_len"]),
        ([{"weight": 0.0}], 2, 0, ["no source trains", "weight"]),
        ([{}], 2, 0, ["no source trains", "weight"]),
        ([{"weight": 1.0}], 2, -1, ["train.seed", "-1"]),
        ([{"share": 0.5}, {"share": 0.4}], 2, 0, ["0.9", "sum to 1"]),
        ([{"share": 0.5}, {"share": 0.5}, {"weight": 1}], 2, 0, ["1 together", "lower"]),
    ],
)
def test_errors_name_the_thing_and_the_remedy(mixture, seq_len, seed, words):
    stores, _ = numbered_stores([[2, 3]] * len(mixture))
    sources = [Mixed(store, **each) for store, each in zip(stores, mixture, strict=True)]
    with pytest.raises(UserError) as caught:
        PackedDataset(sources, seq_len=seq_len, seed=seed, batch_size=4)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.slow
def test_packing_needs_neither_datasets_nor_transformers():
    code = (
        "import sys, llama_pro_fast.data.dataset, llama_pro_fast.data.sample; "
        "print(sorted({'datasets', 'transformers', 'pyarrow', 'tokenizers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
