"""Where text comes from: files, folders of files, and the built-in corpus.

A source in a recipe is a path (or `stdlib:code`, `stdlib:prose`) with a weight; :func:`resolve_sources` checks that it
is there and lists its files, :func:`iterate_documents` reads them as a stream, one document at a time.

Files are read here and not through `datasets`, whose readers want rows of one shape: its JSON reader stops with a
CastError when a later row or file has another column, and counts rows of a malformed line from the start of a chunk.
Read line by line, a row may have any other columns, and an error names the file and the line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from llama_pro_fast.config import DataConfig, Source
from llama_pro_fast.data import stdlib
from llama_pro_fast.data.documents import Document
from llama_pro_fast.errors import UserError
from llama_pro_fast.files import check_regular

ENDINGS = (".jsonl", ".json", ".txt", ".parquet")
STDLIB = ("stdlib:code", "stdlib:prose")
TXT_DOCUMENT = 2**16
"""Characters from which on a .txt file is cut at the next paragraph. A file of books or of a whole corpus is then many
documents, which can be split into training and held-out text, each still longer than most sequences."""
TXT_LONGEST = 2**20
"""Characters after which one is cut at a line's end where there is no paragraph's, and longest stretch of a line."""
ROWS_TO_FIND_COLUMN = 100
"""Writers leave out empty fields, so a row without the text column is an empty document; a file whose first rows all
lack it has another column for its text."""


@dataclass(frozen=True, kw_only=True)
class ResolvedSource:
    """A source that exists.

    Attributes:
        name: how reports call it; unique among the sources of its role.
        path: as the user wrote it.
        role: ``domain`` or ``general``.
        weight: how often its training documents count in an epoch; 0 is only measured.
        text: column of the text in jsonl and parquet files.
        split: column whose value decides on which side of the split a row falls; None: its text does.
        kind: ``files``, ``stdlib:code`` or ``stdlib:prose``.
        files: (name relative to the source, path), sorted by name.
    """

    name: str
    path: str
    role: str
    weight: float
    text: str
    split: str | None
    kind: str
    files: tuple[tuple[str, Path], ...]


def resolve_sources(data: DataConfig, *, default_general: bool = True) -> list[ResolvedSource]:
    """The domain sources, then the general ones.

    Args:
        default_general: where the recipe names no general text, `stdlib:prose` is it, only measured.

    Raises:
        UserError: no domain; a path that does not exist or holds nothing that can be read; a bad weight; two sources
            of one name.
    """
    if not data.domain:
        raise UserError("no text to learn: give --data.domain a file, a folder or stdlib:code")
    sources = [_resolve(source, "domain", 1.0) for source in _listed(data.domain)]
    general = data.general or ("stdlib:prose" if default_general else [])
    sources += [_resolve(source, "general", 0.0) for source in _listed(general)]
    by_name: dict[tuple[str, str], ResolvedSource] = {}
    for source in sources:
        other = by_name.setdefault((source.role, source.name), source)
        if other is not source:
            raise UserError(
                f"two {source.role} sources are called {source.name!r} ({other.path} and {source.path}): "
                "give one of them another `name`"
            )
    return sources


def iterate_documents(source: ResolvedSource) -> Iterator[Document]:
    """Every document in the order of the files; a null or missing text comes as an empty document.

    Raises:
        UserError: a file cannot be read, or holds no text under the source's column.
    """
    if source.kind == "stdlib:code":
        yield from stdlib.code_documents(source.files)
    elif source.kind == "stdlib:prose":
        yield from stdlib.prose_documents(source.files)
    else:
        for _, path in source.files:
            yield from _READERS[path.suffix.lower()](path, source)


def _listed(sources: str | list[Source]) -> list[Source]:
    return [Source(path=sources)] if isinstance(sources, str) else sources


def _resolve(source: Source, role: str, default_weight: float) -> ResolvedSource:
    weight = default_weight if source.weight is None else source.weight
    if not 0 <= weight < float("inf"):
        raise UserError(
            f"{source.path}: weight {weight} is not a number from 0 up: 1 counts its documents once an epoch"
        )
    kind = source.path if source.path in STDLIB else "files"
    files = _folder_files(source.path) if kind == "files" else stdlib.stdlib_files(kind.removeprefix("stdlib:"))
    if not files:
        raise UserError(f"{source.path}: this Python has no sources of its standard library: give a path of text")
    name = source.name or (kind if kind != "files" else _name(Path(os.path.expanduser(source.path))))
    return ResolvedSource(
        name=name,
        path=source.path,
        role=role,
        weight=weight,
        text=source.text,
        split=source.split,
        kind=kind,
        files=tuple(files),
    )


def _folder_files(given: str) -> list[tuple[str, Path]]:
    path = Path(os.path.expanduser(given))
    if given.startswith("stdlib:"):
        raise UserError(f"{given}: no such built-in text: there are {' and '.join(STDLIB)}")
    if not os.path.exists(path):  # and not `path.exists()`, which fails on a name that is too long
        raise UserError(f"{given}: no such file or folder: give a {_endings()} file, a folder of them, or stdlib:code")
    check_regular(path)
    if not path.is_dir():
        if path.suffix.lower() not in ENDINGS:
            raise UserError(f"{given}: unknown ending {path.suffix!r}: text is read from {_endings()}")
        return [(path.name, path)]
    files = []
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            file = Path(folder, name)
            if file.suffix.lower() in ENDINGS and not name.startswith("."):
                check_regular(file)
                files.append((file.relative_to(path).as_posix(), file))
    if not files:
        raise UserError(f"{given}: the folder holds no file with text: put {_endings()} files in it")
    return sorted(files)


def _name(path: Path) -> str:
    path = Path(os.path.abspath(path))  # `.` and `..` have no name, and a link's own name means more than its target's
    return path.name if path.is_dir() else path.stem


def _endings() -> str:
    return ", ".join(ENDINGS[:-1]) + " or " + ENDINGS[-1]


def _read_txt(path: Path, source: ResolvedSource) -> Iterator[Document]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            try:
                # Without columns, the split of a file of several documents can only be the file itself.
                for text in _paragraphs(file):
                    yield Document(text, text if source.split is None else path.name)
            except UnicodeDecodeError as error:
                # What failed to decode is the last that was read: what was left of the bytes before, and a chunk.
                byte = file.buffer.tell() - len(error.object) + error.start
                raise UserError(f"{path}: not UTF-8 at byte {byte}: convert the file to UTF-8") from error
    except OSError as error:
        raise UserError(_cannot_read(path, error)) from error


def _paragraphs(file: TextIO) -> Iterator[str]:
    """The text in order and whole, in documents of whole paragraphs with at least ``TXT_DOCUMENT`` characters each.

    A paragraph ends with blank lines. Where none come before ``TXT_LONGEST`` characters a line's end will do, and a
    line longer than that is cut anywhere. What is left at the end and too short belongs to the document before it.
    """
    before, lines, length, was_blank = "", [], 0, False
    while line := file.readline(TXT_LONGEST):
        is_blank = line.isspace()
        if length >= TXT_DOCUMENT and ((was_blank and not is_blank) or length + len(line) > TXT_LONGEST):
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


def _read_jsonl(path: Path, source: ResolvedSource) -> Iterator[Document]:
    found, rows, columns, column = False, 0, {}, source.text
    for number, line in _lines(path):
        where = f"{path} line {number}"
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8: convert the file to UTF-8 or remove the line") from error
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(f"{where}: not JSON ({reason}): one object a line, mend or remove it") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: a {_kind(row)}, not an object: write one object a line, as {{{column!r}: …}}")
        rows += 1
        found = found or column in row
        if not found:
            columns.update(row)
            if rows == ROWS_TO_FIND_COLUMN:
                raise UserError(_no_column(path, column, columns))
        text = _checked(row.get(column), where, column)
        yield Document(text, _split_key(row, where, source.split) if source.split and text.strip() else text)
    if rows and not found:
        raise UserError(_no_column(path, column, columns))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number from 1 and content of every line that is not blank."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line := line.strip():
                    yield number, line
    except OSError as error:
        raise UserError(_cannot_read(path, error)) from error


def _read_parquet(path: Path, source: ResolvedSource) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row, column = 0, source.text
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                raise UserError(_no_column(path, column, schema.names))
            if source.split and source.split not in schema.names:
                raise UserError(_no_split_column(str(path), source.split, schema.names))
            kind = schema.field(column).type
            value = kind.value_type if pa.types.is_dictionary(kind) else kind
            # A list goes on to its first row: the error there can tell a chat from other lists.
            if str(value) not in _PARQUET_TEXT and not pa.types.is_list(value):
                raise UserError(_not_text(str(path), column, str(kind)))
            columns = list(dict.fromkeys((column, source.split or column)))
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for values in batch.to_pylist():
                    row += 1
                    where = f"{path} row {row}"
                    text = _checked(values[column], where, column)
                    yield Document(
                        text, _split_key(values, where, source.split) if source.split and text.strip() else text
                    )
    except UserError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or ["unknown"])[0]
        place = f" after row {row}" if row else ""
        raise UserError(f"{path}: cannot be read as parquet{place} ({reason}): write it again") from error


def _split_key(row: dict[str, Any], where: str, column: str) -> str:
    if column not in row:
        raise UserError(_no_split_column(where, column, row))
    value = row[column]
    if value is None or isinstance(value, (dict, list)):
        raise UserError(
            f"{where}: column {column!r}, by which the source is split, holds {_kind(value)}, no single value: {_SPLIT}"
        )
    # Half of a surrogate pair, which JSON can spell, has no bytes to hash.
    return str(value).encode(errors="backslashreplace").decode()


def _checked(value: Any, where: str, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        if isinstance(value, list) and value and isinstance(value[0], dict) and _CHAT_KEYS & value[0].keys():
            raise UserError(f"{where}: column {column!r} holds a chat, and {_CHAT}")
        raise UserError(_not_text(where, column, _kind(value)))
    # JSON can spell half of a surrogate pair ("\ud83d"), which no tokenizer can encode.
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: column {column!r} holds half of a surrogate pair at character {error.start}: mend or "
                "remove the row"
            ) from error
    return value


_PARQUET_TEXT = {"string", "large_string", "string_view", "null"}
_CHAT_KEYS = {"role", "content", "from", "value"}
_SPLIT = "name another column with `split:` of the source, or leave it out to split by the text"
_CHAT = "chat data is not supported yet: write each conversation as one string"


def _no_column(path: Path, column: str, columns: Iterable[str]) -> str:
    columns = sorted(columns)
    message = f"{path}: no column {column!r} among {', '.join(map(repr, columns)) or 'none'}: "
    if chats := {"messages", "conversations"} & set(columns):
        return message + f"{sorted(chats)[0]!r} looks like a chat, and {_CHAT}"
    return message + "name the column of the text with `text:` of the source"


def _no_split_column(where: str, column: str, columns: Iterable[str]) -> str:
    names = ", ".join(map(repr, sorted(columns)))
    return f"{where}: no column {column!r}, by which the source is split, among {names}: {_SPLIT}"


def _not_text(where: str, column: str, kind: str) -> str:
    return f"{where}: column {column!r} holds {kind}, not text: name another column with `text:` of the source"


def _cannot_read(path: Path, error: OSError) -> str:
    return f"{path}: cannot be read ({error.strerror or error}): check the file and its permissions"


def _kind(value: Any) -> str:
    return {dict: "object", list: "list", bool: "boolean", int: "number", float: "number"}.get(
        type(value), "null" if value is None else type(value).__name__
    )


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".json": _read_jsonl, ".parquet": _read_parquet}
