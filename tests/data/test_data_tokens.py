"""Tokens on disk: what is in a store, when it is made again, and that a half-made one is never taken for whole."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import multiprocessing
import os
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llama_pro_fast.config import DataConfig, Source
from llama_pro_fast.data import tokens
from llama_pro_fast.data.corpus import Corpus
from llama_pro_fast.data.documents import is_held_out
from llama_pro_fast.data.sources import resolve_sources
from llama_pro_fast.data.tokens import TokenStore, tokenize_source
from llama_pro_fast.errors import UserError

TEXTS = [f"Document {i}: {'ünïcode 🦙 ' * (i % 7)}and its end.\n" for i in range(60)]


def make_tokenizer(vocabulary: int = 320, **special) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(eos_token="</s>", model_max_length=4)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "rows.jsonl", TEXTS)


def write_source(path: Path, texts, **kwargs):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return resolve_sources(DataConfig(domain=[Source(path=str(path), **kwargs)]))[0]


def documents(split) -> list[list[int]]:
    return [split.tokens[a:b].tolist() for a, b in zip(split.offsets[:-1], split.offsets[1:], strict=True)]


class Calls:
    """Counts how often tokens are made: a cache hit makes none."""

    def __init__(self, monkeypatch):
        self.count = 0
        real = tokens._write

        def counted(*args):
            self.count += 1
            return real(*args)

        monkeypatch.setattr(tokens, "_write", counted)


@pytest.fixture
def writes(monkeypatch) -> Calls:
    return Calls(monkeypatch)


# What is in a store


def test_a_store_holds_every_document_once_on_its_side(source, tokenizer, cache):
    store = tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache)
    for split, kept_out in ((store.train, False), (store.held_out, True)):
        texts = [text for text in TEXTS if is_held_out(text, 0.2) == kept_out]
        assert texts
        assert documents(split) == [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
        assert split.num_documents == len(texts)
        assert split.num_tokens == sum(map(len, documents(split)))
        firsts = [tokenizer.decode(tokenizer(text)["input_ids"][:1]) for text in texts]
        expected = [len(text.encode()) - len(first.encode()) for text, first in zip(texts, firsts, strict=True)]
        assert split.num_bytes.tolist() == expected
        assert isinstance(split.tokens, np.memmap)
        assert (split.tokens.dtype, split.offsets.dtype, split.num_bytes.dtype) == (np.uint16, np.int64, np.int64)


def test_batches_and_progress_do_not_change_the_tokens(source, tokenizer, cache, monkeypatch):
    whole = tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache)
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 300)
    seen = []
    progress = lambda *counts: seen.append(counts)  # noqa: E731
    pieces = tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache.with_name("other"), progress=progress)
    assert documents(pieces.train) == documents(whole.train)
    assert seen == sorted(seen)
    assert len(seen) > 5
    assert seen[-1] == (60, whole.train.num_tokens + whole.held_out.num_tokens)


def test_documents_without_text_are_skipped_and_counted(tmp_path, tokenizer, cache):
    source = write_source(tmp_path / "a.jsonl", [*TEXTS, "", None, " \n\t", "\u00a0"])
    store = tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache)
    assert store.num_skipped == 4
    assert store.train.num_documents + store.held_out.num_documents == len(TEXTS)


def test_special_tokens_are_the_tokenizers_and_the_eos_stands_once(source, cache):
    both = make_tokenizer(bos_token="<s>", eos_token="</s>")
    both.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    none = make_tokenizer()
    for document in documents(tokenize_source(source, both, held_out=0.2, cache_dir=cache).train):
        assert (document[0], document[-1]) == (0, 1)
        assert 1 not in document[:-1]
    assert all(1 not in d for d in documents(tokenize_source(source, none, held_out=0.2, cache_dir=cache).train))


def test_a_large_vocabulary_takes_four_bytes(source, cache):
    tokenizer = make_tokenizer(eos_token="</s>")
    tokenizer.add_tokens([f"<extra {i}>" for i in range(2**16)])
    store = tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache)
    assert store.train.tokens.dtype == np.uint32


def test_the_largest_id_decides_the_width_and_not_how_many_there_are(source, cache):
    words = dict.fromkeys(" ".join(TEXTS).split())
    vocabulary = {word: 70_000 + id for id, word in enumerate(words)} | {"<unk>": 0}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert len(tokenizer) < 2**16
    store = tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache)
    assert store.train.tokens.dtype == np.uint32
    assert store.train.tokens.max() >= 70_000


def test_a_first_token_inside_a_character_counts_as_that_character(tmp_path, tokenizer, cache):
    text = "🦘 and more"  # a character unknown to the tokenizer, so its first token is one of four bytes
    assert "\ufffd" in tokenizer.decode(tokenizer(text)["input_ids"][:1])
    source = write_source(tmp_path / "a.jsonl", [text], weight=0.0)
    store = tokenize_source(source, tokenizer, held_out=1 - 1e-12, cache_dir=cache)
    assert store.held_out.num_bytes.tolist() == [len(" and more")]


def test_long_documents_give_no_warning(source, tokenizer, cache, caplog, capfd):
    tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_the_built_in_prose_becomes_a_store(tokenizer, cache):
    source = resolve_sources(DataConfig(domain="stdlib:prose", general="stdlib:code"))[0]
    source = dataclasses.replace(source, files=tuple(f for f in source.files if f[0].startswith(("json", "string"))))
    store = tokenize_source(source, tokenizer, held_out=0.02, cache_dir=cache)
    held_out = tokenizer.decode(store.held_out.tokens)
    assert "JSON" in held_out
    assert "string constants" in tokenizer.decode(store.train.tokens)


# When it is made again


def test_a_cache_hit_does_not_tokenise_again(source, tokenizer, cache, writes):
    first = tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache)
    again = tokenize_source(
        source, tokenizer, held_out=0.2, cache_dir=str(cache), progress=lambda *_: pytest.fail("made again")
    )
    assert writes.count == 1
    assert first.key == again.key
    assert documents(first.train) == documents(again.train)


def test_name_weight_and_place_do_not_matter(tmp_path, source, tokenizer, cache, writes):
    tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache)
    (tmp_path / "moved").mkdir()
    moved = write_source(tmp_path / "moved" / "rows.jsonl", TEXTS, name="other", weight=0.5)
    tokenize_source(moved, make_tokenizer(eos_token="</s>"), held_out=0.2, cache_dir=cache)
    assert writes.count == 1


def test_what_a_call_leaves_in_the_tokenizer_does_not_matter(source, cache, writes):
    tokenizer = make_tokenizer(eos_token="</s>")
    tokenizer(["a long text to cut"], truncation=True, max_length=2)
    cut = tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache)
    assert cut.train.offsets[1] > 3
    tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache)
    assert writes.count == 1


@pytest.mark.parametrize("changed", ["content", "file name", "text", "split", "tokenizer", "eos", "held_out"])
def test_any_change_of_what_the_tokens_depend_on_makes_another_store(
    tmp_path, source, tokenizer, cache, writes, changed
):
    first = tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache)
    held_out = 0.2
    if changed == "content":
        source = write_source(tmp_path / "rows.jsonl", [*TEXTS[:-1], TEXTS[-1].upper()])
    elif changed == "file name":
        source = write_source(tmp_path / "other.jsonl", TEXTS)
    elif changed in ("text", "split"):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t, "body": t}) + "\n" for t in TEXTS))
        first = tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache)
        source = dataclasses.replace(source, **{changed: "body"})
    elif changed == "tokenizer":
        tokenizer = make_tokenizer(300, eos_token="</s>")
    elif changed == "eos":
        tokenizer = make_tokenizer(eos_token="<s>")
    else:
        held_out = 0.3
    count = writes.count
    assert tokenize_source(source, tokenizer, held_out=held_out, cache_dir=cache).key != first.key
    assert writes.count == count + 1


def test_the_default_cache_follows_xdg(source, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    store = tokenize_source(source, tokenizer, held_out=0.2)
    assert (tmp_path / "xdg" / "llama-pro-fast" / store.key / "meta.json").exists()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tokens.default_cache() == tmp_path / ".cache" / "llama-pro-fast"


# A half-made store


class CutShort(Exception):
    pass


@pytest.mark.parametrize("error", [CutShort(), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_run_leaves_nothing_that_looks_complete(source, tokenizer, cache, monkeypatch, error):
    append, calls = tokens._SplitWriter.append, []

    def failing(self, *args):
        calls.append(args)
        if len(calls) == 40:
            raise error
        append(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(tokens._SplitWriter, "append", failing)
        expected = UserError if isinstance(error, OSError) else type(error)
        with pytest.raises(expected) as caught:
            tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache)
    if isinstance(error, OSError):
        message = str(caught.value)
        assert "\n" not in message
        assert all(word in message for word in (str(cache), "No space left", "--data.cache")), message
    assert not [path for path in cache.iterdir() if path.is_dir()]
    assert tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache).train.num_documents


def _killed_while_writing(source, cache):
    append, calls = tokens._SplitWriter.append, []

    def killed(self, *args):
        calls.append(args)
        append(self, *args)
        if len(calls) == 40:
            os.kill(os.getpid(), 9)

    tokens._SplitWriter.append = killed
    tokenize_source(source, make_tokenizer(eos_token="</s>"), held_out=0.2, cache_dir=cache)


def test_what_a_killed_process_leaves_is_cleaned_by_the_next_run(tmp_path, source, tokenizer, cache):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # quiet about the fork
    child = multiprocessing.get_context("fork").Process(target=_killed_while_writing, args=(source, cache))
    child.start()
    child.join()
    assert child.exitcode == -9
    (left,) = [path for path in cache.iterdir() if path.is_dir()]
    assert TokenStore.open(left) is None
    other = write_source(tmp_path / "other.jsonl", TEXTS)
    store = tokenize_source(other, tokenizer, held_out=0.2, cache_dir=cache)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [store.key]


def test_partial_folders_of_others_are_left_alone(source, tokenizer, cache):
    ours, others = "0123456789abcdef" * 2, ["model.partial", "0123.partial", "0123456789ABCDEF" * 2 + ".partial"]
    for name in [f"{ours}.partial", *others]:
        (cache / name).mkdir(parents=True)
    tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache)
    assert sorted(path.name for path in cache.glob("*.partial")) == sorted(others)


def _tokenize_slowly(source, cache, keys):
    real = tokens._write

    def slow(*args):
        time.sleep(0.3)
        real(*args)

    tokens._write = slow
    keys.put(tokenize_source(source, make_tokenizer(eos_token="</s>"), held_out=0.2, cache_dir=cache).key)


def test_two_processes_at_once_are_harmless(source, cache):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("fork")
    keys = context.Queue()
    children = [context.Process(target=_tokenize_slowly, args=(source, cache, keys)) for _ in range(2)]
    for child in children:
        child.start()
    found = {keys.get(timeout=60) for _ in children}
    for child in children:
        child.join()
    assert found == {path.name for path in cache.iterdir() if path.is_dir()}


def cut_short(content: bytes) -> bytes:
    return content[: len(content) // 2]


def a_bit_flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def zeroed(content: bytes) -> bytes:
    return bytes(len(content))


FILES = [f"{side}.{kind}" for side in ("train", "held_out") for kind in ("bin", "offsets.npy", "bytes.npy")]


@pytest.mark.parametrize(
    ("file", "damaged"),
    [
        *((file, a_bit_flipped) for file in [*FILES, "meta.json"]),
        *(
            (file, damaged)
            for file in ("train.bin", "train.offsets.npy", "meta.json")
            for damaged in (cut_short, zeroed)
        ),
    ],
)
def test_a_damaged_store_is_made_again_with_a_word(source, tokenizer, cache, writes, capfd, file, damaged):
    store = tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache)
    expected, path = documents(store.train), cache / store.key / file
    path.write_bytes(damaged(path.read_bytes()))
    assert TokenStore.open(cache / store.key) is None
    assert documents(tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache).train) == expected
    assert writes.count == 2
    assert "damaged; they are made again" in " ".join(capfd.readouterr().out.split())
    tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache)
    assert writes.count == 2


@pytest.mark.parametrize("meta", [b"[]", b"7", b'"digest"', b"{}", b"[" * 100_000, b"\xff", b'{"digest": null}'])
def test_a_store_that_says_anything_of_itself_is_none(source, tokenizer, cache, meta):
    store = tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache)
    (cache / store.key / "meta.json").write_bytes(meta)
    assert TokenStore.open(cache / store.key) is None


def test_a_store_under_the_key_of_another_is_none(source, tokenizer, cache):
    store = tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache)
    (cache / store.key).rename(cache / ("0" * 32))
    assert TokenStore.open(cache / ("0" * 32)) is None


def test_a_store_is_not_read_again_for_its_digests(source, tokenizer, cache, monkeypatch):
    store = tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache)
    for path in (cache / store.key).iterdir():
        os.utime(path, (0, 0))  # long ago: younger files are looked at each time
    assert TokenStore.open(cache / store.key) is not None
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert TokenStore.open(cache / store.key) is not None


# Errors


def message_of(source, tokenizer, cache, held_out=0.2) -> str:
    with pytest.raises(UserError) as caught:
        tokenize_source(source, tokenizer, held_out=held_out, cache_dir=cache)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("place", "cause"),
    [
        ("file/cache", "Not a directory; something is in the way"),
        ("x" * 300, "File name too long; give a shorter name"),
        ("/proc/cache", "a folder is gone, or none can be made there"),
    ],
)
def test_a_cache_that_cannot_be_made_is_named_with_the_cause(source, tokenizer, tmp_path, place, cause):
    (tmp_path / "file").write_text("")
    message = message_of(source, tokenizer, tmp_path / place)
    assert all(word in message for word in (str(tmp_path / place), cause, "--data.cache")), message


def test_a_source_without_text(tmp_path, tokenizer, cache):
    message = message_of(write_source(tmp_path / "a.jsonl", ["", None]), tokenizer, cache)
    assert all(word in message for word in ("a.jsonl", "no document with text", "2 empty")), message
    (tmp_path / "b.txt").write_text("")
    source = resolve_sources(DataConfig(domain=str(tmp_path / "b.txt")))[0]
    assert "b.txt: no document with text" in message_of(source, tokenizer, cache)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_side_of_the_split_that_is_empty(tmp_path, tokenizer, cache):
    trains = [text for text in TEXTS if not is_held_out(text, 0.2)][:3]
    message = message_of(write_source(tmp_path / "a.jsonl", trains), tokenizer, cache)
    assert all(word in message for word in ("a.jsonl", "3 documents", "none of them held out", "raise --data.held_out"))

    kept_out = [text for text in TEXTS if is_held_out(text, 0.2)][:2]
    message = message_of(write_source(tmp_path / "b.jsonl", kept_out), tokenizer, cache)
    assert all(word in message for word in ("b.jsonl", "2 documents", "all of them held out", "lower --data.held_out"))
    measured = write_source(tmp_path / "b.jsonl", kept_out, weight=0.0)
    assert tokenize_source(measured, tokenizer, held_out=0.2, cache_dir=cache).train.num_tokens == 0


@pytest.mark.parametrize("is_kept_out", [False, True])
def test_one_document_cannot_be_split(tmp_path, tokenizer, cache, is_kept_out):
    (text, *_) = [text for text in TEXTS if is_held_out(text, 0.2) == is_kept_out]
    (tmp_path / "one.txt").write_text(text)
    source = resolve_sources(DataConfig(domain=str(tmp_path / "one.txt")))[0]
    message = message_of(source, tokenizer, cache)
    assert all(word in message for word in ("one.txt", "one document", "cannot be split", "more text or more files"))


@pytest.mark.parametrize("held_out", [0.0, 1.0, float("nan")])
def test_a_share_out_of_range(source, tokenizer, cache, held_out):
    assert "data.held_out" in message_of(source, tokenizer, cache, held_out)


def test_a_file_that_went_away(source, tokenizer, cache, tmp_path):
    (tmp_path / "rows.jsonl").unlink()
    assert "rows.jsonl" in message_of(source, tokenizer, cache)


def test_a_slow_tokenizer(source, cache):
    class Slow:
        is_fast = False

    assert "tokenizer.json" in message_of(source, Slow(), cache)


def test_training_documents_are_named_by_source_number_and_beginning(tmp_path, tokenizer):
    """So that a person finds the text of a bad step."""
    texts = {
        "law": ["  first\n\tline\x1b[31m\u202e " + "word " * 40, "short", "医" * 80],
        "web": [f"w{n}" for n in range(9)],
    }
    sources = []
    for name, rows in texts.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows * 8))
        sources.append(Source(path=str(tmp_path / f"{name}.jsonl"), weight=2.0 if name == "law" else 0.5, name=name))
    config = DataConfig(domain=sources, held_out=0.2, cache=str(tmp_path / "cache"))
    corpus = Corpus.prepare(config, tokenizer, seq_len=64, seed=0, default_general=False)
    count = corpus.train.sequences_in_epoch(0)
    found = corpus.documents([(0, count)], tokenizer, limit=10**6)
    known = set()
    for name in texts:
        train = next(text for text in corpus.held_out if text.source.name == name).store.train
        for number, (begin, end) in enumerate(pairwise(train.offsets.tolist()), start=1):
            text = " ".join("".join(c if c.isprintable() else " " for c in tokenizer.decode(
                train.tokens[begin:end], skip_special_tokens=True)).split())  # fmt: skip
            more = "…" if len(text) > 60 else ""
            known.add(f'{name}, document {number}: "{text[:60].rstrip()}{more}"')
    assert set(found) <= known
    assert len(found) == len(set(found)) > 10
    assert any(text.startswith("law") and '"first line [31m word' in text for text in found)
    assert any("医" * 60 + "…" in text for text in found)
    assert corpus.documents([(0, count)], tokenizer, limit=3) == [*found[:3], f"and {len(found) - 3} more"]
    assert corpus.documents([(0, count)], tokenizer, limit=len(found)) == found
