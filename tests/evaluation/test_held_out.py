"""What is measured: which held-out documents, every token but each one's first, and bits per byte of exactly those."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import in_memory_store, numbered
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llama_pro_fast.config import DataConfig, Source
from llama_pro_fast.data.corpus import HeldOut
from llama_pro_fast.data.sample import HeldOutSample
from llama_pro_fast.errors import UserError
from llama_pro_fast.evaluation.held_out import evaluate
from llama_pro_fast.model.batch import IGNORE_INDEX
from llama_pro_fast.text.preparing import tokenize_source
from llama_pro_fast.text.sources import resolve_sources

quick = settings(deadline=None, max_examples=60)


def held_out_store(documents: list[list[int]], num_bytes: list[int] | None = None):
    return in_memory_store(held_out=documents, num_bytes=num_bytes)


def order_of(store) -> list[int]:
    """First tokens of the documents in the order in which they are measured."""
    sample = HeldOutSample(store, seq_len=1, max_tokens=10**9)
    begins = store.held_out.begins
    firsts = set(store.tokens(begins, np.ones_like(begins)).tolist())
    return [id for batch in sample.batches(1) for id in batch.input_ids.tolist() if id in firsts]


@quick
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 12), st.integers(1, 4), st.integers(1, 70))
def test_a_sample_is_whole_documents_but_the_last_and_every_token_after_a_first_is_predicted(
    lengths, seq_len, micro_batch, max_tokens
):
    documents = numbered(lengths)
    store = held_out_store(documents)
    by_first = {document[0]: document for document in documents}
    row = [token for first in order_of(store) for token in by_first[first]]
    after = {a: b for document in documents for a, b in pairwise(document)}

    sample = HeldOutSample(store, seq_len=seq_len, max_tokens=max_tokens)
    batches = list(sample.batches(micro_batch))
    end = min(len(row), max_tokens)
    assert torch.cat([batch.input_ids for batch in batches]).tolist() == row[:end]
    assert torch.cat([batch.labels for batch in batches]).tolist() == [after.get(t, IGNORE_INDEX) for t in row[:end]]
    assert [len(batch.input_ids) for batch in batches[:-1]] == [seq_len * micro_batch] * (len(batches) - 1)
    assert sum(batch.num_valid for batch in batches) == sample.num_predicted
    assert sample.num_bytes == 4 * sample.num_predicted  # as every token after a first was given 4 bytes


@quick
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 12), st.integers(1, 4), st.integers(1, 70))
def test_the_documents_of_a_sample_are_what_its_batches_hold(lengths, seq_len, micro_batch, max_tokens):
    sample = HeldOutSample(held_out_store(numbered(lengths)), seq_len=seq_len, max_tokens=max_tokens)
    documents = [document.tolist() for document in sample.documents()]
    assert all(documents), "an empty document"
    batches = list(sample.batches(micro_batch))
    inputs, labels = (torch.cat([getattr(b, name) for b in batches]).tolist() for name in ("input_ids", "labels"))
    held = [token for document in documents for token in document]
    predicted = [token for document in documents for token in document[1:]]
    assert [label for label in labels if label != IGNORE_INDEX] == predicted
    assert len(predicted) == sample.num_predicted
    if labels[-1] != IGNORE_INDEX:  # cut inside a document: the token that the last one predicts is no input any more
        assert held.pop() == labels[-1]
    assert held == inputs


def test_beginnings_leave_at_least_a_token_to_go_on_with():
    text = HeldOut(SimpleNamespace(path="x"), held_out_store([[1, 2, 3, 4], [5, 6, 7], [8, 9], [10]]), seq_len=4)
    assert sorted(text.beginnings(2, max_tokens=100)) == [[1, 2], [5, 6], [8]]
    assert sorted(text.beginnings(9, max_tokens=100)) == [[1, 2, 3], [5, 6], [8]]
    few, all_of_them = (text.beginnings(1, max_tokens=most) for most in (4, 100))
    assert all_of_them[: len(few)] == few
    assert len(few) < len(all_of_them), "beginnings are of documents that are not measured"


def test_a_sample_is_of_all_files_and_the_same_in_every_run():
    store = held_out_store(numbered([10] * 200))  # say, two files of 100 documents
    sample = HeldOutSample(store, seq_len=50, max_tokens=400)
    documents = {int(id) // 10 for batch in sample.batches(1) for id in batch.input_ids}
    assert len(documents) == 40
    assert 10 < len([number for number in documents if number < 100]) < 30
    # Written down once: a change here means that runs are measured on other text than before.
    assert [first // 10 for first in order_of(held_out_store(numbered([10] * 8)))] == [3, 2, 1, 6, 0, 7, 4, 5]


def test_of_a_document_that_is_cut_the_bytes_count_in_proportion():
    store = held_out_store([[1, 2, 3, 4, 5]], num_bytes=[40])
    numbers = [HeldOutSample(store, seq_len=8, max_tokens=n) for n in (1, 2, 3, 4, 5, 9)]
    assert [sample.num_bytes for sample in numbers] == [10, 20, 30, 40, 40, 40]
    assert [sample.num_predicted for sample in numbers] == [1, 2, 3, 4, 4, 4]


def test_held_out_documents_of_single_tokens_are_an_error_that_names_the_source(tmp_path):
    (tmp_path / "short.txt").write_text("x")
    source = resolve_sources(DataConfig(domain=str(tmp_path / "short.txt")))[0]
    with pytest.raises(UserError) as caught:
        HeldOut(source, held_out_store([[1], [2]]), seq_len=8).sample(100)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in ("short.txt", "single token", "longer documents")), message


# Bits per byte


class EightBits(torch.nn.Module):
    """A model to which every next token is 8 bits of news."""

    def __init__(self):
        super().__init__()
        self.norm = SimpleNamespace(weight=torch.zeros(1))

    def hidden_states(self, batch):
        return batch.labels

    def token_losses(self, _, labels):
        return torch.where(labels == IGNORE_INDEX, 0.0, 8 * math.log(2))


def words_tokenizer(*, bos: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """Words and single spaces are tokens."""
    words = ["<s>", "</s>", "<unk>", " ", "à", "bcd", "🦙🦙", "e"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "isolated")
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **({"eos_token": "</s>"} if eos else {}))


@pytest.mark.parametrize(
    ("special", "num_bytes", "predicted"),
    [
        # "à bcd" is 2 + 1 + 3 bytes in 3 tokens, "🦙🦙 e" is 8 + 1 + 1 in 3, "e" is 1 in 1.
        ({}, (1 + 3) + (1 + 1) + 0, 2 + 2 + 0),
        ({"eos": True}, (1 + 3) + (1 + 1) + 0, 3 + 3 + 1),
        ({"bos": True}, 6 + 10 + 1, 3 + 3 + 1),
        ({"bos": True, "eos": True}, 6 + 10 + 1, 4 + 4 + 2),
    ],
)
def test_bits_per_byte_by_hand(tmp_path, special, num_bytes, predicted):
    texts = ["à bcd", "🦙🦙 e", "e"]
    (tmp_path / "in").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "in" / f"{number}.txt").write_text(text)
    source = resolve_sources(DataConfig(domain=[Source(path=str(tmp_path / "in"), weight=0.0)]))[0]
    store = tokenize_source(source, words_tokenizer(**special), held_out=1 - 1e-12, cache_dir=tmp_path / "cache")
    assert store.held_out.num_documents == 3
    sample = HeldOutSample(store, seq_len=4, max_tokens=1000)
    assert (sample.num_bytes, sample.num_predicted) == (num_bytes, predicted)
    result = evaluate(EightBits(), sample.batches(2), num_bytes=sample.num_bytes)
    assert result.tokens == predicted
    assert result.loss == pytest.approx(8 * math.log(2))
    assert result.bits_per_byte == pytest.approx(8 * predicted / num_bytes)


def test_bits_per_byte_of_no_bytes_are_not_given():
    sample = HeldOutSample(held_out_store([[5, 1]], num_bytes=[0]), seq_len=4, max_tokens=9)  # a token and its EOS
    result = evaluate(EightBits(), sample.batches(1), num_bytes=sample.num_bytes)
    assert (result.tokens, result.bits_per_byte) == (1, None)
