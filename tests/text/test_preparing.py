"""A source becomes tokens: what is in the store, and what is made again."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import time

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparing_in_a_process import a_tokenizer, prepared_by_workers
from preparing_texts import OLD, TEXTS, documents, keys, prepared, texts_of, write_rows
from reading import resolved, write
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llama_pro_fast.text import encoding, preparing, tokenizing, units
from llama_pro_fast.text.documents import is_held_out
from llama_pro_fast.text.preparing import tokenize_source
from llama_pro_fast.text.store import default_cache

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
    assert keys(first) == keys(again)
    assert documents(first) == documents(again)


def test_place_name_and_settings_of_the_mixture_do_not_matter(tmp_path, rows, tokenizer, cache, made):
    first = prepared(rows, tokenizer, cache)
    (tmp_path / "moved").mkdir()
    moved = resolved(rows.rename(tmp_path / "moved" / "other.jsonl"), name="other", weight=0.5)
    store = tokenize_source(moved, a_tokenizer(), held_out=0.2, cache_dir=cache)
    assert len(made.keys) == 1
    assert keys(store) == keys(first)
    assert store.place(0)[0] == "other.jsonl"


def test_a_file_that_is_being_written_is_read_again(rows, tokenizer, cache):
    """Two writes in one tick of a file system's clock leave the same time."""
    now = time.time_ns()
    os.utime(rows, ns=(now, now))
    first = prepared(rows, tokenizer, cache)
    rows.write_text(rows.read_text().replace("Document 7:", "Document 8:"))
    os.utime(rows, ns=(now, now))
    assert keys(prepared(rows, tokenizer, cache)) != keys(first)


@pytest.mark.parametrize("change", ["one file more", "a bad last row", "an edited row", "one file less"])
def test_only_what_is_new_is_tokenised(tmp_path, tokenizer, cache, made, monkeypatch, change):
    monkeypatch.setattr(units, "UNIT_BYTES", 4000)
    monkeypatch.setattr(units, "FILE_COST", 100)
    monkeypatch.setattr(tokenizing, "SHARD_BYTES", 1500)
    monkeypatch.setattr(tokenizing, "ENDING_BYTES", 200)
    folder = tmp_path / "crawl"
    for part in range(16):
        texts = [f"part {part} {text}" for text in TEXTS]
        path = folder / f"part-{part:02}.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_rows(path, texts[: 3 + 2 * part])
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
    assert again <= 2 < before // 4
    assert again or change not in ("one file more", "an edited row")
    assert store.rows.faulty == (change == "a bad last row")
    alone = prepared(folder, tokenizer, tmp_path / "other cache", max_bad_share=1.0)
    assert (keys(store), documents(store)) == (keys(alone), documents(alone))


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
    assert keys(second) != keys(first)
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
    assert keys(prepared(rows, tokenizer, cache)) == keys(store)
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
