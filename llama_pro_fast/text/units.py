"""The work in pieces: which files, or which stretch of one, a process reads at once; and the reading of a piece."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

from llama_pro_fast.text import stdlib
from llama_pro_fast.text.csv_rows import read_csv
from llama_pro_fast.text.documents import Document, Fault, SourceFile, Unit
from llama_pro_fast.text.folders import format_of, split_compression
from llama_pro_fast.text.json_rows import read_json, read_jsonl
from llama_pro_fast.text.marks import check_beginning
from llama_pro_fast.text.places import OpenFile, why
from llama_pro_fast.text.plain import read_code, read_txt
from llama_pro_fast.text.rows import Columns
from llama_pro_fast.text.tables import parquet_groups, read_arrow, read_parquet

if TYPE_CHECKING:
    from llama_pro_fast.text.sources import ResolvedSource

UNIT_BYTES = 2**25
"""Text of a unit, where its format can be divided: a few seconds of tokenising."""
FILE_COST = 2**12
"""Bytes that opening a file counts for, so that a unit does not have a million empty ones."""
PACKED = 4
"""Bytes of text that a compressed byte counts for."""


def units_of(source: ResolvedSource) -> list[Unit]:
    """The source in pieces, in the order of its files; units of one file follow each other.

    Small files are grouped. A group ends after a file whose name's hash says so, the more likely the larger the file,
    so a file that is added, removed or changed alters its own group and none behind it.
    """
    whole = Unit(kind=source.kind, files=(), size=0, text=source.text, split_by=source.split_by)
    units: list[Unit] = []
    group: list[SourceFile] = []
    weight = 0

    def end_group() -> None:
        nonlocal weight
        if group:
            units.append(replace(whole, files=tuple(group), size=sum(file.size for file in group)))
        group.clear()
        weight = 0

    for file in source.files:
        if stretches := _stretches(file, source):
            end_group()
            units += [replace(whole, files=(file,), begin=begin, end=end, size=size) for begin, end, size in stretches]
            continue
        cost = FILE_COST + file.size * (PACKED if _is_packed(file) else 1)
        if weight + cost > UNIT_BYTES:
            end_group()
        group.append(file)
        weight += cost
        if _hash(file.name) * UNIT_BYTES < 4 * cost:
            end_group()
    end_group()
    return units


def _stretches(file: SourceFile, source: ResolvedSource) -> list[tuple[int, int, int]]:
    """(begin, end, bytes on disk) of the stretches of a large file that can be divided; none for any other."""
    if source.kind != "files" or file.size * PACKED <= UNIT_BYTES:
        return []
    known = format_of(file.name)
    if known == "jsonl" and not _is_packed(file) and file.size > UNIT_BYTES:
        begins = range(0, file.size, UNIT_BYTES)
        return [(begin, min(begin + UNIT_BYTES, file.size), min(UNIT_BYTES, file.size - begin)) for begin in begins]
    if known == "parquet":
        stretches, begin, size, text = [], 0, 0, 0
        groups = parquet_groups(file, source.text)
        for index, (on_disk, unpacked) in enumerate(groups):
            if text and text + unpacked > UNIT_BYTES:
                stretches.append((begin, index, size))
                begin, size, text = index, 0, 0
            size, text = size + on_disk, text + unpacked
        return [*stretches, (begin, len(groups), size)] if stretches else []
    return []


def _is_packed(file: SourceFile) -> bool:
    return bool(split_compression(file.name)[1]) or format_of(file.name) == "parquet"


def _hash(name: str) -> float:
    """From 0 to below 1."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "big") / 2**64


class Reading:
    """A unit's documents, and what could not be read, each with the index of its file in the unit. Iterated once.

    Attributes:
        lines: after the iteration, of each file the physical lines (rows, elements) there were. Where a unit begins
            inside a file its documents' lines are counted from there: those of the units before come on top.

    Raises:
        UserError: (while iterating) a file is nothing that can be read as this source's text.
    """

    def __init__(self, unit: Unit, mark: str | None) -> None:
        self._unit, self._mark = unit, mark
        self.lines: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, Document | Fault]]:
        for index, file in enumerate(self._unit.files):
            self.lines.append(0)
            yield from zip(repeat(index), self._items(file))

    def _items(self, file: SourceFile) -> Iterator[Document | Fault]:
        if self._unit.kind != "files":
            read = stdlib.code_documents if self._unit.kind == "stdlib:code" else stdlib.prose_documents
            try:
                yield from read([(file.name, Path(file.path))])
            except OSError as error:
                yield Fault(1, "gone", why(error), file.size)
            return
        try:
            opened = OpenFile(file, 0 if format_of(file.name) == "parquet" else max(0, self._unit.begin - 1))
        except Exception as error:  # of the file system, or of a protocol
            yield Fault(1, "gone", why(error), file.size)
            return
        with opened:
            yield from _documents(opened, self._unit, self._mark)
            if (fault := opened.fault()) is not None:
                yield fault
            self.lines[-1] = opened.lines


def read_unit(unit: Unit, mark: str | None = None) -> Reading:
    """The unit's documents and faults: iterate it, then look at its ``lines``.

    Args:
        mark: the name of EOS; plain text that spells it is cut there.
    """
    return Reading(unit, mark)


def _documents(file: OpenFile, unit: Unit, mark: str | None) -> Iterator[Document | Fault]:
    known, begin, end = format_of(file.name), unit.begin, unit.end
    if not begin and (fault := check_beginning(file, known)) is not None:
        yield fault
        return
    columns = Columns(file.path, unit.text, unit.split_by, from_start=not begin)
    match known:
        case "jsonl":
            if begin:
                begin = _next_line(file, begin - 1, end)
            yield from read_jsonl(file, columns, None if end is None else end - begin)
        case "json":
            yield from read_json(file, columns)
        case "csv":
            yield from read_csv(file, columns)
        case "tsv":
            yield from read_csv(file, columns, delimiters="\t,;")
        case "parquet":
            yield from read_parquet(file, columns, begin, end)
        case "arrow":
            yield from read_arrow(file, columns)
        case "txt":
            yield from read_txt(file, unit.split_by, mark)
        case "code":
            yield from read_code(file, unit.split_by)


def _next_line(file: OpenFile, position: int, end: int | None) -> int:
    """Pass over the rest of a line, and return where the next one begins; not much behind ``end``."""
    while piece := file.stream.readline(2**20):
        position += len(piece)
        if piece.endswith(b"\n") or (end is not None and position >= end):
            break
    return position
