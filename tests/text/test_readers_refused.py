"""A file that is no text of its source at all: one line that says what it is and what helps."""

from __future__ import annotations

import gzip

import pyarrow as pa
import pytest
from reading import arrow, items, parquet, refusal, shown, write

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_in_utf16_is_called_so(tmp_path, encoding):
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv"):
        message = refusal(write(tmp_path / name, '{"text": "a"}\n{"text": "b"}\n'.encode(encoding)))
        assert "UTF-" in message
        assert "iconv" in message
    write(tmp_path / "in" / "a.py", "print('a')\n".encode(encoding))
    write(tmp_path / "in" / "b.py", "print('b')\n")
    fault, document = items(tmp_path / "in")
    assert fault.reason.startswith("not UTF-8 text but UTF-")
    assert document.text == "print('b')\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.parquet", b"not parquet, not at all", ["cannot be read as parquet", "not parquet"]),
        ("a.parquet", b"\0" * 60, ["cannot be read as parquet"]),
        ("a.arrow", b'{"text": "a"}\n', ["cannot be read as arrow"]),
        ("a.jsonl", gzip.compress(b"x", mtime=0), ["gzip, not jsonl", "name it"]),
        ("a.json", b"PK\x03\x04 and more", ["a zip archive, not json"]),
        ("a.csv", b"PAR1\x15 and more", ["parquet, not csv"]),
        ("a.jsonl", b"<!DOCTYPE html><html>", ["an HTML page, not jsonl", "download it again"]),
        ("a.jsonl.gz", b'{"text": "a"}\n', ["not gzip, as its ending says"]),
        ("a.txt.zst", b"text", ["not zstd, as its ending says"]),
        ("a.jsonl.gz", gzip.compress(gzip.compress(b"x", mtime=0), mtime=0), ["gzip, not jsonl"]),
    ],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path, name, content, words):
    message = refusal(write(tmp_path / name, content))
    assert message.startswith(f"{tmp_path / name}: ")
    assert all(word in message for word in words), message


def test_a_picture_called_txt_is_no_reason_to_refuse_a_folder(tmp_path):
    write(tmp_path / "in" / "a.txt", b"%PDF-1.4\n" + b"\0\xff" * 50)
    write(tmp_path / "in" / "b.txt", "good")
    assert shown(tmp_path / "in") == [(1, "not UTF-8 text but a PDF"), (1, "good")]
    assert items(tmp_path / "in")[0].lost == 109


NO_TEXT = [
    ([{"content": "a", "id": 1}], ["no column 'text' among 'content', 'id'", "`text:`"]),
    ([{"messages": CHAT}], ["'messages' looks like chat or instruction data"]),
    ([{"conversations": [{"from": "human", "value": "hi"}]}], ["'conversations' looks like chat"]),
    ([{"instruction": "a", "input": "", "output": "b"}], ["'instruction' and 'output' look like chat or instruction"]),
    ([{"prompt": "a", "completion": "b"}], ["'completion' and 'prompt' look like chat or instruction data"]),
    ([{"text": CHAT}], ["'text' holds ", "chat"]),
]  # fmt: skip


@pytest.mark.parametrize(("found", "words"), NO_TEXT)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.arrow"])
def test_a_file_without_the_text_and_a_chat_are_named(tmp_path, name, found, words):
    path, table = tmp_path / name, pa.Table.from_pylist(found)
    if name.endswith(("jsonl", "json")):
        write(path, found)
    else:
        (parquet if name == "a.parquet" else arrow)(path, table)
    message = refusal(path)
    assert all(word in message for word in [str(path), *words]), message
    is_chat = "`text:`" not in words
    assert ("is not supported yet: write each conversation as one string" in message) == is_chat


@pytest.mark.parametrize("write_table", [parquet, arrow])
@pytest.mark.parametrize(
    ("column", "held"), [([1, 2], "int64"), ([b"a"], "binary"), ([["a"]], "list<"), ([{"a": 1}], "struct<")]
)
def test_a_table_whose_column_is_no_text_is_refused(tmp_path, write_table, column, held):
    message = refusal(write_table(tmp_path / f"a.{write_table.__name__}", {"text": column}))
    assert f"column 'text' holds {held}" in message
    assert "`text:`" in message


def test_a_wrong_column_is_found_in_the_first_rows_not_after_the_whole_file(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"content": "a"}] * 100 + [{"text": "a"}])
    assert "no column 'text' among 'content'" in refusal(path)
    assert len(items(write(tmp_path / "late.jsonl", [{"content": "a"}] * 99 + [{"text": "a"}]))) == 100


def test_rows_that_cannot_be_read_do_not_show_that_a_column_is_missing(tmp_path):
    path = write(tmp_path / "a.jsonl", "nonsense\n[1]\n7\n")
    assert shown(path) == [(1, "not JSON"), (2, "not an object but list"), (3, "not an object but number")]
