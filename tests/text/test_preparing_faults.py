"""A source becomes tokens: what cannot be read, what is refused, and that kills change nothing."""

from __future__ import annotations

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

import numpy as np
import preparing_in_a_process
import pytest
from preparing_in_a_process import all_gone, prepared_by_workers, processes_with
from preparing_texts import OLD, TEXTS, contents, keys, prepared, write_rows
from reading import resolved, write

from llama_pro_fast.errors import UserError
from llama_pro_fast.text import pool, preparing, shards, units
from llama_pro_fast.text.documents import is_held_out
from llama_pro_fast.text.preparing import tokenize_source

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


def test_a_killed_worker_is_one_line_and_ends_the_others(rows, cache, started, monkeypatch):
    monkeypatch.setattr(preparing, "TELL_SECONDS", 0)  # the work must not be over before the first word

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


@pytest.mark.slow
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
    assert keys(store) == keys(prepared_by_workers(path, tmp_path / "whole", unit_bytes=2**17))


def complete(cache: Path) -> list[Path]:
    return [path for path in cache.glob("shards/*") if not path.suffix]


@pytest.mark.slow
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
