"""Token ids are transformers', in whatever pieces a text is encoded; marks of documents are marks, other names text."""

from __future__ import annotations

from functools import cache
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from tokenizers_of_kinds import KINDS, WORDS
from transformers import PreTrainedTokenizerFast

from llama_pro_fast.text import encoding
from llama_pro_fast.text.encoding import Encoder, EncoderSettings


@cache
def encoder_of(kind: str) -> tuple[PreTrainedTokenizerFast, EncoderSettings]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](), bos_token="<s>", eos_token="</s>")
    return tokenizer, EncoderSettings.of(tokenizer, "text")


@cache
def shared_encoder_of(kind: str) -> Encoder:
    return Encoder(encoder_of(kind)[1])


def expected(kind: str, text: str) -> list[int]:
    ids = encoder_of(kind)[0](text, split_special_tokens=True)["input_ids"]
    return ids and [*ids, 1]


def encoded(encoder: Encoder, text: str) -> list[int]:
    ((ids, _),) = encoder.encode([text])
    return list(ids)


RUNS = st.builds(lambda char, count: char * count, st.sampled_from("a0 \n\t!é医🦙\u0301."), st.integers(1, 120))
STRETCHES = st.builds(
    lambda begin, length: (WORDS * 2)[begin : begin + length], st.integers(0, len(WORDS)), st.integers(1, 120)
)
TEXTS = st.lists(st.one_of(RUNS, STRETCHES, st.text(max_size=20)), min_size=1, max_size=12).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(text=TEXTS, piece=st.integers(20, 200), overlap=st.integers(1, 60), agreeing=st.integers(2, 8))
def test_the_tokens_of_overlapping_pieces_are_the_whole_texts(kind, text, piece, overlap, agreeing):
    tiny = {
        "LONG_CHARACTERS": piece,
        "PIECE_CHARACTERS": piece,
        "OVERLAP_CHARACTERS": overlap,
        "AGREEING_TOKENS": agreeing,
    }
    with mock.patch.multiple(encoding, **tiny):
        assert encoded(shared_encoder_of(kind), text) == expected(kind, text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=8), batch=st.integers(1, 400), measured=st.booleans())
def test_batches_give_each_text_its_own_tokens(kind, texts, batch, measured):
    encoder = Encoder(encoder_of(kind)[1])
    with mock.patch.object(encoder, "_batch_characters", batch):
        found = list(encoder.encode(texts, measured=measured))
    assert [list(ids) for ids, _ in found] == [expected(kind, text) for text in texts]


def test_a_long_text_is_never_encoded_as_a_whole(monkeypatch):
    """Its tokens would take some 150 bytes each."""
    for name, value in (("LONG", 2**14), ("PIECE", 2**14), ("OVERLAP", 2**10)):
        monkeypatch.setattr(encoding, f"{name}_CHARACTERS", value)
    for kind in ("byte_level", "byte_level_with_digits", "sentencepiece", "unigram"):
        encoder, lengths = Encoder(encoder_of(kind)[1]), []

        class Seen:
            def __init__(self, tokenizer):
                self.tokenizer = tokenizer

            def encode_batch(self, texts, **kwargs):
                lengths.extend(map(len, texts))  # noqa: B023
                return self.tokenizer.encode_batch(texts, **kwargs)

        encoder._tokenizer = Seen(encoder._tokenizer)
        for text in (WORDS * 600, "a" * 200_000 if kind != "unigram" else WORDS * 500):
            lengths.clear()
            done = []
            ((ids, _),) = encoder.encode([text], done=done.append)
            assert list(ids) == expected(kind, text)
            assert max(lengths) <= 2 * 2**14 < len(text)
            assert sum(lengths) < 3 * len(text)
            assert sum(done) == len(text)


# What is text, and what ends one


def test_names_of_control_tokens_in_a_text_are_text_unless_asked_for():
    tokenizer = marked_tokenizer()
    text = "a <|im_start|>user b"
    as_text, as_tokens = (Encoder(EncoderSettings.of(tokenizer, how)) for how in ("text", "tokens"))
    mark = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert mark not in encoded(as_text, text)
    assert encoded(as_tokens, text).count(mark) == 1
    assert encoded(as_text, text)[:-1] == tokenizer(text, split_special_tokens=True)["input_ids"]
    assert encoded(as_tokens, text)[:-1] == tokenizer(text)["input_ids"]
    tokenizer.split_special_tokens = True
    assert mark not in encoded(Encoder(EncoderSettings.of(tokenizer, "tokens")), text)


@pytest.mark.parametrize("how", ["text", "tokens"])
@pytest.mark.parametrize(
    ("row", "found"),
    [
        ("one", [("one", 0)]),
        ("one</s>two", [("one", 0), ("two", 7)]),
        ("one</s>\n", [("one", 0)]),
        ("</s></s>one</s> \n</s>two\n</s>", [("one", 8), ("two\n", 21)]),
        ("<s>one", [("one", 3)]),
        ("<s><s>one</s>\n<s>two", [("one", 6), ("\n<s>two", 13)]),
        ("one <s> two", [("one <s> two", 0)]),
        ("</s>", []),
        ("<s>", []),
        (" \n\u00a0", []),
        ("", []),
    ],
)
def test_the_name_of_the_eos_ends_a_document_and_there_is_no_second_bos(how, row, found):
    encoder = Encoder(EncoderSettings.of(marked_tokenizer(adds_bos=True), how))
    assert encoder.documents(row) == found
    for document, begin in found:
        assert row[begin : begin + len(document)] == document
        ids = encoded(encoder, document)
        assert (ids[0], ids[-1], ids.count(1)) == (0, 1, 1)
        assert how == "tokens" or ids.count(0) == 1


def test_a_bos_that_the_tokenizer_does_not_add_is_text():
    encoder = Encoder(EncoderSettings.of(marked_tokenizer(), "text"))
    assert encoder.documents("<s>one") == [("<s>one", 0)]


def test_a_tokenizer_without_eos_ends_nothing():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS["byte_level"]())
    encoder = Encoder(EncoderSettings.of(tokenizer, "text"))
    assert encoder.documents("one</s>two") == [("one</s>two", 0)]
    assert encoded(encoder, "one") == tokenizer("one")["input_ids"]


def test_an_eos_that_the_tokenizer_adds_stands_once(monkeypatch):
    tokenizer = marked_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    encoder = Encoder(EncoderSettings.of(tokenizer, "text"))
    short, long = encoded(encoder, "one two"), encoded(encoder, WORDS)
    monkeypatch.setattr(encoding, "LONG_CHARACTERS", 100)
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 100)
    assert encoded(encoder, WORDS) == long
    for ids in (short, long):
        assert (ids[0], ids[-1], ids.count(0), ids.count(1)) == (0, 1, 1, 1)


@pytest.mark.parametrize("pieces", [False, True])
def test_bytes_are_counted_after_the_first_token(monkeypatch, pieces):
    if pieces:
        monkeypatch.setattr(encoding, "LONG_CHARACTERS", 30)
        monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 30)
    text = WORDS[:200]
    for kind in ("byte_level", "byte_level_with_digits"):
        tokenizer, encoder = encoder_of(kind)[0], Encoder(encoder_of(kind)[1])
        ((ids, num_bytes),) = encoder.encode([text], measured=True)
        first = tokenizer.decode(ids[:1], skip_special_tokens=True)
        assert first or kind == "byte_level_with_digits"  # which begins with its BOS
        assert num_bytes == len(text.encode()) - len(first.encode())
    # A kangaroo is unknown to the tokenizer, so its first token is one of four bytes.
    ((_, num_bytes),) = Encoder(encoder_of("byte_level")[1]).encode(["🦘 and more"], measured=True)
    assert num_bytes == len(" and more")


def test_what_a_call_left_in_the_tokenizer_does_not_matter():
    tokenizer = marked_tokenizer()
    before = EncoderSettings.of(tokenizer, "text")
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.backend_tokenizer.enable_truncation(2)
    assert EncoderSettings.of(tokenizer, "text") == before
    assert encoded(Encoder(before), "a long text to cut")[:-1] == tokenizer("a long text to cut")["input_ids"]


def marked_tokenizer(*, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    backend = KINDS["byte_level"]()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<|im_start|>"]
    )
