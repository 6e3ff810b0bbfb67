"""Sources: what is read from which file, and one clear line for everything that can be wrong with it."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_pro_fast.config import DataConfig, Source
from llama_pro_fast.data import sources
from llama_pro_fast.data.documents import is_held_out
from llama_pro_fast.data.sources import iterate_documents, resolve_sources
from llama_pro_fast.errors import UserError


def write(path: Path, content: str | bytes | list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parquet(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def texts(path, text: str = "text") -> list[str]:
    (source, _) = resolve_sources(DataConfig(domain=[Source(path=str(path), text=text)]))
    return [document.text for document in iterate_documents(source)]


def message_of(path, text: str = "text") -> str:
    with pytest.raises(UserError) as caught:
        texts(path, text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Resolving


def test_a_string_is_a_source_and_general_defaults_to_measured_prose(tmp_path):
    path = write(tmp_path / "law.txt", "x")
    domain, general = resolve_sources(DataConfig(domain=str(path)))
    assert (domain.name, domain.role, domain.weight, domain.kind) == ("law", "domain", 1.0, "files")
    assert (general.name, general.role, general.weight) == ("stdlib:prose", "general", 0.0)
    assert resolve_sources(DataConfig(domain=str(path)), default_general=False) == [domain]


def test_a_list_of_sources_keeps_names_and_weights(tmp_path):
    path = str(write(tmp_path / "law.txt", "x"))
    data = DataConfig(
        domain=[Source(path=path, weight=1.5), Source(path="stdlib:code", name="code")],
        general=[Source(path=path, name="replay", weight=0.1)],
    )
    found = [(source.name, source.role, source.weight) for source in resolve_sources(data)]
    assert found == [("law", "domain", 1.5), ("code", "domain", 1.0), ("replay", "general", 0.1)]


@pytest.mark.parametrize(
    ("domain", "words"),
    [
        (None, ["--data.domain"]),
        ([], ["--data.domain"]),
        ("missing.jsonl", ["missing.jsonl", "no such file", ".parquet"]),
        ("stdlib:poetry", ["stdlib:poetry", "stdlib:prose"]),
        ("notes.docx", ["notes.docx", "'.docx'", ".jsonl, .json, .txt or .parquet"]),
        ("empty", ["empty", "no file with text", ".jsonl, .json, .txt or .parquet"]),
        ([Source(path="a.txt", weight=-1.0)], ["a.txt", "-1.0"]),
        ([Source(path="a.txt", weight=float("nan"))], ["a.txt", "nan"]),
        ([Source(path="a.txt"), Source(path="more/a.txt")], ["'a'", "a.txt", "more/a.txt", "`name`"]),
    ],
)
def test_what_cannot_be_resolved_is_said_in_one_line(tmp_path, monkeypatch, domain, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "notes.docx", "x")
    write(tmp_path / "a.txt", "x")
    write(tmp_path / "more" / "a.txt", "x")
    write(tmp_path / "empty" / "picture.png", "x")
    with pytest.raises(UserError) as caught:
        resolve_sources(DataConfig(domain=domain))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


# Reading


def test_a_folder_is_read_in_the_order_of_names_and_kinds_may_mix(tmp_path):
    write(tmp_path / "in" / "b" / "z.txt", "whole\nfile")
    write(tmp_path / "in" / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    write(tmp_path / "in" / "c.JSON", [{"text": "json"}])
    parquet(tmp_path / "in" / "b.parquet", text=["row 1", "row 2"])
    write(tmp_path / "in" / ".hidden" / "x.txt", "no")
    write(tmp_path / "in" / "picture.png", "no")
    assert texts(tmp_path / "in") == ["one", "two", "row 1", "row 2", "whole\nfile", "json"]


def test_rows_may_differ_and_empty_ones_are_empty_documents(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        b'\xef\xbb\xbf{"id": 1}\n{"text": "one", "id": "x"}\n\n{"text": null}\r\n'
        + '{"text": "zwei ü 🦙\\n", "meta": {"k": []}}'.encode(),
    )
    assert texts(path) == ["", "one", "", "zwei ü 🦙\n"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_of_every_kind_of_string(tmp_path, kind):
    path = parquet(tmp_path / "a.parquet", body=pa.array(["ü", None, "b"]).cast(kind), n=[1, 2, 3])
    assert texts(path, "body") == ["ü", "", "b"]


def test_the_split_key_of_a_file_is_its_text(tmp_path):
    write(tmp_path / "in" / "a.jsonl", [{"text": "same"}])
    write(tmp_path / "in" / "b.txt", "same")
    source = resolve_sources(DataConfig(domain=str(tmp_path / "in")))[0]
    assert {document.split_key for document in iterate_documents(source)} == {"same"}


CHAT = [{"role": "user", "content": "hi"}]
JSONL_ERRORS = [
    (b'{"text": "a"}\n{"text": "b"\n', ["line 2", "not JSON", "column 13"]),
    (b'{"text": "a"}\n{"text": "\xff"}\n', ["line 2", "not UTF-8"]),
    (b'{"text": "half \\ud83d"}\n', ["line 1", "surrogate", "character 5"]),
    (b'[{"text": "a"}]\n', ["line 1", "a list, not an object", "one object a line"]),
    (b'{\n  "text": "a"\n}\n', ["line 1", "not JSON", "one object a line"]),
    (b"[" * 100_000, ["line 1", "not JSON"]),
    ([{"content": "a", "id": 1}], ["no column 'text'", "'content', 'id'", "`text:`"]),
    ([{"content": "a"}] * 100 + [{"text": "a"}], ["no column 'text'", "'content'"]),
    ([{"messages": CHAT}], ["'messages'", "chat data is not supported yet"]),
    ([{"conversations": CHAT}], ["'conversations'", "chat data is not supported yet"]),
    ([{"text": CHAT}], ["line 1", "chat data is not supported yet"]),
    ([{"text": ["a"]}], ["line 1", "'text' holds list", "`text:`"]),
    ([{"text": "a"}, {"text": 3}], ["line 2", "'text' holds number", "`text:`"]),
]


@pytest.mark.parametrize(("content", "words"), JSONL_ERRORS)
def test_what_is_wrong_in_a_jsonl_file_is_said_in_one_line(tmp_path, content, words):
    path = write(tmp_path / "rows.jsonl", content)
    message = message_of(path)
    assert all(word in message for word in [str(path), *words]), message


def test_a_wrong_column_is_found_in_the_first_rows_not_after_the_whole_file(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"content": "a"}] * 150)
    (source, _) = resolve_sources(DataConfig(domain=str(path)))
    documents, read = iterate_documents(source), 0
    with pytest.raises(UserError):
        for read, _ in enumerate(documents, start=1):  # noqa: B007
            pass
    assert read == 99


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"body": ["a"], "id": [1]}, ["no column 'text'", "'body', 'id'", "`text:`"]),
        ({"messages": [CHAT]}, ["'messages'", "chat data is not supported yet"]),
        ({"text": [CHAT]}, ["row 1", "chat data is not supported yet"]),
        ({"text": [["a"]]}, ["row 1", "'text' holds list"]),
        ({"text": [1, 2]}, ["'text' holds int64", "`text:`"]),
        ({"text": [b"a"]}, ["'text' holds binary", "`text:`"]),
    ],
)
def test_what_is_wrong_in_a_parquet_file_is_said_in_one_line(tmp_path, columns, words):
    path = parquet(tmp_path / "rows.parquet", **columns)
    message = message_of(path)
    assert all(word in message for word in [str(path), *words]), message


def test_a_broken_parquet_file_is_named(tmp_path):
    whole = parquet(tmp_path / "whole.parquet", text=["some text"] * 1000).read_bytes()
    assert "cannot be read as parquet" in message_of(write(tmp_path / "a.parquet", b"not parquet"))
    assert "cannot be read as parquet" in message_of(write(tmp_path / "b.parquet", whole[: len(whole) // 2]))
    assert "cannot be read as parquet" in message_of(write(tmp_path / "c.parquet", b"\0" * 60 + whole[60:]))


def test_a_txt_file_in_another_encoding_is_named(tmp_path):
    message = message_of(write(tmp_path / "latin.txt", "ü".encode("latin-1")))
    assert "latin.txt" in message
    assert "UTF-8" in message


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", "ünïcode\n".encode() * 30_000, b"x" * 8191 + "ü".encode()])
@pytest.mark.parametrize("wrong", [b"\xff and more", b"\xc3"])
def test_the_first_wrong_byte_of_a_txt_file_is_named(tmp_path, before, wrong):
    message = message_of(write(tmp_path / "a.txt", before + wrong))
    assert f"a.txt: not UTF-8 at byte {len(before)}:" in message


# Cutting text files


def test_a_txt_file_is_cut_between_paragraphs(tmp_path):
    paragraphs = [
        f"Paragraph {number}\n" + "of several lines\n" * 60 + "\n" * (1 + number % 3) for number in range(400)
    ]
    documents = texts(write(tmp_path / "book.txt", "".join(paragraphs)))
    assert "".join(documents) == "".join(paragraphs)
    assert len(documents) == 6
    assert all(2**16 <= len(document) < 2 * 2**16 for document in documents)
    assert all(document.startswith("Paragraph ") for document in documents)


def test_a_small_txt_file_is_one_document(tmp_path):
    text = "A paragraph.\n\n" * 5000
    assert 2**16 < len(text) < 2 * 2**16
    assert texts(write(tmp_path / "a.txt", text)) == [text]


def test_a_txt_file_without_blank_lines_is_cut_at_ends_of_lines_and_one_without_lines_anywhere(tmp_path):
    lines = "".join(f"line {number}\n" for number in range(300_000))
    documents = texts(write(tmp_path / "lines.txt", lines))
    assert "".join(documents) == lines
    assert [document.endswith("\n") for document in documents] == [True] * 4
    assert all(2**20 - 20 < len(document) <= 2**20 for document in documents[:-1])
    documents = texts(write(tmp_path / "line.txt", "word " * 500_000))
    assert "".join(documents) == "word " * 500_000
    assert [len(document) for document in documents] == [2**20, 2**20, 2_500_000 - 2**21]


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet="ab \n", max_size=200))
def test_cutting_loses_nothing_and_leaves_nothing_short(tmp_path_factory, text):
    path = write(tmp_path_factory.getbasetemp() / "cut.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "TXT_DOCUMENT", 8)
        patch.setattr(sources, "TXT_LONGEST", 24)
        documents = texts(path)
    assert "".join(documents) == text
    assert all(len(document) >= 8 for document in documents) or documents == [text]
    assert all(len(document) <= 24 + 2 * 8 for document in documents)


def test_a_txt_file_is_not_read_whole(tmp_path):
    path = write(tmp_path / "large.txt", "A paragraph of some words.\n\n" * 200_000)
    (source, _) = resolve_sources(DataConfig(domain=str(path)))
    tracemalloc.start()
    try:
        number = sum(1 for _ in iterate_documents(source))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert number > 70
    assert peak < path.stat().st_size / 10


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        link = tmp_path / "in" / name
        link.symlink_to(tmp_path / "gone")
        assert name in message_of(tmp_path / "in")
        link.unlink()


# The split


def test_the_split_is_stable_and_grows_with_the_fraction():
    # Written down once: a change here moves held-out text of earlier runs into training.
    assert [key for key in map(str, range(100)) if is_held_out(key, 0.05)] == ["29", "72", "90", "99"]
    keys = [f"document {i}" for i in range(4000)]
    small, large = ({key for key in keys if is_held_out(key, fraction)} for fraction in (0.02, 0.1))
    assert small < large
    assert 320 < len(large) < 480
    assert not any(is_held_out(key, 0.0) for key in keys)
