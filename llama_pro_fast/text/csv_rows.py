"""The reader of csv and tsv."""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Iterator

from llama_pro_fast.text.documents import Document, Fault
from llama_pro_fast.text.places import OpenFile
from llama_pro_fast.text.rows import Columns

LONGEST_FIELD = 2**28
"""Characters of a csv field. A quote that nobody closes would otherwise take the rest of the file into memory."""
READ_AGAIN = 2**26
"""Bytes of a csv file that are read a second time at most, behind quotes that nobody closes."""


def read_csv(file: OpenFile, columns: Columns, *, delimiters: str = ",;\t") -> Iterator[Document | Fault]:
    """A header with the names of the columns, then a row each, over one line or several.

    The fields are divided by what stands in the header most often, comma, semicolon or tab; the first of equals.
    """
    csv.field_size_limit(LONGEST_FIELD)
    columns.bad_character = "not UTF-8"
    text = io.TextIOWrapper(file.stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    lines = _Lines(text)
    delimiter = max(delimiters, key=lines.peek().count)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        lines.begin_row()
        begin = lines.number + 1
        try:
            fields = next(rows, None)
        except csv.Error as error:
            lost = lines.lose_row()
            file.lines = lines.number
            yield Fault(begin, "not CSV", str(error), lost)
            continue
        if fields is None or (file.is_cut and not lines.last.endswith(("\n", "\r"))):
            break  # the end, or the half that is left of a row
        file.lines = lines.number
        if not fields or (names is None and not "".join(fields).strip()):
            continue
        if names is None:
            names = [name.strip() for name in fields]
            columns.check(names)
        elif len(fields) > len(names):
            yield Fault(begin, "too many fields", f"{len(fields)}, the header has {len(names)}")
        elif len(fields) < len(names) and columns.text not in names[: len(fields)]:
            yield Fault(begin, "too few fields", f"{len(fields)}, the header has {len(names)}")
        else:
            yield columns.item(dict(zip(names, fields, strict=False)), begin)
    text.detach()


class _Lines:
    """Lines of a csv text, counted, of which some can be had again: a quote that nobody closes takes all behind it.

    Attributes:
        number: of the last line given, from 1.
        last: that line.
    """

    def __init__(self, lines: io.TextIOWrapper) -> None:
        self.number, self.last = 0, ""
        self._lines, self._ahead = lines, deque[str]()
        self._row: list[str] = []
        self._length, self._again = 0, READ_AGAIN

    def peek(self) -> str:
        """The first line that is not blank, which is still to come."""
        while line := self._lines.readline():
            self._ahead.append(line)
            if not line.isspace():
                break
        return line

    def begin_row(self) -> None:
        self._row, self._length = [], 0

    def lose_row(self) -> int:
        """Leave out the first line of the row and give the others again; return the bytes lost if they are too many."""
        if self._length > self._again:
            return self._length
        self._again -= self._length
        self._ahead.extendleft(reversed(self._row[1:]))
        self.number -= len(self._row) - 1
        return 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._ahead.popleft() if self._ahead else self._lines.readline()
        if not line:
            raise StopIteration
        self.number, self.last = self.number + 1, line
        self._length += len(line) if line.isascii() else len(line.encode(errors="surrogateescape"))
        if self._length <= self._again:
            self._row.append(line)
        return line
