"""Readers of jsonl and json: rows one at a time, and behind a broken one the next."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from llama_pro_fast.errors import UserError
from llama_pro_fast.text.documents import Document, Fault
from llama_pro_fast.text.places import BUFFER, OpenFile, lines_of
from llama_pro_fast.text.rows import Columns, bad_place

BOM = b"\xef\xbb\xbf"


def read_jsonl(file: OpenFile, columns: Columns, end: int | None = None) -> Iterator[Document | Fault]:
    """One object a line; blank lines are passed over."""
    is_first = columns.from_start
    for number, line in enumerate(lines_of(file, end), start=1):
        if file.is_cut and not line.endswith(b"\n"):
            break  # the half that is left of a row
        file.lines = number
        if line.isspace():
            continue
        if is_first:
            _refuse_array(file, line)
            is_first = False
        try:
            row = json.loads(line.removeprefix(BOM).decode())
        except UnicodeDecodeError as error:
            yield Fault(number, "not UTF-8", f"byte {error.start + 1}")
        except (ValueError, RecursionError) as error:
            yield _not_json(error, number)
        else:
            del line  # a row of 100 MB: the text is a copy by now
            yield columns.item(row, number)
    columns.end()


def _refuse_array(file: OpenFile, line: bytes) -> None:
    if re.match(rb"\s*\[\s*(\{|$)", line.removeprefix(BOM)[:1000]):
        raise UserError(f"{file.path}: begins with '[', a JSON array and not one object a line: name it .json")


def _not_json(error: BaseException, line: int) -> Fault:
    if isinstance(error, json.JSONDecodeError):
        place = f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
    else:
        place = str(error)
    return Fault(line, "not JSON", place)


def read_json(file: OpenFile, columns: Columns) -> Iterator[Document | Fault]:
    """An array of objects, over any lines, whose documents have the number of their element; or objects one after the
    other, as one a line, which have their line.

    The text is decoded as far as one element needs it. A broken element is left out up to the next line that begins
    an object.
    """
    text = _Window(file.stream)
    in_array, elements, is_whole = False, 0, True
    while found := text.next():
        if found == ("]" if in_array else "["):
            in_array = not in_array
            text.pass_bracket()
            continue
        elements += in_array
        number = elements or text.line
        try:
            row, is_good = text.element()
        except (ValueError, RecursionError) as error:
            if file.is_cut and text.is_last:
                break  # what is left of an element
            file.lines, lost = number, text.skip_to_object()
            yield _not_json(error, number)._replace(lost=lost)
            in_array, is_whole = in_array and not lost, False
        else:
            file.lines = number
            yield columns.item(row, number) if is_good else Fault(number, "not UTF-8")
            del row
    if in_array and not file.is_cut:
        yield Fault(elements, "cut short", "the array has no end")
    if is_whole:  # else an object inside a broken element may have been taken for a row
        columns.end()


class _Window:
    """A stretch of a text of JSON values, moved along as they are read."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text, self._counted, self._lines = "", 0, 1
        # What stands between the begin of a line and the value; None where the value begins no line.
        self._indent: str | None = None
        self._first_indent: str | None = None
        self._good: tuple[str | None, str] | None = None  # of the first whole object, and how that begins
        self.position = 0
        self._is_begun = False
        self.is_last = False  # nothing comes after the text in sight

    @property
    def line(self) -> int:
        """Of the position, from 1."""
        self._lines += self._text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._lines

    def next(self) -> str:
        """Move to the first character of the next value, and return it; empty at the end."""
        space = "" if self._is_begun else "\n"
        self._is_begun = True
        while True:
            between = _BETWEEN.match(self._text, self.position)
            space += between[0]
            self.position = between.end()
            if self.position < len(self._text):
                self._indent = space.rpartition("\n")[2] if "\n" in space else None
                if self._first_indent is None:
                    self._first_indent = self._indent
                return self._text[self.position]
            if not self._more():
                return ""

    def pass_bracket(self) -> None:
        """Move behind the begin or the end of an array."""
        self.position += 1
        self._first_indent = None

    def element(self) -> tuple[Any, bool]:
        """The value at the position, and whether its bytes were UTF-8; moves behind it.

        Raises:
            ValueError, RecursionError: it is no JSON.
        """
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self.position)
            except json.JSONDecodeError as error:
                may_go_on = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - LONGEST_WORD
                if not may_go_on or not self._more():
                    error.pos -= self.position
                    raise
                continue
            if end < len(self._text) or isinstance(value, (dict, list, str)) or not self._more():
                break
        source_is_good = self._text.isascii() or bad_place(self._text[self.position : end]) is None
        if isinstance(value, dict) and self._good is None:
            self._good = self._indent, _KEY.match(self._text, self.position)[0]
        self.position = end
        return value, source_is_good

    def skip_to_object(self) -> int:
        """Move behind a broken element: to the next line that begins an object, as far to the right as the first whole
        one, if that began a line; else to what begins as that one does.

        Returns:
            Bytes passed over, if there was nothing of the kind.
        """
        here = _KEY.match(self._text, self.position)
        indent, beginning = self._good or (self._first_indent, here[0] if here else "{")
        if indent is not None:
            begin = re.compile(rf"\n{re.escape(indent)}(?:, ?)?(?=\{{)")
        else:
            begin = re.compile(rf"(?:\n[ \t]*,?[ \t]*|\}}\s*,\s*)(?={re.escape(beginning)})")
        lost = 0
        while not (found := begin.search(self._text, self.position)):
            # A piece of the beginning may be here, and the rest not yet.
            cut = max(self.position, len(self._text) - 2**10)
            lost += len(self._text[self.position : cut].encode(errors="surrogateescape"))
            self.position = cut
            if not self._more():
                self.position = len(self._text)
                return lost + len(self._text.encode(errors="surrogateescape"))
        # In front of the space, by which the value is known to begin a line.
        self.position = found.end() if indent is None else found.start()
        return 0

    def _more(self) -> bool:
        """Drop what lies before the position, and read as much as is left: reading on is linear in all."""
        _ = self.line
        self._text = self._text[self.position :]
        self.position = self._counted = 0
        data = self._stream.read(max(BUFFER, len(self._text)))
        self._text += self._decoder.decode(data, final=not data)
        self.is_last = not data
        return bool(data)


_KEY = re.compile(r'\{(?:\s*"[^"\\]{0,100}")?')
_DECODER = json.JSONDecoder()
_BETWEEN = re.compile(r"[\s,\ufeff]*")
LONGEST_WORD = 12
"""Characters that make no sense before the last of them is there: ``-Infinity``, ``\\ud83d``."""
