"""Tokens on disk: what a shard and a store of several hold, and that a half-made or changed one is never taken."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
from array import array
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_pro_fast.text import shards
from llama_pro_fast.text.shards import (
    DOCUMENT,
    ShardWriter,
    make_shard,
    read_signed,
    remove_leftovers,
    signed,
    whole_shards,
)
from llama_pro_fast.text.store import Shard, TokenStore

KEYS = ["0123456789abcdef" * 2, "f" * 32, "0" * 32]
TRAIN = [[5, 6, 7, 1], [8, 1], [70_000, 9, 9, 1]]
HELD_OUT = [[6, 6, 1], [7, 1]]
FILES = ["tokens.bin", "documents.npy", "counts.npy", "learned.bin", "meta.json"]


def write(folder: Path, train=TRAIN, held_out=HELD_OUT, learned=None) -> None:
    """A shard of two files: documents that train at lines 0, 1, … of the first, held-out ones of the second."""
    rows = [(0, 100 + i, 0, i, 0) for i in range(len(train))] + [(0, 200 + i, 0, i, 1) for i in range(len(held_out))]
    with ShardWriter(folder, np.array(rows, DOCUMENT), len(train), np.dtype(np.uint32)) as writer:
        for ids in train:
            writer.append(ids, learned=None if learned is None else np.array([learned(id) for id in ids]))
        for ids in held_out:
            writer.append(array("I", ids), num_bytes=10 * len(ids))  # as those of a long text come


def made(folder: Path, key: str = KEYS[0], **documents) -> Path:
    folder.mkdir(exist_ok=True)
    make_shard(folder, key, lambda partial: write(partial, **documents), lambda: None)
    return folder / key


def documents_of(store: TokenStore, side) -> list[list[int]]:
    row = store.tokens(side.begins, side.lengths).tolist()
    ends = np.cumsum(side.lengths).tolist()
    return [row[end - length : end] for end, length in zip(ends, side.lengths.tolist(), strict=True)]


def opened(folders: list[Path]) -> TokenStore:
    return TokenStore([Shard.open(f, [(f"{i}-a", 10), (f"{i}-b", 20)]) for i, f in enumerate(folders)], encoder="k")


# What a store holds


@settings(max_examples=30, deadline=None)
@given(data=st.data(), flushed=st.integers(1, 9))
def test_every_document_stands_once_on_its_side_in_order(tmp_path_factory, data, flushed):
    document = st.lists(st.integers(0, 99_999), max_size=6)
    sides = data.draw(st.lists(st.tuples(st.lists(document, max_size=5), st.lists(document, max_size=5)), max_size=4))
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "FLUSHED_TOKENS", flushed)
        found = [made(folder, f"{i:032x}", train=train, held_out=held_out) for i, (train, held_out) in enumerate(sides)]
    store = opened(found)
    train = [ids for documents, _ in sides for ids in documents if ids]
    held_out = [ids for _, documents in sides for ids in documents if ids]
    assert documents_of(store, store.train) == train
    assert documents_of(store, store.held_out) == held_out
    assert (store.train.num_documents, store.train.num_tokens) == (len(train), sum(map(len, train)))
    assert store.held_out.num_bytes.tolist() == [10 * len(ids) for ids in held_out]
    assert store.num_empty == sum(not ids for side in sides for documents in side for ids in documents)
    predicted = [token for ids in train for token in ids[1:]]
    expected = np.bincount(np.array(predicted, int), minlength=len(store.counts))
    assert store.counts.tolist() == expected.tolist()


def test_arrays_have_the_types_that_the_order_counts_on(tmp_path):
    store = opened([made(tmp_path / "shards")])
    for side in (store.train, store.held_out):
        for values in (side.begins, side.lengths, side.num_bytes, side.numbers):
            assert values.dtype == np.int64
    assert store.tokens(store.train.begins, store.train.lengths).dtype == np.int64
    assert store.digests.dtype == np.uint64
    assert not store.train.num_bytes.size


def test_a_document_has_its_digest_file_and_line(tmp_path):
    folder = tmp_path / "shards"
    store = opened([made(folder, KEYS[0]), made(folder, KEYS[1], train=[[], [3, 1]], held_out=[])])
    assert store.digests.tolist() == [100, 101, 102, 200, 201, 101]
    places = [store.place(number) for number in store.train.numbers.tolist()]
    assert places == [("0-a", 10), ("0-a", 11), ("0-a", 12), ("1-a", 11)]
    assert [store.place(number) for number in store.held_out.numbers.tolist()] == [("0-b", 20), ("0-b", 21)]


def test_any_range_within_a_document_can_be_read(tmp_path):
    store = opened([made(tmp_path / "shards", key) for key in KEYS[:2]])
    begins, lengths = store.train.begins, store.train.lengths
    inner = store.tokens(begins[[5, 0, 2]] + 1, lengths[[5, 0, 2]] - 2)
    assert inner.tolist() == [9, 9, 6, 7, 9, 9]
    assert store.tokens(begins[:0], lengths[:0]).tolist() == []


def test_what_is_not_to_be_learned_is_kept_by_token(tmp_path):
    folder = tmp_path / "shards"
    all_learned, some = made(folder, KEYS[0]), made(folder, KEYS[1], learned=lambda id: id not in (6, 9))
    assert opened([all_learned]).learned(np.array([0]), np.array([4])) is None
    store = opened([all_learned, some])
    tokens = store.tokens(store.train.begins, store.train.lengths)
    learned = store.learned(store.train.begins, store.train.lengths)
    half = len(tokens) // 2
    assert learned[:half].all()
    assert (learned[half:] == ~np.isin(tokens[half:], (6, 9))).all()
    assert store.learned(store.train.begins[4:5] + 1, store.train.lengths[4:5] - 1).tolist() == [True]
    assert store.learned(store.train.begins[5:6] + 1, np.array([2])).tolist() == [False, False]
    assert store.learned(store.held_out.begins, store.held_out.lengths).all()


def test_a_store_can_be_made_of_arrays():
    documents = np.array([(3, 7, -1, 0, 0), (5, 8, 4, 1, 0)], DOCUMENT)
    tokens = np.array([4, 5, 1, 6, 1], np.uint16)
    shard = Shard(tokens, lambda: documents, lambda: np.bincount(tokens[:3]), files=[("rows", 1)])
    store = TokenStore([shard], encoder="k")
    assert documents_of(store, store.train) == [[4, 5, 1]]
    assert documents_of(store, store.held_out) == [[6, 1]]
    assert store.place(1) == ("rows", 2)
    empty = TokenStore([], encoder="none")
    assert (empty.train.num_documents, empty.held_out.num_tokens, empty.counts.size, empty.digests.size) == (0,) * 4


# When a shard is there


def cut_short(content: bytes) -> bytes:
    return content[: len(content) // 2]


def a_bit_flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def zeroed(content: bytes) -> bytes:
    return bytes(len(content))


@pytest.mark.parametrize("damaged", [cut_short, a_bit_flipped, zeroed, lambda _: b"", None])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_shard_is_none_and_is_made_again(tmp_path, file, damaged):
    path = made(tmp_path / "shards", learned=lambda id: id != 6) / file
    whole = path.read_bytes()
    assert whole_shards(tmp_path, KEYS) == {KEYS[0]}
    if damaged is None:
        path.unlink()
    else:
        path.write_bytes(damaged(whole))
    assert whole_shards(tmp_path, KEYS) == set()
    again = lambda folder: write(folder, learned=lambda id: id != 6)  # noqa: E731
    assert make_shard(tmp_path / "shards", KEYS[0], again, lambda: None)
    assert path.read_bytes() == whole
    assert whole_shards(tmp_path, KEYS) == {KEYS[0]}
    assert not make_shard(tmp_path / "shards", KEYS[0], lambda _: pytest.fail("made again"), lambda: None)


@pytest.mark.parametrize("meta", [b"[]", b"7", b'"digest"', b"{}", b"[" * 100_000, b"\xff", b'{"digest": null}'])
def test_a_shard_that_says_anything_of_itself_is_none(tmp_path, meta):
    (made(tmp_path / "shards") / "meta.json").write_bytes(meta)
    assert whole_shards(tmp_path, KEYS) == set()


def test_a_shard_under_the_key_of_another_is_none(tmp_path):
    folder = made(tmp_path / "shards")
    folder.rename(folder.with_name(KEYS[1]))
    assert whole_shards(tmp_path, KEYS) == set()


def test_a_shard_is_not_read_again_for_its_digests(tmp_path, monkeypatch):
    for path in made(tmp_path / "shards").iterdir():
        os.utime(path, (0, 0))  # long ago: younger files are looked at each time
    assert whole_shards(tmp_path, KEYS) == {KEYS[0]}
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert whole_shards(tmp_path, KEYS) == {KEYS[0]}


def test_equal_documents_make_equal_files(tmp_path):
    first, second = (made(tmp_path / name) for name in ("one", "other"))
    assert {f.name: f.read_bytes() for f in first.iterdir()} == {f.name: f.read_bytes() for f in second.iterdir()}
    assert not [path for path in (tmp_path / "one").iterdir() if path.name != KEYS[0]]


def test_notes_are_read_as_they_were_signed(tmp_path):
    path = tmp_path / "note.json"
    assert read_signed(path) is None
    path.write_bytes(signed({"rows": 7}))
    assert read_signed(path) == {"rows": 7}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rows": 8}))
    assert read_signed(path) is None


# A half-made shard


class CutShort(Exception):
    pass


@pytest.mark.parametrize("error", [CutShort(), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_writing_leaves_nothing(tmp_path, error):
    def failing(folder: Path) -> None:
        write(folder)
        raise error

    with pytest.raises(type(error)):
        make_shard(tmp_path, KEYS[0], failing, lambda: None)
    assert not [*tmp_path.iterdir()]


def _killed_while_writing(folder: Path) -> None:
    def killed(partial: Path) -> None:
        write(partial)
        os.kill(os.getpid(), 9)

    make_shard(folder, KEYS[0], killed, lambda: None)


def _holding(folder: Path, connection) -> None:
    def slow(partial: Path) -> None:
        connection.send("writing")
        connection.recv()
        write(partial)

    make_shard(folder, KEYS[1], slow, lambda: None)


def test_what_killed_processes_leave_is_cleaned_and_nothing_else(tmp_path):
    context = multiprocessing.get_context("fork")
    killed = context.Process(target=_killed_while_writing, args=(tmp_path,))
    killed.start()
    killed.join()
    assert {path.name for path in tmp_path.iterdir()} == {f"{KEYS[0]}.lock", f"{KEYS[0]}.partial"}
    (tmp_path / f"{KEYS[2]}.partial").mkdir()
    others = ["model.partial", "0123.lock", KEYS[0].upper() + ".partial"]
    for name in others:
        (tmp_path / name).mkdir()
    here, there = context.Pipe()
    writing = context.Process(target=_holding, args=(tmp_path, there))
    writing.start()
    assert here.recv() == "writing"
    remove_leftovers(tmp_path)
    at_work = {f"{KEYS[1]}.lock", f"{KEYS[1]}.partial"}
    assert {path.name for path in tmp_path.iterdir()} == at_work | {*others}
    here.send("go on")
    writing.join()
    assert {path.name for path in tmp_path.iterdir()} == {KEYS[1], *others}


def test_a_second_process_waits_for_the_first_and_takes_what_it_made(tmp_path):
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    first = context.Process(target=_holding, args=(tmp_path, there))
    first.start()
    assert here.recv() == "writing"
    waits = []

    def waiting() -> None:
        waits.append(1)
        if len(waits) == 2:
            here.send("go on")

    assert not make_shard(tmp_path, KEYS[1], lambda _: pytest.fail("made twice"), waiting)
    first.join()
    assert len(waits) >= 2
    assert [path.name for path in tmp_path.iterdir()] == [KEYS[1]]
