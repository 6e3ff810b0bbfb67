"""What counting tokens and gzip give on a held-out text, worked out by hand, over what the model is measured on."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter

import pytest

from llama_pro_fast.config import DataConfig, Source
from llama_pro_fast.data.corpus import HeldOut
from llama_pro_fast.evaluation.baselines import references
from llama_pro_fast.model.batch import IGNORE_INDEX
from llama_pro_fast.text.documents import is_held_out
from llama_pro_fast.text.preparing import tokenize_source
from llama_pro_fast.text.sources import resolve_sources
from llama_pro_fast.text.store import Side, TokenStore
from llama_pro_fast.text.tokenizer import train_tokenizer

SIZE = 290
SHARE = 0.3
TEXTS = [f"Ünder the tree no. {n} {'sat a llama, ' * (n % 4)}and that was all. 🦙\n" for n in range(40)]
HELD_OUT = {text for text in TEXTS if is_held_out(text, SHARE)}
ENOUGH = 10**6


@pytest.fixture
def make(tmp_path):
    """(held-out text, tokenizer) of the documents above."""

    def made(*, vocab_size: int = SIZE, share: float = SHARE, weight: float = 1.0):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        source = resolve_sources(DataConfig(domain=[Source(path=str(path), weight=weight)]))[0]
        # Trained on all of them, so that the tokenizer is the same whatever is held out.
        tokenizer = train_tokenizer(
            resolve_sources(DataConfig(domain=str(path)))[:1], vocab_size=vocab_size, held_out=1e-12, bos=0, eos=1
        )
        store = tokenize_source(source, tokenizer, held_out=share, cache_dir=tmp_path / "cache")
        return HeldOut(source, store, seq_len=16), tokenizer

    return made


def predicted(text: HeldOut, max_tokens: int) -> list[int]:
    """The very tokens the model's loss is a mean over."""
    batches = list(text.sample(max_tokens).batches(2))
    return [token for batch in batches for token in batch.labels.tolist() if token != IGNORE_INDEX]


def documents(store: TokenStore, side: Side) -> list[list[int]]:
    return [store.tokens(side.begins[n : n + 1], side.lengths[n : n + 1]).tolist() for n in range(side.num_documents)]


def cuts(text: HeldOut) -> dict[str, int]:
    """Numbers of tokens at which a sample may end."""
    lengths = [len(document) for document in text.sample(ENOUGH).documents()]
    return {"all": ENOUGH, "between documents": sum(lengths[:3]), "inside a document": sum(lengths[:3]) + 7}


@pytest.mark.parametrize("end", ["all", "between documents", "inside a document"])
def test_the_unigram_loss_is_that_of_counting_by_hand(make, end):
    text, tokenizer = make()
    max_tokens = cuts(text)[end]
    counts = Counter(token for document in documents(text.store, text.store.train) for token in document[1:])
    total = counts.total() + SIZE
    nats = [-math.log((counts[token] + 1) / total) for token in predicted(text, max_tokens)]
    found = references(text, tokenizer, vocab_size=SIZE, max_tokens=max_tokens)
    assert found.unigram_loss == pytest.approx(math.fsum(nats) / len(nats), rel=1e-12)
    num_bytes = text.sample(max_tokens).num_bytes
    assert found.unigram_bits_per_byte == pytest.approx(math.fsum(nats) / math.log(2) / num_bytes, rel=1e-12)


def test_its_bytes_are_those_of_the_held_out_texts(make):
    text, tokenizer = make()
    found = references(text, tokenizer, vocab_size=SIZE, max_tokens=ENOUGH)
    nats = found.unigram_loss * len(predicted(text, ENOUGH))
    num_bytes = sum(len(held_out.encode()) for held_out in HELD_OUT)
    assert found.unigram_bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-12)


def test_the_frequencies_sum_to_one_over_the_models_vocabulary(make):
    """A model may have more embeddings than its tokenizer has tokens: they share the probability too."""
    text, tokenizer = make()
    losses = [references(text, tokenizer, vocab_size=size, max_tokens=ENOUGH).unigram_loss for size in (SIZE, 2 * SIZE)]
    tokens = text.store.train.num_tokens - text.store.train.num_documents  # a document's first is not predicted
    assert losses[1] - losses[0] == pytest.approx(math.log((tokens + 2 * SIZE) / (tokens + SIZE)), rel=1e-9)


@pytest.mark.parametrize("end", ["all", "between documents"])
def test_the_gzip_figure_is_gzips_of_the_documents(make, end):
    text, tokenizer = make()
    max_tokens = cuts(text)[end]
    measured = [tokenizer.decode(d, skip_special_tokens=True) for d in text.sample(max_tokens).documents()]
    assert set(measured) == HELD_OUT if end == "all" else set(measured) < HELD_OUT
    written = "".join(measured).encode()
    found = references(text, tokenizer, vocab_size=SIZE, max_tokens=max_tokens)
    assert found.gzip_bits_per_byte == 8 * len(gzip.compress(written, 9)) / len(written)


def test_of_a_document_that_is_cut_gzip_reads_as_far_as_the_model_does(make):
    """One byte a token: 258 entries are the bytes and the marks."""
    text, tokenizer = make(vocab_size=258)
    whole = [tokenizer.decode(d, skip_special_tokens=True).encode() for d in text.sample(ENOUGH).documents()]
    written = whole[0] + whole[1][:10]
    max_tokens = (
        len(whole[0]) + 2 + 1 + 9
    )  # the first with BOS and EOS; of the second BOS and nine bytes, predicting ten
    found = references(text, tokenizer, vocab_size=258, max_tokens=max_tokens)
    assert found.gzip_bits_per_byte == 8 * len(gzip.compress(written, 9)) / len(written)


def test_the_marks_are_no_text_to_gzip(make):
    text, tokenizer = make()
    assert tokenizer.decode(text.sample(ENOUGH).documents()[0]).startswith(tokenizer.bos_token)
    written = "".join(tokenizer.batch_decode(text.sample(ENOUGH).documents(), skip_special_tokens=True)).encode()
    assert tokenizer.bos_token.encode() not in written
    assert len(written) == sum(len(held_out.encode()) for held_out in HELD_OUT)


def test_a_text_that_is_only_measured_and_has_no_training_side_has_no_figures(make):
    text, tokenizer = make(share=1 - 1e-12, weight=0.0)
    assert not text.store.train.num_tokens
    assert references(text, tokenizer, vocab_size=SIZE, max_tokens=ENOUGH) is None
