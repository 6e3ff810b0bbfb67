"""A source becomes tokens: what is in the store, what is made again, what is refused, and that kills change nothing."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import fsspec
import numpy as np
import preparing_in_a_process
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparing_in_a_process import a_tokenizer, all_gone, prepared_by_workers, processes_with
from reading import resolved, write
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llama_pro_fast.errors import UserError
from llama_pro_fast.text import encoding, pool, preparing, shards, tokenizing, units
from llama_pro_fast.text.documents import is_held_out
from llama_pro_fast.text.preparing import tokenize_source
from llama_pro_fast.text.store import TokenStore, default_cache

TEXTS = [f"Document {i}: {'ünïcode 🦙 ' * (i % 7)}and its end.\n" for i in range(60)]
OLD = (10**9, 10**9)
"""Times of a file that is not just being written."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return a_tokenizer(model_max_length=4)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def rows(tmp_path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", TEXTS)


def write_rows(path: Path, texts, **columns) -> Path:
    write(path, [{"text": text} | columns for text in texts])
    os.utime(path, OLD)
    return path


def prepared(path, tokenizer, cache, **settings) -> TokenStore:
    return tokenize_source(resolved(path), tokenizer, **{"held_out": 0.2, "cache_dir": cache} | settings)


def documents(store: TokenStore, side: str = "train") -> list[list[int]]:
    side = getattr(store, side)
    return [store.tokens(side.begins[i : i + 1], side.lengths[i : i + 1]).tolist() for i in range(side.num_documents)]


def texts_of(store: TokenStore, tokenizer) -> list[str]:
    """All documents in the order of the source."""
    found = {}
    for side in ("train", "held_out"):
        for number, ids in zip(getattr(store, side).numbers.tolist(), documents(store, side), strict=True):
            found[store.place(number), number] = tokenizer.decode(ids, skip_special_tokens=True)
    return [found[key] for key in sorted(found)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Made:
    """The shards that are written, one after the other."""

    def __init__(self, monkeypatch):
        self.keys: list[str] = []
        real = shards.ShardWriter.__init__

        def counted(writer, folder, *args):
            self.keys.append(folder.stem)
            real(writer, folder, *args)

        monkeypatch.setattr(shards.ShardWriter, "__init__", counted)


@pytest.fixture
def made(monkeypatch) -> Made:
    return Made(monkeypatch)


# What is in a store


def test_every_document_stands_once_on_its_side(rows, tokenizer, cache):
    store = prepared(rows, tokenizer, cache)
    for side, kept_out in (("train", False), ("held_out", True)):
        texts = [text for text in TEXTS if is_held_out(text, 0.2) == kept_out]
        assert texts
        assert documents(store, side) == [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
        places = [store.place(number) for number in getattr(store, side).numbers.tolist()]
        assert places == [("rows.jsonl", TEXTS.index(text) + 1) for text in texts]
    firsts = [tokenizer.decode(tokenizer(text)["input_ids"][:1]) for text in texts]
    expected = [len(text.encode()) - len(first.encode()) for text, first in zip(texts, firsts, strict=True)]
    assert store.held_out.num_bytes.tolist() == expected
    assert len(set(store.digests.tolist())) == len(TEXTS)


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "jsonl.gz"])
def test_units_shards_and_workers_do_not_change_the_documents(tmp_path, rows, tokenizer, cache, ending, monkeypatch):
    whole = prepared(rows, tokenizer, cache / "whole")
    path = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=7)
    elif ending == "jsonl.gz":
        path.write_bytes(gzip.compress(rows.read_bytes()))
    monkeypatch.setattr(units, "UNIT_BYTES", 1000)
    monkeypatch.setattr(tokenizing, "SHARD_BYTES", 500)
    monkeypatch.setattr(tokenizing, "ENDING_BYTES", 100)
    pieces = prepared(path, tokenizer, cache / "pieces")
    assert len([*(cache / "pieces" / "shards").iterdir()]) > 3
    assert documents(pieces) == documents(whole)
    assert documents(pieces, "held_out") == documents(whole, "held_out")
    assert pieces.held_out.num_bytes.tolist() == whole.held_out.num_bytes.tolist()
    places = [[store.place(number)[1] for number in range(len(TEXTS))] for store in (whole, pieces)]
    assert sorted(places[0]) == sorted(places[1]) == [*range(1, len(TEXTS) + 1)]
    for number, place in enumerate(places[1]):
        assert pieces.digests[number] == whole.digests[places[0].index(place)]


def test_workers_make_what_one_process_makes(rows, cache):
    alone = tokenize_source(resolved(rows), a_tokenizer(), held_out=0.2, cache_dir=cache / "alone")
    seen = []
    store = prepared_by_workers(rows, cache / "workers", unit_bytes=1500, progress=lambda *counts: seen.append(counts))
    assert documents(store) == documents(alone)
    assert documents(store, "held_out") == documents(alone, "held_out")
    tokens = store.train.num_tokens + store.held_out.num_tokens
    size = rows.stat().st_size
    assert seen[-1] == (size, size, sum(len(text.encode()) for text in TEXTS), 60, tokens)
    assert seen == sorted(seen)


def test_progress_is_told_while_little_is_done(rows, tokenizer, cache, monkeypatch):
    monkeypatch.setattr(preparing, "TELL_SECONDS", 0)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 300)
    seen = []
    store = prepared(rows, tokenizer, cache, progress=lambda *counts: seen.append(counts))
    assert seen == sorted(seen)
    assert len(seen) > 5
    assert seen[-1][3:] == (60, store.train.num_tokens + store.held_out.num_tokens)
    assert seen[-1][0] == seen[-1][1] == rows.stat().st_size


def test_documents_without_text_are_counted_and_left_out(tmp_path, tokenizer, cache):
    path = write_rows(tmp_path / "a.jsonl", [*TEXTS, "", None, " \n\t", "\u00a0"])
    store = prepared(path, tokenizer, cache)
    assert (store.num_empty, store.rows.first_empty) == (4, ("a.jsonl", 61))
    assert (store.rows.rows, store.rows.faults) == (64, [])
    assert store.train.num_documents + store.held_out.num_documents == len(TEXTS)


def test_documents_that_a_tokenizer_makes_nothing_of_are_counted_and_left_out(tmp_path, cache):
    path = write_rows(tmp_path / "a.jsonl", ["ab" * i for i in range(1, 31)] + ["医院"] * 2)
    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    store = prepared(path, PreTrainedTokenizerFast(tokenizer_object=backend), cache)
    assert store.num_empty == 2
    assert store.train.num_documents + store.held_out.num_documents == 30


def test_the_largest_id_decides_the_width_and_not_how_many_there_are(rows, cache):
    words = dict.fromkeys(" ".join(TEXTS).split())
    vocabulary = {word: 70_000 + id for id, word in enumerate(words)} | {"<unk>": 0}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert len(tokenizer) < 2**16
    assert max(map(max, documents(prepared(rows, tokenizer, cache)))) >= 70_000


def test_the_eos_in_a_text_file_ends_a_document(tmp_path, cache):
    """TinyStories, dumps of OpenWebText: one file, its stories divided by a line."""
    stories = [f"Story {i} begins.\nIt goes on, and on, for {i} days.\n" for i in range(50)]
    (tmp_path / "stories.txt").write_text("</s>\n".join(stories))
    tokenizer = a_tokenizer()
    store = prepared(tmp_path / "stories.txt", tokenizer, cache)
    assert [text.strip() for text in texts_of(store, tokenizer)] == [story.strip() for story in stories]
    for side in ("train", "held_out"):
        for ids in documents(store, side):
            assert ids.count(tokenizer.eos_token_id) == 1
            assert ids[-1] == tokenizer.eos_token_id
    lines = sorted(store.place(number)[1] for number in range(50))
    assert lines == [1, *(2 + 2 * i + i - 1 for i in range(1, 50))]
    assert store.held_out.num_documents == sum(
        is_held_out(("\n" if i else "") + story, 0.2) for i, story in enumerate(stories)
    )


def test_the_eos_in_a_row_ends_a_document_of_the_rows_line_and_side(tmp_path, cache):
    texts = [f"one {i}</s>two {i}" for i in range(40)]
    tokenizer = a_tokenizer()
    store = prepared(write_rows(tmp_path / "a.jsonl", texts), tokenizer, cache)
    assert sorted(texts_of(store, tokenizer)) == sorted(part for text in texts for part in text.split("</s>"))
    assert sorted(store.place(number)[1] for number in range(80)) == [line for line in range(1, 41) for _ in "ab"]
    path = write(tmp_path / "b.jsonl", [{"text": text, "book": i} for i, text in enumerate(texts)])
    store = tokenize_source(resolved(path, split_by="book"), tokenizer, held_out=0.2, cache_dir=cache)
    held_out = {store.place(number)[1] - 1 for number in store.held_out.numbers.tolist()}
    assert held_out == {i for i in range(40) if is_held_out(str(i), 0.2)}
    assert store.held_out.num_documents == 2 * len(held_out)


def test_a_rendered_chat_gets_no_second_bos_and_no_second_eos(tmp_path, cache):
    tokenizer = a_tokenizer("byte_level_with_digits")  # it adds a BOS
    path = write_rows(tmp_path / "a.jsonl", [f"<s>user: {i}?\nassistant: {i}.</s>\n" for i in range(40)])
    for ids in documents(prepared(path, tokenizer, cache)):
        assert (ids[0], ids.count(0), ids[-1], ids.count(1)) == (0, 1, 1, 1)


def test_special_tokens_are_the_tokenizers_and_the_eos_stands_once(rows, cache):
    both = a_tokenizer()
    both.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    for ids in documents(prepared(rows, both, cache)):
        assert (ids[0], ids[-1], ids.count(1)) == (0, 1, 1)
    none = a_tokenizer(eos_token=None)
    assert all(1 not in ids for ids in documents(prepared(rows, none, cache)))


def test_names_of_control_tokens_are_text_or_tokens_as_asked(tmp_path, cache):
    tokenizer = a_tokenizer(additional_special_tokens=["<|im_start|>"])
    mark = tokenizer.convert_tokens_to_ids("<|im_start|>")
    path = write_rows(tmp_path / "a.jsonl", [f"a{i} <|im_start|>user" for i in range(40)])
    assert not any(mark in ids for ids in documents(prepared(path, tokenizer, cache)))
    assert all(mark in ids for ids in documents(prepared(path, tokenizer, cache, special_tokens="tokens")))


def test_the_built_in_prose_becomes_a_store(tokenizer, cache):
    source = resolved("stdlib:prose")
    source = dataclasses.replace(source, files=tuple(f for f in source.files if f.name.startswith(("json", "string"))))
    store = tokenize_source(source, tokenizer, held_out=0.02, cache_dir=cache)
    assert any("JSON" in tokenizer.decode(ids) for ids in documents(store, "held_out"))
    assert any("string constants" in tokenizer.decode(ids) for ids in documents(store))


def test_an_address_becomes_a_store(cache, tokenizer):
    fsspec.filesystem("memory").pipe("/a/rows.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode())
    source = resolved("memory://a/rows.jsonl")
    store = tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache, workers=4)
    assert texts_of(store, tokenizer) == TEXTS


def test_tokenizing_is_quiet(rows, tokenizer, cache, caplog, capfd):
    prepared(rows, tokenizer, cache)
    prepared_by_workers(rows, cache / "other", unit_bytes=1500)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


# When it is made again


def test_a_cache_hit_neither_reads_nor_tokenises(rows, tokenizer, cache, made, monkeypatch):
    first = prepared(rows, tokenizer, cache)
    assert len(made.keys) == 1
    monkeypatch.setattr(tokenizing, "read_unit", lambda _: pytest.fail("read again"))
    again = prepared(rows, tokenizer, str(cache), progress=lambda *_: pytest.fail("made again"))
    assert len(made.keys) == 1
    assert first.key == again.key
    assert documents(first) == documents(again)


def test_place_name_and_settings_of_the_mixture_do_not_matter(tmp_path, rows, tokenizer, cache, made):
    first = prepared(rows, tokenizer, cache)
    (tmp_path / "moved").mkdir()
    moved = resolved(rows.rename(tmp_path / "moved" / "other.jsonl"), name="other", weight=0.5)
    store = tokenize_source(moved, a_tokenizer(), held_out=0.2, cache_dir=cache)
    assert len(made.keys) == 1
    assert store.key == first.key
    assert store.place(0)[0] == "other.jsonl"


def test_a_file_that_is_being_written_is_read_again(rows, tokenizer, cache):
    """Two writes in one tick of a file system's clock leave the same time."""
    now = time.time_ns()
    os.utime(rows, ns=(now, now))
    first = prepared(rows, tokenizer, cache)
    rows.write_text(rows.read_text().replace("Document 7:", "Document 8:"))
    os.utime(rows, ns=(now, now))
    assert prepared(rows, tokenizer, cache).key != first.key


@pytest.mark.parametrize("change", ["one file more", "a bad last row", "an edited row", "one file less"])
def test_only_what_is_new_is_tokenised(tmp_path, tokenizer, cache, made, monkeypatch, change):
    monkeypatch.setattr(units, "UNIT_BYTES", 4000)
    monkeypatch.setattr(units, "FILE_COST", 100)
    monkeypatch.setattr(tokenizing, "SHARD_BYTES", 1500)
    monkeypatch.setattr(tokenizing, "ENDING_BYTES", 200)
    folder = tmp_path / "crawl"
    for part in range(30):
        texts = [f"part {part} {text}" for text in TEXTS]
        path = folder / f"part-{part:02}.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_rows(path, texts[: 3 + part])
    prepared(folder, tokenizer, cache)
    before = len(made.keys)
    path = folder / "part-12.jsonl"
    if change == "one file more":
        write_rows(folder / "part-12b.jsonl", ["more"])
    elif change == "one file less":
        path.unlink()
    elif change == "a bad last row":
        path.write_text(path.read_text() + '{"text": "half a r')
    else:
        path.write_text(path.read_text().replace("Document 3:", "Document three:"))
    store = prepared(folder, tokenizer, cache, max_bad_share=1.0)
    again = len(made.keys) - before
    assert again <= 2 < before // 5
    assert again or change not in ("one file more", "an edited row")
    assert store.rows.faulty == (change == "a bad last row")
    alone = prepared(folder, tokenizer, tmp_path / "other cache", max_bad_share=1.0)
    assert (store.key, documents(store)) == (alone.key, documents(alone))


@pytest.mark.parametrize("changed", ["content", "text", "split_by", "tokenizer", "eos", "held_out", "special_tokens"])
def test_any_change_of_what_the_tokens_depend_on_makes_another_store(tmp_path, tokenizer, cache, made, changed):
    path = write(tmp_path / "rows.jsonl", [{"text": t, "body": t + "<s>", "book": i} for i, t in enumerate(TEXTS)])
    os.utime(path, OLD)
    settings, columns = {"held_out": 0.2, "special_tokens": "tokens"}, {}
    first = tokenize_source(resolved(path), tokenizer, cache_dir=cache, **settings)
    if changed == "content":
        write_rows(path, [*TEXTS[:-1], TEXTS[-1].upper()])
    elif changed in ("text", "split_by"):
        columns = {"text": "body"} if changed == "text" else {"split_by": "book"}
    elif changed == "tokenizer":
        tokenizer = a_tokenizer("sentencepiece")
    elif changed == "eos":
        tokenizer = a_tokenizer(eos_token="<s>")
    else:
        settings |= {"held_out": 0.3} if changed == "held_out" else {"special_tokens": "text"}
    second = tokenize_source(resolved(path, **columns), tokenizer, cache_dir=cache, **settings)
    assert second.key != first.key
    assert len(made.keys) == 2


def test_a_damaged_cache_is_found_and_made_again_with_a_word(rows, tokenizer, cache, made, capfd):
    expected = documents(prepared(rows, tokenizer, cache))
    (path,) = cache.glob("shards/*/tokens.bin")
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    assert documents(prepared(rows, tokenizer, cache)) == expected
    assert path.read_bytes() == whole
    assert len(made.keys) == 2
    said = " ".join(capfd.readouterr().out.split())
    assert "were damaged; they are made again" in said
    assert "rows" in said
    prepared(rows, tokenizer, cache)
    assert len(made.keys) == 2


@pytest.mark.parametrize("note", [b"", b"[]", b"\xff", b'{"digest": 1}', None])
def test_a_lost_or_damaged_note_costs_one_reading(rows, tokenizer, cache, made, note):
    store = prepared(rows, tokenizer, cache)
    (path,) = (cache / "units").iterdir()
    if note is None:
        path.unlink()
    else:
        path.write_bytes(note)
    assert prepared(rows, tokenizer, cache).key == store.key
    assert len(made.keys) == 1


def test_other_things_in_the_cache_are_left_alone(rows, tokenizer, cache):
    """An older version's stores, and a user's files."""
    old = cache / ("ab" * 16)
    old.mkdir(parents=True)
    (old / "train.bin").write_bytes(b"old")
    (cache / "model.partial").mkdir()
    prepared(rows, tokenizer, cache)
    assert (old / "train.bin").read_bytes() == b"old"
    assert (cache / "model.partial").exists()


def test_the_default_cache_follows_xdg(rows, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    tokenize_source(resolved(rows), tokenizer, held_out=0.2)
    assert [*(tmp_path / "xdg" / "llama-pro-fast" / "shards").iterdir()]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "llama-pro-fast"


# Mess


BAD = [
    ('{"text": "half a r', "not JSON"),
    ('{"text": 7}', "not text but number"),
    ('{"text": "\\ud83d"}', "half of a surrogate pair"),
    (b'{"text": "\xff\xfe"}', "not UTF-8"),
]


def crawl_with(path: Path, bad: list, good: int = 400) -> Path:
    lines = [json.dumps({"text": f"{TEXTS[i % 60]} {i}"}).encode() for i in range(good)]
    for i, line in enumerate(bad):
        lines.insert(10 + 20 * i, line if isinstance(line, bytes) else line.encode())
    path.write_bytes(b"\n".join(lines) + b"\n")
    os.utime(path, OLD)
    return path


def test_bad_rows_are_left_out_and_counted_with_file_and_line(tmp_path, tokenizer, cache, monkeypatch):
    path = crawl_with(tmp_path / "crawl.jsonl", [line for line, _ in BAD])
    expected = {reason: ("crawl.jsonl", 11 + 20 * i) for i, (_, reason) in enumerate(BAD)}
    monkeypatch.setattr(units, "UNIT_BYTES", 3000)  # so that most lines are counted from the middle of the file
    for _ in range(2):  # made, and from the cache
        store = prepared(path, tokenizer, cache)
        assert store.train.num_documents + store.held_out.num_documents == 400
        assert store.rows.rows == 404
        assert {fault.reason: fault.places[0][:2] for fault in store.faults} == expected
        assert [fault.count for fault in store.faults] == [1] * 4


def test_too_many_bad_rows_are_refused_with_reasons_places_and_remedy(tmp_path, tokenizer, cache, made):
    path = crawl_with(tmp_path / "crawl.jsonl", [BAD[0][0]] * 5 + [BAD[1][0]] * 2)
    message = message_of(path, tokenizer, cache)
    for words in ("crawl.jsonl: 7 of 407 rows", "1.72%", "1.00%", "not JSON (5: crawl.jsonl line 11", "line 31"):
        assert words in message, message
    assert "not text but number (2: " in message
    assert "--data.max_bad_share" in message
    assert prepared(path, tokenizer, cache, max_bad_share=0.02).rows.faulty == 7
    assert len(made.keys) == 1  # what was done stays


def test_a_truncated_archive_counts_by_its_bytes(tmp_path, tokenizer, cache):
    letters = random.Random(0)
    texts = ["".join(letters.choices("abcdefgh ", k=200)) for _ in range(2000)]
    whole = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    path = tmp_path / "crawl.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    # What is there of it is all that is known of its size, and all of it is read.
    store = prepared(path, tokenizer, cache)
    assert 0 < store.train.num_documents < 2000
    assert [fault.reason for fault in store.faults] == ["cut short"]


def test_a_file_that_went_away_is_a_fault_and_is_not_remembered(tmp_path, tokenizer, cache):
    for name in ("a", "b"):
        write_rows(tmp_path / f"data/{name}.jsonl", [f"{name} {text}" for text in TEXTS])
    source = resolved(tmp_path / "data")
    (tmp_path / "data/b.jsonl").rename(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match=r"bytes cannot be read, 5.*gone \(1: b.jsonl line 1"):
        tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache)
    (tmp_path / "b.jsonl").rename(tmp_path / "data/b.jsonl")
    assert tokenize_source(source, tokenizer, held_out=0.2, cache_dir=cache).rows.faulty == 0


# Refusals


def message_of(path, tokenizer, cache, **settings) -> str:
    with pytest.raises(UserError) as caught:
        prepared(path, tokenizer, cache, **settings)
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
def test_a_cache_that_cannot_be_made_is_named_with_the_cause(rows, tokenizer, tmp_path, place, cause):
    (tmp_path / "file").write_text("")
    message = message_of(rows, tokenizer, tmp_path / place)
    assert all(word in message for word in (str(tmp_path / place), cause, "--data.cache")), message


def test_a_full_disk_is_one_line_and_gets_its_room_back(rows, tokenizer, cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards._HashedFile, "write", full)
        message = message_of(rows, tokenizer, cache)
    assert all(word in message for word in (str(cache), "No space left", "--data.cache")), message
    assert not [*(cache / "shards").iterdir()]
    assert prepared(rows, tokenizer, cache).train.num_documents


def test_a_worker_that_cannot_write_is_one_line(rows, cache):
    (cache / "shards").mkdir(parents=True)
    (cache / "units").write_text("in the way")
    with pytest.raises(UserError, match=r"cache: the cache of tokens cannot be used: .*--data.cache") as caught:
        prepared_by_workers(rows, cache, unit_bytes=1500)
    assert "\n" not in str(caught.value)


def test_a_source_without_text(tmp_path, tokenizer, cache):
    message = message_of(write_rows(tmp_path / "a.jsonl", ["", None]), tokenizer, cache)
    assert all(word in message for word in ("a.jsonl", "no document with text", "2 empty")), message
    (tmp_path / "b.txt").write_text("")
    assert "b.txt: no document with text" in message_of(tmp_path / "b.txt", tokenizer, cache)


def test_a_side_of_the_split_that_is_empty(tmp_path, tokenizer, cache):
    trains = [text for text in TEXTS if not is_held_out(text, 0.2)][:3]
    message = message_of(write_rows(tmp_path / "a.jsonl", trains), tokenizer, cache)
    assert all(word in message for word in ("a.jsonl", "3 documents", "none of them held out", "raise --data.held_out"))
    kept_out = [text for text in TEXTS if is_held_out(text, 0.2)][:2]
    path = write_rows(tmp_path / "b.jsonl", kept_out)
    message = message_of(path, tokenizer, cache)
    assert all(word in message for word in ("b.jsonl", "2 documents", "all of them held out", "lower --data.held_out"))
    measured = tokenize_source(resolved(path, weight=0.0), tokenizer, held_out=0.2, cache_dir=cache)
    assert measured.train.num_tokens == 0
    with pytest.raises(UserError, match="all of them held out"):
        tokenize_source(resolved(path, share=0.5), tokenizer, held_out=0.2, cache_dir=cache)


@pytest.mark.parametrize("is_kept_out", [False, True])
def test_one_document_cannot_be_split(tmp_path, tokenizer, cache, is_kept_out):
    (text, *_) = [text for text in TEXTS if is_held_out(text, 0.2) == is_kept_out]
    (tmp_path / "one.txt").write_text(text)
    message = message_of(tmp_path / "one.txt", tokenizer, cache)
    assert all(word in message for word in ("one.txt", "one document", "cannot be split", "more text or more files"))


@pytest.mark.parametrize("held_out", [0.0, 1.0, float("nan")])
def test_a_share_out_of_range(rows, tokenizer, cache, held_out):
    assert "data.held_out" in message_of(rows, tokenizer, cache, held_out=held_out)


def test_a_slow_tokenizer(rows, cache):
    class Slow:
        is_fast = False

    assert "tokenizer.json" in message_of(rows, Slow(), cache)


def test_a_source_that_is_no_text_is_refused_by_the_workers_too(tmp_path, cache):
    path = write(tmp_path / "rows.jsonl", [{"body": text} for text in TEXTS])
    with pytest.raises(UserError, match="no column 'text'"):
        prepared_by_workers(path, cache, unit_bytes=1500)


# Interruptions


@pytest.fixture
def started(monkeypatch) -> list[subprocess.Popen]:
    """The workers."""
    found, real = [], subprocess.Popen

    def recorded(*args, **kwargs):
        found.append(real(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(pool.subprocess, "Popen", recorded)
    return found


class Stopped(Exception):
    pass


@pytest.mark.parametrize("error", [Stopped, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 4, 8])
def test_what_progress_raises_ends_the_workers_at_once(rows, cache, started, monkeypatch, error, call):
    monkeypatch.setattr(preparing, "TELL_SECONDS", 0)
    calls = []

    def progress(*_):
        calls.append(1)
        if len(calls) == call:
            raise error

    with pytest.raises(error):
        prepared_by_workers(rows, cache, unit_bytes=500, progress=progress)
    assert started
    assert all(process.poll() is not None for process in started)
    assert not [path for path in (cache / "shards").iterdir() if path.suffix]


def test_a_killed_worker_is_one_line_and_ends_the_others(rows, cache, started):
    def progress(*_):
        if len(started) == 2:
            started[0].kill()

    with pytest.raises(UserError, match=r"killed.*memory.*--data.workers than 2") as caught:
        prepared_by_workers(rows, cache, unit_bytes=500, progress=progress)
    assert "\n" not in str(caught.value)
    assert all(process.poll() is not None for process in started)


def test_a_failing_worker_tells_where(rows, cache, monkeypatch):
    """A bug of ours keeps its traceback."""
    monkeypatch.setattr(preparing, "asdict", lambda _: {"no": "settings"})
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*EncoderSettings"):
        prepared_by_workers(rows, cache, unit_bytes=1500)


def a_few_texts(path: Path) -> Path:
    choices = random.Random(0)
    words = " ".join(TEXTS).split()
    return write_rows(path, [" ".join(choices.choices(words, k=400)) for _ in range(1000)])


def start_preparing(path: Path, cache: Path, mark: str) -> subprocess.Popen:
    folders = [str(Path(preparing_in_a_process.__file__).parent), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders), "PREPARED_BY_TEST": mark}
    words = [sys.executable, preparing_in_a_process.__file__, str(path), str(cache), str(2**17)]
    return subprocess.Popen(words, env=environment, start_new_session=True)


def test_kills_at_any_moment_lose_nothing_that_is_done_and_change_no_byte(tmp_path, cache):
    path = a_few_texts(tmp_path / "rows.jsonl")
    prepared_by_workers(path, tmp_path / "whole", unit_bytes=2**17)
    whole = contents(tmp_path / "whole" / "shards")
    assert len(whole) > 4 * 10
    choices, mark, interrupted = random.Random(1), uuid.uuid4().hex, 0
    done: dict[Path, int] = {}
    for kind in ("main", "main", "workers", "main"):
        process = start_preparing(path, cache, mark)
        wanted = len(done) + choices.randint(0, 2)
        while process.poll() is None and len(complete(cache)) < wanted:
            time.sleep(0.005)
        time.sleep(choices.uniform(0, 0.03))
        for number in {*processes_with(mark)} - {process.pid} if kind == "workers" else {process.pid}:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        interrupted += process.wait() != 0
        assert all_gone(mark)
        assert {folder: folder.stat().st_ino for folder in done} == done, "made again"
        done = {folder: folder.stat().st_ino for folder in complete(cache)}
    assert interrupted
    store = prepared_by_workers(path, cache, unit_bytes=2**17)
    assert contents(cache / "shards") == whole
    assert {folder: folder.stat().st_ino for folder in done} == done
    assert store.key == prepared_by_workers(path, tmp_path / "whole", unit_bytes=2**17).key


def complete(cache: Path) -> list[Path]:
    return [path for path in cache.glob("shards/*") if not path.suffix]


def test_two_processes_preparing_the_same_text_are_harmless(tmp_path, cache):
    path = a_few_texts(tmp_path / "rows.jsonl")
    mark = uuid.uuid4().hex
    processes = [start_preparing(path, cache, mark) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    prepared_by_workers(path, tmp_path / "whole", unit_bytes=2**17)
    assert contents(cache / "shards") == contents(tmp_path / "whole" / "shards")


def test_equal_text_in_two_files_is_tokenised_once_and_stands_twice(tmp_path, tokenizer, cache, made, monkeypatch):
    monkeypatch.setattr(units, "FILE_COST", units.UNIT_BYTES)  # a unit each
    for name in ("a", "b"):
        write_rows(tmp_path / f"data/{name}.jsonl", TEXTS)
    store = prepared(tmp_path / "data", tokenizer, cache)
    assert len(made.keys) == 1
    assert store.train.num_documents + store.held_out.num_documents == 2 * len(TEXTS)
    names = [store.place(number)[0] for number in range(2 * len(TEXTS))]
    assert names == ["a.jsonl"] * len(TEXTS) + ["b.jsonl"] * len(TEXTS)
    assert np.array_equal(store.digests[: len(TEXTS)], store.digests[len(TEXTS) :])
