"""Rows: what a row's columns make of it, whatever the format.

Files are read here and not through `datasets`, whose readers want rows of one shape: one more column in a later row,
or one broken line, ends them. Here a row may have any other columns, and one that cannot be read is a
:class:`Fault` with its line.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llama_pro_fast.errors import UserError
from llama_pro_fast.text.documents import Document, Fault

ROWS_TO_FIND_COLUMN = 100
"""Writers leave out empty fields, so a row without the text column is an empty document; a file whose first rows all
lack it has another column for its text."""


class Columns:
    """Makes documents of one file's rows.

    Attributes:
        bad_character: reason of a fault for half of a surrogate pair, which has no UTF-8 bytes: JSON can spell one
            (``\\ud83d``), and bytes that are no UTF-8 become some where they are decoded with `surrogateescape`.
    """

    def __init__(self, path: str, text: str, split_by: str | None, *, from_start: bool = True) -> None:
        """
        Args:
            path: of the file, for errors.
            from_start: the rows are the file's first ones; later ones do not show that a column is missing.
        """
        self.path, self.text, self.split_by, self.from_start = path, text, split_by, from_start
        self._missing = dict.fromkeys(filter(None, (text, split_by))) if from_start else {}
        self._seen: dict[str, None] = {}
        self._rows = 0
        self.bad_character = "half of a surrogate pair"
        self._found_text = False

    def item(self, row: Any, line: int) -> Document | Fault:
        """The document of a row, or what is wrong with it.

        Raises:
            UserError: the file has no such column, or holds chats.
        """
        if not isinstance(row, dict):
            return Fault(line, f"not an object but {kind(row)}")
        if self._missing:
            self._look(row)
        value = row.get(self.text)
        if not isinstance(value, str):
            if value is None:
                return Document("", "", line)
            if is_chat(value) and not self._found_text:
                raise UserError(f"{self.path} line {line}: column {self.text!r} holds a chat, and {CHAT}")
            return Fault(line, f"not text but {'a chat' if is_chat(value) else kind(value)}", f"column {self.text!r}")
        self._found_text = True
        if not value.isascii() and (place := bad_place(value)) is not None:
            return Fault(line, self.bad_character, f"column {self.text!r} at character {place + 1}")
        if self.split_by is None or not value.strip():
            return Document(value, value, line)
        return self._split(row, value, line)

    def _split(self, row: dict[str, Any], text: str, line: int) -> Document | Fault:
        value = row.get(self.split_by)
        if value is None or isinstance(value, (dict, list)):
            held = kind(value) if self.split_by in row else "nothing"
            return Fault(line, "no single value to split by", f"column {self.split_by!r} holds {held}")
        # Half of a surrogate pair, which JSON can spell, has no bytes to hash.
        return Document(text, str(value).encode(errors="backslashreplace").decode(), line)

    def _look(self, row: dict[str, Any]) -> None:
        self._rows += 1
        self._seen.update(dict.fromkeys(row))
        for column in self._missing.keys() & row.keys():
            del self._missing[column]
        if self._rows == ROWS_TO_FIND_COLUMN:
            self.check(self._seen)

    def check(self, columns: Iterable[str]) -> None:
        """Stop where a column that is needed is not among ``columns``."""
        for column in self._missing:
            if column not in columns:
                raise UserError((no_column if column == self.text else no_split_column)(self.path, column, columns))
        self._missing = {}

    def end(self) -> None:
        """Called after the last row: a short file shows a missing column too."""
        if self._rows:
            self.check(self._seen)


def bad_place(text: str) -> int | None:
    """Where a string has no UTF-8 bytes; None where it is whole."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


CHAT = "chat and instruction data is not supported yet: write each conversation as one string under one column"
_CHAT_KEYS = {"role", "content", "from", "value"}
_CHAT_COLUMNS = ({"messages"}, {"conversations"}, {"conversation"}, {"instruction", "output"}, {"prompt", "completion"})
_TEXT = (
    "name the column of the text with `text:` of the source (`[{path: FILE, text: COLUMN}]`), or keep this file out of "
    "it by a pattern (`folder/*.jsonl`)"
)
_SPLIT = "name another column with `split_by:` of the source, or leave it out to split by the text"


def is_chat(value: Any) -> bool:
    """Whether a value is a list of turns."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and len(_CHAT_KEYS & {*value[0]}) > 1


def kind(value: Any) -> str:
    """What JSON calls a value."""
    return {dict: "object", list: "list", bool: "boolean", int: "number", float: "number", str: "string"}.get(
        type(value), "null" if value is None else type(value).__name__
    )


def no_column(path: str, column: str, columns: Iterable[str]) -> str:
    columns = set(columns)
    message = f"{path}: no column {column!r} among {', '.join(map(repr, sorted(columns))) or 'none'}: "
    if chat := next((chat for chat in _CHAT_COLUMNS if chat <= columns), None):
        looks = f"{sorted(chat)[0]!r} looks" if len(chat) == 1 else " and ".join(map(repr, sorted(chat))) + " look"
        return message + f"{looks} like chat or instruction data, and {CHAT}"
    return message + _TEXT


def no_split_column(path: str, column: str, columns: Iterable[str]) -> str:
    names = ", ".join(map(repr, sorted(columns)))
    return f"{path}: no column {column!r}, by which the source is split, among {names}: {_SPLIT}"


def not_text(path: str, column: str, held: str) -> str:
    return f"{path}: column {column!r} holds {held}, not text: name another column with `text:` of the source"
