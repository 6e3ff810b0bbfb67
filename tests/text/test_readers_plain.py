"""Plain text, which is cut into documents, and source code, which is not."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import compressed, items, resolved, shown, texts, write

from llama_pro_fast.text import plain
from llama_pro_fast.text.documents import Document
from llama_pro_fast.text.sources import iterate_documents
from llama_pro_fast.text.units import read_unit, units_of

quick = settings(deadline=None, max_examples=40)


def test_a_txt_file_is_cut_between_paragraphs(tmp_path):
    paragraphs = [
        f"Paragraph {number}\n" + "of several lines\n" * 60 + "\n" * (1 + number % 3) for number in range(400)
    ]
    text = "".join(paragraphs)
    found = items(write(tmp_path / "book.txt", text))
    assert "".join(document.text for document in found) == text
    assert len(found) == 6
    assert all(2**16 <= len(document.text) < 2 * 2**16 for document in found)
    assert all(document.text.startswith("Paragraph ") for document in found)
    lines = text.split("\n")
    assert all(lines[document.line - 1] == document.text.partition("\n")[0] for document in found)


def test_a_small_txt_file_is_one_document(tmp_path):
    text = "A paragraph.\n\n" * 5000
    assert 2**16 < len(text) < 2 * 2**16
    for name in ("a.txt", "a.md", "a.rst", "a.TXT"):
        assert texts(write(tmp_path / name, text)) == [text]


def test_a_txt_file_without_blank_lines_is_cut_at_ends_of_lines_and_one_without_lines_anywhere(tmp_path):
    lines = "".join(f"line {number}\n" for number in range(300_000))
    documents = texts(write(tmp_path / "lines.txt", lines))
    assert "".join(documents) == lines
    assert [document.endswith("\n") for document in documents] == [True] * 4
    assert all(2**20 - 20 < len(document) <= 2**20 for document in documents[:-1])
    found = items(write(tmp_path / "line.txt", "word " * 500_000))
    assert "".join(item.text for item in found) == "word " * 500_000
    assert [(item.line, len(item.text)) for item in found] == [(1, 2**20), (1, 2**20), (1, 2_500_000 - 2**21)]


@pytest.mark.parametrize("between", ["\n<|eos|>\n", "<|eos|>"])
@pytest.mark.parametrize("inside", ["\n\n", " "])
def test_texts_divided_by_the_name_of_eos_are_cut_there_and_nowhere_else(tmp_path, inside, between):
    stories = [
        inside.join(f"story {number} paragraph {part} {'word ' * 40}" for part in range(9)) for number in range(900)
    ]
    path = write(tmp_path / "stories.txt", between.join(stories))
    (unit,) = units_of(resolved(path))
    documents = [item.text for _, item in read_unit(unit, "<|eos|>")]
    assert len(documents) > 1
    assert "".join(documents) == between.join(stories)
    assert [story.strip() for text in documents for story in text.split("<|eos|>") if story.strip()] == [
        story.strip() for story in stories
    ]


@quick
@given(st.text(alphabet="ab \n", max_size=200))
def test_cutting_loses_nothing_and_leaves_nothing_short(tmp_path_factory, text):
    path = write(tmp_path_factory.getbasetemp() / "cut.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "TXT_DOCUMENT", 8)
        patch.setattr(plain, "TXT_LONGEST", 24)
        found = items(path)
    documents = [item.text for item in found]
    assert "".join(documents) == text
    assert all(len(document) >= 8 for document in documents) or documents == [text]
    assert all(len(document) <= 24 + 2 * 8 for document in documents)
    begins = [sum(map(len, documents[:number])) for number in range(len(documents))]
    assert [item.line for item in found] == [1 + text.count("\n", 0, begin) for begin in begins]


def test_a_txt_file_is_not_read_whole(tmp_path):
    source = resolved(write(tmp_path / "large.txt", "A paragraph of some words.\n\n" * 100_000))
    tracemalloc.start()
    try:
        number = sum(1 for _ in iterate_documents(source))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert number > 35
    assert peak < source.files[0].size / 2


def test_bytes_that_are_no_utf8_cost_the_document_they_stand_in_and_their_line_is_said(tmp_path):
    paragraphs = [f"Paragraph {number}\n" + "of several lines\n" * 4000 + "\n" for number in range(5)]
    data = "".join(paragraphs).encode()
    begin = data.index(b"Paragraph 2")
    path = write(tmp_path / "book.txt", data[:begin] + b"Paragraph 2\nlatin \xfc\n" + data[begin + 12 :])
    found = items(path)
    assert [item.line for item in found] == [1, 4003, 8006, 12008, 16010]
    assert (found[2].reason, found[2].detail) == ("not UTF-8", "byte 0xfc")
    assert [item.text for item in found if isinstance(item, Document)] == [paragraphs[i] for i in (0, 1, 3, 4)]


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", "ünïcode\n".encode() * 3_000, b"x" * 8191 + "ü".encode()])
@pytest.mark.parametrize("wrong", [b"\xff and more", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80"])
def test_every_kind_of_wrong_byte_is_found_in_its_line(tmp_path, before, wrong):
    for name in ("a.txt", "a.py"):
        assert shown(write(tmp_path / name, before + wrong)) == [(1 + before.count(b"\n"), "not UTF-8")]


@pytest.mark.parametrize(
    "name", ["a.py", "a.c", "a.cpp", "a.cu", "a.java", "a.tsx", "a.rs", "a.sql", "a.html", "a.R", "a.py.gz", "a.c.zst"]
)
def test_source_code_is_one_document_a_file(tmp_path, name):
    code = "line\n\n\n" * 30_000
    _, _, ending = name.rpartition(".")
    data = compressed(code.encode(), ending) if ending in ("gz", "zst") else code.encode()
    assert items(write(tmp_path / name, data)) == [Document(code, code, 1)]


def test_a_mark_of_utf8_is_no_text(tmp_path):
    for name, data in (("a.txt", "x"), ("a.py", "x"), ("a.csv", "text\nx\n"), ("a.json", '[{"text": "x"}]')):
        assert texts(write(tmp_path / name, "\ufeff" + data)) == ["x"]
