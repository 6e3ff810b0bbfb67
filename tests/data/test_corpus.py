"""From a recipe's sources to what trains: weights, shares, replay, repeated documents, and what a run says of them."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from llama_pro_fast.config import DataConfig, Source
from llama_pro_fast.data.corpus import Corpus
from llama_pro_fast.data.remarks import measured_on_little, remarks, untrained_tokens
from llama_pro_fast.data.show import shown_sequences
from llama_pro_fast.data.statistics import shared_documents, statistics
from llama_pro_fast.errors import UserError
from llama_pro_fast.hf.config import resolve
from llama_pro_fast.text.documents import is_held_out

SEQ_LEN, BATCH = 64, 8


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve("builtin:prose-3m"))


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def stories(count: int, word: str = "boat", words: int = 60) -> list[str]:
    draw = random.Random(word)
    return [f"{word} number {i} " + " ".join(f"{word}{draw.randrange(97)}" for _ in range(words)) for i in range(count)]


def prepare(tmp_path: Path, tokenizer, *, default_general=False, **data) -> Corpus:
    config = DataConfig(cache=str(tmp_path / "cache"), held_out=data.pop("held_out", 0.1), **data)
    return Corpus.prepare(config, tokenizer, seq_len=SEQ_LEN, seed=0, batch_size=BATCH, default_general=default_general)


def steps_of(corpus: Corpus, count: int) -> np.ndarray:
    """Sequences of each source in each of the first steps, ``[steps, sources]``: a sequence is of one source."""
    found = np.zeros((count, len(corpus.held_out)), int)
    for step in range(count):
        for n in range(BATCH):
            of = {source for source, _ in corpus.train.documents(step * BATCH + n, 1)}
            assert len(of) == 1
            found[step, of.pop()] += 1
    return found


def test_replay_is_a_share_of_every_step(tmp_path, tokenizer):
    domain, general = write(tmp_path / "mine.jsonl", stories(60)), write(tmp_path / "web.jsonl", stories(40, "road"))
    corpus = prepare(tmp_path, tokenizer, domain=domain, general=general, replay=0.25)
    assert set(map(tuple, steps_of(corpus, 50))) <= {(6, 2), (5, 3), (7, 1)}
    assert corpus.train.shares == pytest.approx([0.75, 0.25])
    assert corpus.description().endswith("0.25 of every step")


def test_a_share_is_of_tokens_however_full_sequences_are(tmp_path, tokenizer):
    """The general text's documents fill little more than half a sequence each, and no two fit."""
    tokens = 0.6 * SEQ_LEN
    short = [
        text for text in stories(400, "road", words=9) if tokens - 8 < len(tokenizer(text)["input_ids"]) < tokens + 8
    ]
    assert len(short) > 50
    domain, general = write(tmp_path / "mine.jsonl", stories(60)), write(tmp_path / "web.jsonl", short)
    corpus = prepare(tmp_path, tokenizer, domain=domain, general=general, replay=0.25)
    seen = corpus.train.source_tokens(0, 4000)
    assert seen[1] / seen.sum() == pytest.approx(0.25, abs=0.005)
    sequences = steps_of(corpus, 100).sum(0)
    assert sequences[1] / sequences.sum() > 0.32


def test_replay_is_divided_by_weights_times_tokens(tmp_path, tokenizer):
    general = [
        Source(path=write(tmp_path / "a.jsonl", stories(40, "road")), weight=2),
        Source(path=write(tmp_path / "b.jsonl", stories(40, "lane")), weight=1),
        Source(path=write(tmp_path / "c.jsonl", stories(40, "path")), weight=0),
    ]
    domain = write(tmp_path / "mine.jsonl", stories(60))
    corpus = prepare(tmp_path, tokenizer, domain=domain, general=general, replay=0.5)
    tokens = [text.store.train.num_tokens for text in corpus.held_out]
    total = 2 * tokens[1] + tokens[2]
    shares = [0.5, 0.5 * 2 * tokens[1] / total, 0.5 * tokens[2] / total, 0]
    assert corpus.train.shares == pytest.approx(shares)
    assert steps_of(corpus, 200).mean(0) == pytest.approx(np.array(shares) * BATCH, abs=0.05)


def test_without_a_general_text_nothing_is_replayed_and_it_is_said(tmp_path, tokenizer):
    domain = write(tmp_path / "mine.jsonl", stories(60))
    corpus = prepare(tmp_path, tokenizer, domain=domain, replay=0.2, default_general=True)
    assert corpus.train.shares.tolist() == [1, 0]
    config = DataConfig(domain=domain, replay=0.2)
    said = list(remarks(corpus, config, packaged_base=False))
    for words in ("nothing is replayed", "21.0", "poor stand-in"):
        assert any(words in line for line in said), words
    assert not any("stand-in" in line for line in remarks(corpus, config, packaged_base=True))


def test_few_documents_and_text_on_both_sides_are_said(tmp_path, tokenizer):
    path = write(tmp_path / "mine.jsonl", stories(60))
    corpus = prepare(tmp_path, tokenizer, domain=path, general=[Source(path=path, name="same")])
    said = list(remarks(corpus, DataConfig(domain=path, general=path), packaged_base=True))
    assert any(f"{path}: is text to learn and general text" in line for line in said)
    held_out = corpus.held_out[0].store.held_out
    (line,) = measured_on_little(corpus, int(held_out.lengths[:2].min()))
    assert re.match(r"measured on few documents \(mine [0-9.]+, same [0-9.]+\), which say little", line)
    assert held_out.num_documents < 5 or not list(measured_on_little(corpus, 10**9))


@pytest.mark.parametrize(
    ("general", "replay", "words"),
    [
        ([Source(path="web.jsonl", weight=0)], 0.2, "weight"),
        ([Source(path="web.jsonl", share=0.1)], 0.2, "share"),
        ([Source(path="web.jsonl", share=0.1, weight=1)], 0.0, "web.jsonl"),
    ],
)
def test_replay_that_contradicts_its_sources_is_refused(tmp_path, tokenizer, monkeypatch, general, replay, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "web.jsonl", stories(40, "road"))
    with pytest.raises(UserError, match=words):
        prepare(tmp_path, tokenizer, domain=write(tmp_path / "mine.jsonl", stories(60)), general=general, replay=replay)


def test_repeated_documents_are_left_out_where_asked(tmp_path, tokenizer):
    texts = [text for text in stories(80) if not is_held_out(text, 0.1)]
    path = write(tmp_path / "mine.jsonl", stories(80) + texts[:30] + [texts[0] + " other"] + texts[10:20])
    with_repeats = prepare(tmp_path, tokenizer, domain=path, held_out=0.1)
    without = prepare(tmp_path, tokenizer, domain=path, held_out=0.1, drop_duplicates=True)
    assert statistics(with_repeats, SEQ_LEN)[0].repeated == 40
    assert with_repeats.fingerprint != without.fingerprint
    epoch = without.train.sequences_in_epoch(0)
    numbers = [number for _, number in without.train.documents(0, epoch)]
    assert sorted(numbers) == sorted(set(numbers))
    assert {tuple(document_tokens(without, number)) for number in numbers} == {
        tuple(document_tokens(without, number)) for number in without.held_out[0].store.train.numbers.tolist()
    }


def document_tokens(corpus: Corpus, number: int) -> list[int]:
    store = corpus.held_out[0].store
    begin, length = store.extent(number)
    return store.tokens(np.array([begin]), np.array([length])).tolist()


def test_held_out_documents_that_stand_in_training_nearly_whole_are_found(tmp_path, tokenizer):
    texts = stories(200, words=400)
    held_out = [n for n, text in enumerate(texts) if is_held_out(text, 0.1)]
    copied = held_out[::2]
    quoted = [[f"Quoted {times} times. {texts[n]} The end." for times in range(9)] for n in copied]
    changed = dict(
        zip(copied, (next(text for text in each if not is_held_out(text, 0.1)) for each in quoted), strict=True)
    )
    path = write(tmp_path / "mine.jsonl", texts + list(changed.values()))
    found = statistics(prepare(tmp_path, tokenizer, domain=path), SEQ_LEN)[0]
    assert found.leaked == [f"mine.jsonl line {n + 1}" for n in copied]
    assert found.compared == found.held_out == len(held_out)


def fingerprints(tmp_path, tokenizer, *, seq_len=SEQ_LEN, seed=0, batch_size=BATCH, **data) -> tuple[str, str]:
    config = DataConfig(cache=str(tmp_path / "cache"), held_out=0.1, **data)
    settled = {"seq_len": seq_len, "seed": seed, "batch_size": batch_size, "default_general": False}
    corpus = Corpus.prepare(config, tokenizer, **settled)
    return corpus.fingerprint, corpus.measured


def test_the_fingerprint_changes_with_whatever_changes_the_order_and_with_nothing_else(tmp_path, tokenizer):
    path, other = write(tmp_path / "mine.jsonl", stories(60)), write(tmp_path / "other.jsonl", stories(60, "road"))
    sources = [Source(path=path), Source(path=other)]
    found = {"as it is": fingerprints(tmp_path, tokenizer, domain=sources)[0]}
    for change in ({"seq_len": 32}, {"seed": 1}, {"batch_size": 4}, {"packing": "concat"}):
        found[str(change)] = fingerprints(tmp_path, tokenizer, domain=sources, **change)[0]
    for change in ({"weight": 2}, {"share": 0.25}):
        found[str(change)] = fingerprints(tmp_path, tokenizer, domain=[sources[0], Source(path=other, **change)])[0]
    general = {"general": other, "domain": path}
    found["replay"] = fingerprints(tmp_path, tokenizer, **general, replay=0.25)[0]
    found["more replay"] = fingerprints(tmp_path, tokenizer, **general, replay=0.5)[0]
    write(tmp_path / "mine.jsonl", stories(60)[::-1])
    found["another order of rows"] = fingerprints(tmp_path, tokenizer, domain=sources)[0]
    assert len(set(found.values())) == len(found)


def test_only_what_is_trained_on_is_in_the_fingerprint_and_only_what_is_measured_in_the_other(tmp_path, tokenizer):
    texts = stories(60)
    path = tmp_path / "mine.jsonl"
    first = fingerprints(tmp_path, tokenizer, domain=write(path, texts))
    path.write_text("\n\n" + path.read_text())
    assert fingerprints(tmp_path, tokenizer, domain=str(path)) == first, "a blank line is no text"
    held_out = next(text for text in texts if is_held_out(text, 0.1))
    trained, measured = fingerprints(tmp_path, tokenizer, domain=write(path, [t for t in texts if t != held_out]))
    assert (trained == first[0], measured == first[1]) == (True, False)
    training = next(text for text in texts if not is_held_out(text, 0.1))
    trained, measured = fingerprints(tmp_path, tokenizer, domain=write(path, [t for t in texts if t != training]))
    assert (trained == first[0], measured == first[1]) == (False, True)


def test_replay_is_divided_by_what_is_left_of_repeated_documents(tmp_path, tokenizer):
    texts = stories(40, "road")
    general = [
        Source(path=write(tmp_path / "a.jsonl", texts * 3)),
        Source(path=write(tmp_path / "b.jsonl", stories(40, "lane"))),
    ]
    domain = write(tmp_path / "mine.jsonl", stories(60))
    corpus = prepare(tmp_path, tokenizer, domain=domain, general=general, replay=0.5, drop_duplicates=True)
    a, b = (each.num_tokens for each in corpus.mixed[1:])
    assert corpus.train.shares[1:] == pytest.approx([0.5 * a / (a + b), 0.5 * b / (a + b)])
    assert a < 1.5 * b


def test_a_name_in_both_roles_is_told_apart(tmp_path, tokenizer):
    for role in ("mine", "web"):
        (tmp_path / role).mkdir()
        write(tmp_path / role / "text.jsonl", stories(60, role))
    domain, general = str(tmp_path / "mine" / "text.jsonl"), str(tmp_path / "web" / "text.jsonl")
    corpus = prepare(tmp_path, tokenizer, domain=domain, general=general)
    assert corpus.labels == ["text (domain)", "text (general)"]


def test_a_cache_in_a_folder_of_text_is_refused_before_anything_is_written(tmp_path, tokenizer):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "mine.jsonl", stories(60))
    config = DataConfig(domain=str(tmp_path / "in"), cache=str(tmp_path / "in" / "cache"))
    with pytest.raises(UserError, match=r"data\.cache .* lies in "):
        Corpus.prepare(config, tokenizer, seq_len=64, seed=0, batch_size=8, default_general=False)
    assert not (tmp_path / "in" / "cache").exists()


def test_documents_of_two_sources_are_counted(tmp_path, tokenizer):
    a, b = stories(60), stories(60, "road")
    sources = [Source(path=write(tmp_path / f"{name}.jsonl", rows)) for name, rows in (("a", a), ("b", b + a[:7] * 2))]
    assert shared_documents(prepare(tmp_path, tokenizer, domain=sources)) == {("a", "b"): 7}


def test_a_faulty_row_is_said_with_its_place(tmp_path, tokenizer):
    path = tmp_path / "mine.jsonl"
    write(path, stories(300))
    with open(path, "a") as file:
        file.write('{"text": "half a line\n{"text": ""}\n')
    corpus = prepare(tmp_path, tokenizer, domain=str(path))
    said = " ".join(remarks(corpus, DataConfig(domain=str(path)), packaged_base=True))
    assert "1 of 302 rows left out" in said
    assert "mine.jsonl line 301" in said
    assert "1 of 302 rows hold no text" in said


def test_documents_are_named_by_file_and_line(tmp_path, tokenizer):
    (tmp_path / "crawl").mkdir()
    write(tmp_path / "crawl" / "a.jsonl", stories(40))
    write(tmp_path / "crawl" / "b.jsonl", stories(40, "road"))
    corpus = prepare(tmp_path, tokenizer, domain=str(tmp_path / "crawl"))
    texts = {"a": stories(40), "b": stories(40, "road")}
    for named in corpus.documents([(0, 12)], tokenizer, limit=200):
        place, _, beginning = named.partition(": ")
        file, line = place.removeprefix("crawl, ").split(".jsonl line ")
        assert texts[file][int(line) - 1].startswith(beginning.strip('"').removesuffix("…"))


def test_shown_sequences_are_the_texts_with_their_places(tmp_path, tokenizer):
    path = write(tmp_path / "mine.jsonl", stories(60, words=10))
    corpus = prepare(tmp_path, tokenizer, domain=path)
    for shown in shown_sequences(corpus, tokenizer, 3):
        head, *pieces = shown.split("\n── ")
        assert f"{SEQ_LEN} places" in head
        for piece in pieces:
            place, _, text = piece.partition("\n")
            if not place.endswith("without text"):
                line = int(place.split(" line ")[1].split(":")[0])
                assert stories(60, words=10)[line - 1] in text


def test_tokens_with_equal_rows_of_the_embedding_are_found(tmp_path, tokenizer):
    path = write(tmp_path / "mine.jsonl", stories(60))
    corpus = prepare(tmp_path, tokenizer, domain=path)
    embedding = np.arange(len(tokenizer) * 3, dtype=np.float32).reshape(-1, 3)
    assert not list(untrained_tokens(corpus, embedding, tokenizer.convert_ids_to_tokens))
    counts = corpus.held_out[0].store.counts
    unused = [n for n in range(len(tokenizer)) if n >= len(counts) or not counts[n]][:2]
    embedding[unused] = 0
    assert not list(untrained_tokens(corpus, embedding, tokenizer.convert_ids_to_tokens))
    (used,) = tokenizer("boat", add_special_tokens=False)["input_ids"][:1]
    embedding[[used, unused[0]]] = 0
    (line,) = untrained_tokens(corpus, embedding, tokenizer.convert_ids_to_tokens)
    assert "of 1 kinds" in line
    assert repr(tokenizer.convert_ids_to_tokens(used)) in line
