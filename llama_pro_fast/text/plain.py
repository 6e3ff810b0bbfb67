"""Readers of plain text, which is cut into documents, and of source code, which is one document a file."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TextIO

from llama_pro_fast.text.documents import Document, Fault
from llama_pro_fast.text.places import OpenFile
from llama_pro_fast.text.rows import bad_place

TXT_DOCUMENT = 2**16
"""Characters from which on a .txt file is cut at the next paragraph. A file of books or of a whole corpus is then many
documents, which can be split into training and held-out text, each still longer than most sequences."""
TXT_LONGEST = 2**20
"""Characters after which one is cut at a line's end where there is no paragraph's, and longest stretch of a line."""


def read_txt(file: OpenFile, split_by: str | None, mark: str | None = None) -> Iterator[Document | Fault]:
    """The text in documents of whole paragraphs; where it spells ``mark``, the name of EOS, of whole texts."""
    stream = _text(file)
    yield from _documents(file, _paragraphs(stream, mark or None), split_by)
    stream.detach()


def read_code(file: OpenFile, split_by: str | None) -> Iterator[Document | Fault]:
    """The file as it is."""
    stream = _text(file)
    yield from _documents(file, iter([stream.read()]), split_by)
    stream.detach()


def _text(file: OpenFile) -> io.TextIOWrapper:
    return io.TextIOWrapper(file.stream, encoding="utf-8-sig", errors="surrogateescape")


def _documents(file: OpenFile, texts: Iterator[str], split_by: str | None) -> Iterator[Document | Fault]:
    line = 1
    name = file.name.rpartition("/")[2].encode(errors="backslashreplace").decode()  # names may be any bytes
    for text in texts:
        # Without columns, the split of a file of several documents can only be the file itself.
        key = text if split_by is None else name
        if not text.isascii() and (place := bad_place(text)) is not None:
            yield Fault(line + text.count("\n", 0, place), "not UTF-8", f"byte 0x{ord(text[place]) & 0xFF:02x}")
        else:
            yield Document(text, key, line)
        line += text.count("\n")
        file.lines = line if not text.endswith("\n") else line - 1


def _paragraphs(file: TextIO, mark: str | None = None) -> Iterator[str]:
    """The text in order and whole, in documents of whole paragraphs with at least ``TXT_DOCUMENT`` characters each.

    A paragraph ends with blank lines. Where none come before ``TXT_LONGEST`` characters a line's end will do, and a
    line longer than that is cut anywhere. What is left at the end and too short belongs to the document before it.
    From the first ``mark`` on, which ends a text, only another one ends a document before ``TXT_LONGEST``.
    """
    before, lines, length, was_blank, is_marked = "", [], 0, False, False
    while line := file.readline(TXT_LONGEST):
        if mark and mark in line:
            is_marked = True
            head, _, tail = line.rpartition(mark)
            if length + len(head) >= TXT_DOCUMENT:
                if before:
                    yield before
                before, lines, length, line = "".join([*lines, head, mark]), [], 0, tail
        is_blank = line.isspace()
        is_end = was_blank and not is_blank and not is_marked
        if length >= TXT_DOCUMENT and (is_end or length + len(line) > TXT_LONGEST):
            if before:
                yield before
            before, lines, length = "".join(lines), [], 0
        lines.append(line)
        length += len(line)
        was_blank = is_blank
    if before and length >= TXT_DOCUMENT:
        yield before
        before = ""
    yield before + "".join(lines)
