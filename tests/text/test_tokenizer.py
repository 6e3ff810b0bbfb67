"""A tokenizer from the training text: it loses nothing, its marks are the config's, and held-out text has no say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llama_pro_fast.config import DataConfig, Source
from llama_pro_fast.errors import UserError
from llama_pro_fast.text import tokenizer as module
from llama_pro_fast.text.documents import is_held_out
from llama_pro_fast.text.preparing import tokenize_source
from llama_pro_fast.text.sources import ResolvedSource, resolve_sources
from llama_pro_fast.text.tokenizer import BOS, EOS, save_tokenizer, train_tokenizer

TEXTS = [f"Document {n}: frozen blocks stay as they are, {'new ones learn ' * (n % 5)}and so on.\n" for n in range(60)]
BYTES = 256


def source_of(path: Path, texts: list[str], **settings) -> ResolvedSource:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return resolve_sources(DataConfig(domain=[Source(path=str(path), **settings)]))[0]


def trained(*sources: ResolvedSource, vocab_size: int = 320, held_out: float = 0.2, bos: int = 0, eos: int = 1):
    return train_tokenizer(sources, vocab_size=vocab_size, held_out=held_out, bos=bos, eos=eos)


def as_json(tokenizer: PreTrainedTokenizerFast) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str())


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> ResolvedSource:
    return source_of(tmp_path_factory.mktemp("text") / "rows.jsonl", TEXTS)


@pytest.fixture(scope="module")
def tokenizer(source) -> PreTrainedTokenizerFast:
    return trained(source)


@settings(deadline=None, max_examples=300)
@given(st.text())
@example("")
@example("  two leading, trailing tab and newline \t\r\n")
@example("no , clean - up of 's , do n't . Ever !")
@example("e\u0301 is not \u00e9, \u00a0is no space, \u200b\ufeff are kept")  # no normalisation
@example("🦙👩‍👩‍👧 \U0010ffff \x00\x1b")
def test_every_text_comes_back_exactly(tokenizer, text):
    assume(BOS not in text and EOS not in text)
    first, *ids = tokenizer(text)["input_ids"]
    assert first == tokenizer.bos_token_id
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([first, *ids], skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ["<s>struck out</s> is HTML", "</s>", "[BOS] <bos> <eos>", "<unk><pad>"])
def test_markup_is_text(tokenizer, text):
    """A page of HTML neither ends a document in its middle nor loses its tags."""
    ids = tokenizer(text)["input_ids"]
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids[1:])
    assert tokenizer.decode(ids[1:]) == text


@pytest.mark.parametrize(("bos", "eos"), [(0, 1), (1, 0)])
def test_a_document_begins_with_the_configs_bos_and_ends_with_its_eos(source, tmp_path, bos, eos):
    tokenizer = trained(source, bos=bos, eos=eos)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (bos, eos)
    store = tokenize_source(source, tokenizer, held_out=0.2, cache_dir=tmp_path)
    for number in store.train.numbers.tolist():
        begin, length = store.extent(number)
        document = store.tokens(np.array([begin]), np.array([length])).tolist()
        assert (document[0], document[-1]) == (bos, eos)
        assert not {bos, eos} & set(document[1:-1])


def test_held_out_documents_have_no_say(source, tmp_path):
    others = [f"Quite other words {n}: zebra quagga {'zebra ' * 50}" for n in range(200)]
    sides = {side: [text for text in others if is_held_out(text, 0.2) == side] for side in (True, False)}
    training = [text for text in TEXTS if not is_held_out(text, 0.2)]
    assert len(training) < len(TEXTS)
    expected = as_json(trained(source))
    assert as_json(trained(source_of(tmp_path / "a.jsonl", training + sides[True]))) == expected
    assert as_json(trained(source_of(tmp_path / "b.jsonl", training + sides[False]))) != expected


def test_which_documents_are_held_out_goes_by_the_sources_split(tmp_path):
    rows = [{"text": text, "book": "b4" if "learn" in text else "b0"} for text in TEXTS]
    assert not is_held_out("b0", 0.2)
    assert is_held_out("b4", 0.2)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = resolve_sources(DataConfig(domain=[Source(path=str(path), split_by="book")]))[0]
    kept = source_of(tmp_path / "kept.jsonl", [text for text in TEXTS if "learn" not in text])
    assert as_json(trained(split)) == as_json(trained(kept, held_out=1e-9))


def test_a_source_that_does_not_train_is_not_read(source, tmp_path):
    general = source_of(tmp_path / "general.jsonl", ["zebra quagga"] * 500, weight=0.0)
    (tmp_path / "general.jsonl").unlink()
    assert as_json(trained(source, general)) == as_json(trained(source))


def test_two_trainings_give_the_same_tokenizer(source):
    first, second = trained(source), trained(source)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_a_saved_one_is_the_same_to_transformers(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(tokenizer)
    assert as_json(again) == as_json(tokenizer)
    assert (again.bos_token_id, again.eos_token_id) == (0, 1)
    assert again(TEXTS[3])["input_ids"] == tokenizer(TEXTS[3])["input_ids"]
    # A class that older versions have too, and not a name of the version that wrote it.
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_sources_are_read_in_turn_and_not_for_ever(tmp_path, monkeypatch):
    """A source larger than what is read leaves room for the others."""
    monkeypatch.setattr(module, "READ_CHARACTERS", 4000)
    large = source_of(tmp_path / "large.jsonl", [f"zebra {'zebra ' * 20}{n}" for n in range(500)])
    small = source_of(tmp_path / "small.jsonl", [f"quagga {'quagga ' * 10}{n}" for n in range(10)])
    late = [f"zebra {'zebra ' * 20}{n}" for n in range(400)] + ["okapi " * 50] * 100
    for order in ((large, small), (small, large)):
        tokenizer = trained(*order)
        assert len(tokenizer.tokenize(" zebra")) == len(tokenizer.tokenize(" quagga")) == 1
    assert len(trained(source_of(tmp_path / "late.jsonl", late)).tokenize(" okapi")) > 1


def test_it_has_the_configs_size_where_the_text_has_that_many_words(source):
    assert len(trained(source, vocab_size=290)) == 290
    assert max(trained(source, vocab_size=290).get_vocab().values()) == 289
    assert BYTES + 2 < len(trained(source, vocab_size=50_000)) < 1000


def test_frequent_words_become_tokens(source):
    assert len(trained(source, vocab_size=400).tokenize(" blocks")) == 1
    assert len(trained(source, vocab_size=BYTES + 2).tokenize(" blocks")) == len(" blocks")


def test_the_smallest_vocabulary_is_bytes_and_marks(source):
    assert len(trained(source, vocab_size=BYTES + 2)) == BYTES + 2


@pytest.mark.parametrize(
    "settings",
    [
        {"vocab_size": BYTES + 1},
        {"bos": 1, "eos": 2},
        {"bos": 0, "eos": 0},
        {"bos": None, "eos": 1},
        {"bos": 128000, "eos": [128001, 128009]},
    ],
    ids=str,
)
def test_a_config_it_cannot_fit_is_refused(source, settings):
    with pytest.raises(UserError) as caught:
        trained(source, **settings)
    message = str(caught.value)
    assert "\n" not in message
    for words in ("--model.tokenizer train", "vocab_size", "258", "bos_token_id", *map(str, settings.values())):
        assert words in message, message
