"""`split_by:`, the column that decides a row's side: rows of one value stay together, and the text is read as ever."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llama_pro_fast.config import DataConfig, Source
from llama_pro_fast.errors import UserError
from llama_pro_fast.text.documents import Document, Fault, is_held_out
from llama_pro_fast.text.preparing import tokenize_source
from llama_pro_fast.text.sources import ResolvedSource, iterate_documents, resolve_sources
from llama_pro_fast.text.tokenizer import train_tokenizer
from llama_pro_fast.text.units import read_unit, units_of

BOOKS = [f"book {number}" for number in range(30)]
ROWS = [{"text": f"{book}, page {page}.", "book": book, "page": page} for page in range(8) for book in BOOKS]
ENDINGS = pytest.mark.parametrize("ending", ["jsonl", "parquet"])


def write(path: Path, rows: list[dict], **settings) -> ResolvedSource:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return resolve_sources(DataConfig(domain=[Source(path=str(path), **settings)]))[0]


def message_of(source: ResolvedSource) -> str:
    with pytest.raises(UserError) as caught:
        list(iterate_documents(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@ENDINGS
def test_rows_of_one_value_are_never_on_both_sides(tmp_path, ending):
    sides = {}
    for split in (None, "book"):
        source = write(tmp_path / f"pages.{ending}", ROWS, split_by=split)
        tokenizer = train_tokenizer([source], vocab_size=258, held_out=0.3, bos=0, eos=1)
        store = tokenize_source(source, tokenizer, held_out=0.3, cache_dir=tmp_path / "cache")
        both = (tokenizer.decode(store.tokens(side.begins, side.lengths)) for side in (store.train, store.held_out))
        sides[split] = [{book for book in BOOKS if f"{book}, page" in text} for text in both]
    trained, held_out = sides["book"]
    assert held_out == {book for book in BOOKS if is_held_out(book, 0.3)}
    assert trained == set(BOOKS) - held_out
    assert sides[None][0] & sides[None][1], "without the column books are torn apart: this test shows nothing"


@ENDINGS
def test_the_text_is_the_text_columns_with_or_without_a_split(tmp_path, ending):
    rows = [{"body": row["text"], "text": "no", "book": row["book"]} for row in ROWS]
    path = tmp_path / f"pages.{ending}"
    found = [list(iterate_documents(write(path, rows, text="body", split_by=split))) for split in (None, "book")]
    assert found[0] == [Document(row["text"], row["text"], line) for line, row in enumerate(ROWS, start=1)]
    assert found[1] == [Document(row["text"], row["book"], line) for line, row in enumerate(ROWS, start=1)]


@ENDINGS
def test_a_split_by_the_text_column_is_the_default_one(tmp_path, ending):
    path = tmp_path / f"pages.{ending}"
    found = [list(iterate_documents(write(path, ROWS, split_by=split))) for split in (None, "text")]
    assert found[0] == found[1]


@pytest.mark.parametrize("value", [7, 0.5, True, ""])
@ENDINGS
def test_any_single_value_will_do(tmp_path, ending, value):
    source = write(
        tmp_path / f"rows.{ending}", [{"text": "a", "key": value}, {"text": "b", "key": value}], split_by="key"
    )
    assert [document.split_key for document in iterate_documents(source)] == [str(value)] * 2


def test_a_number_is_one_key_in_either_kind_of_file(tmp_path):
    rows = [{"text": "a", "key": 3}]
    keys = [next(iterate_documents(write(tmp_path / f"a.{e}", rows, split_by="key"))) for e in ("jsonl", "parquet")]
    assert keys[0] == keys[1]


def test_a_date_of_a_parquet_file_will_do(tmp_path):
    source = write(tmp_path / "rows.parquet", [{"text": "a", "day": datetime.date(2024, 5, 6)}], split_by="day")
    assert [document.split_key for document in iterate_documents(source)] == ["2024-05-06"]


@pytest.mark.parametrize(
    ("name", "values", "kind"),
    [
        ("rows.jsonl", ["good", None], "null"),
        ("rows.jsonl", ["good", {"name": "x"}], "object"),
        ("rows.jsonl", ["good", ["x", "y"]], "list"),
        ("rows.parquet", ["good", None], "null"),
        ("rows.parquet", [{"name": "y"}, {"name": "x"}], "object"),
        ("rows.parquet", [["x"], ["x", "y"]], "list"),
    ],
)
def test_a_row_without_a_single_value_is_left_out_and_named(tmp_path, name, values, kind):
    source = write(tmp_path / name, [{"text": "a", "key": value} for value in values], split_by="key")
    item = [item for unit in units_of(source) for _, item in read_unit(unit)][1]
    assert item == Fault(2, "no single value to split by", f"column 'key' holds {kind}")


def test_a_row_that_lacks_the_value_alone_is_left_out(tmp_path):
    source = write(tmp_path / "rows.jsonl", [{"text": "a", "key": 1}, {"text": "b"}], split_by="key")
    assert [item for unit in units_of(source) for _, item in read_unit(unit)] == [
        Document("a", "1", 1),
        Fault(2, "no single value to split by", "column 'key' holds nothing"),
    ]


@ENDINGS
def test_a_column_that_is_not_there_is_named(tmp_path, ending):
    message = message_of(write(tmp_path / f"rows.{ending}", ROWS, split_by="chapter"))
    assert f"rows.{ending}" in message
    assert "no column 'chapter'" in message
    assert "among 'book', 'page', 'text'" in message
    assert "`split_by:`" in message


def test_rows_without_text_need_no_value(tmp_path):
    """They are in neither side."""
    rows = [
        {"text": "a", "key": "x"},
        {"text": "", "key": None},
        {"text": None, "key": None},
        {"text": " ", "key": None},
    ]
    for ending in ("jsonl", "parquet"):
        source = write(tmp_path / f"rows.{ending}", rows, split_by="key")
        assert [document.text for document in iterate_documents(source)] == ["a", "", "", " "]


def test_a_value_without_bytes_has_a_side_too(tmp_path):
    """JSON can spell half of a surrogate pair in any string."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "key": "\\ud83d"}\n{"text": "b", "key": "\\ud83e"}\n')
    source = resolve_sources(DataConfig(domain=[Source(path=str(tmp_path / "rows.jsonl"), split_by="key")]))[0]
    keys = [document.split_key for document in iterate_documents(source)]
    assert len(set(keys)) == 2
    assert [is_held_out(key, 1.0) for key in keys] == [True, True]


def test_text_files_stay_whole(tmp_path):
    """A .txt file of several documents has no columns: all of it falls on one side, the side its name is drawn for."""
    (tmp_path / "books").mkdir()
    for book in BOOKS[:4]:
        (tmp_path / "books" / f"{book}.txt").write_text(f"A paragraph of {book}.\n\n" * 12_000)
    found = {}
    for split in (None, "file"):
        config = DataConfig(domain=[Source(path=str(tmp_path / "books"), split_by=split)])
        found[split] = list(iterate_documents(resolve_sources(config)[0]))
    assert [document.text for document in found["file"]] == [document.text for document in found[None]]
    assert len(found["file"]) > 2 * 4
    for document in found["file"]:
        assert document.split_key.removesuffix(".txt") in document.text[:100]


def test_a_source_file_is_split_by_its_name(tmp_path):
    (tmp_path / "tree").mkdir()
    for name in ("a.py", "b.py"):
        (tmp_path / "tree" / name).write_text("same\n")
    found = {}
    for split in (None, "file"):
        config = DataConfig(domain=[Source(path=str(tmp_path / "tree"), split_by=split)])
        found[split] = [document.split_key for document in iterate_documents(resolve_sources(config)[0])]
    assert found == {None: ["same\n", "same\n"], "file": ["a.py", "b.py"]}


def test_a_file_whose_name_is_no_text_has_a_side_too(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("some text")
    source = resolve_sources(DataConfig(domain=[Source(path=str(tmp_path), split_by="file")]))[0]
    (document,) = iterate_documents(source)
    assert is_held_out(document.split_key, 1.0)


@pytest.mark.parametrize("ending", ["csv", "json", "arrow"])
def test_the_other_formats_have_columns_too(tmp_path, ending):
    path, rows = tmp_path / f"rows.{ending}", [{"text": "a", "key": "x"}, {"text": "b", "key": "y"}]
    if ending == "csv":
        path.write_text("text,key\na,x\nb,y\n")
    elif ending == "json":
        path.write_text(json.dumps(rows))
    else:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    source = resolve_sources(DataConfig(domain=[Source(path=str(path), split_by="key")]))[0]
    assert [document.split_key for document in iterate_documents(source)] == ["x", "y"]


def test_one_large_text_file_without_a_split_is_split_by_paragraphs(tmp_path):
    paragraphs = [f"Paragraph {number}. " + "Some words of it. " * 200 for number in range(200)]
    (tmp_path / "large.txt").write_text("\n\n".join(paragraphs))
    source = resolve_sources(DataConfig(domain=str(tmp_path / "large.txt")))[0]
    tokenizer = train_tokenizer([source], vocab_size=258, held_out=0.2, bos=0, eos=1)
    store = tokenize_source(source, tokenizer, held_out=0.2, cache_dir=tmp_path / "cache")
    assert store.train.num_documents > store.held_out.num_documents > 0
