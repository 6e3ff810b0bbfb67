"""Units: the pieces hold every row exactly once, in order, and a change alters only the pieces it lies in."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import resolved, write

from llama_pro_fast.text import stdlib, units
from llama_pro_fast.text.documents import Document, SourceFile, Unit
from llama_pro_fast.text.sources import ResolvedSource, iterate_documents
from llama_pro_fast.text.units import read_unit, units_of

LINE = st.sampled_from(
    [b"", b"\n", b'{"text": "a"}\n', b'{"text": "bb", "x": 1}\n', b"broken\n", b" \n", b'{"text": "c"}\r\n']
)


def read(source: ResolvedSource):
    """What the units give, with lines counted over all units of a file; and the lines of each file."""
    found, lines = [], {}
    for unit in units_of(source):
        reading = read_unit(unit)
        for index, item in reading:
            name = unit.files[index].name
            found.append((name, item._replace(line=lines.get(name, 0) + item.line)))
        for file, count in zip(unit.files, reading.lines, strict=True):
            lines[file.name] = lines.get(file.name, 0) + count
    return found, lines


@settings(deadline=None, max_examples=80)
@given(st.lists(LINE, max_size=12), st.binary(max_size=6).map(lambda tail: b"x" + tail), st.integers(1, 40))
def test_stretches_of_a_jsonl_file_hold_each_line_once(tmp_path_factory, lines, tail, size):
    source = resolved(write(tmp_path_factory.getbasetemp() / "a.jsonl", b"".join(lines) + tail))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "PACKED", 10**9)  # even the smallest file may be divided
        whole = read(source)
        patch.setattr(units, "UNIT_BYTES", size)
        assert len(units_of(source)) >= source.files[0].size // size
        assert read(source) == whole
        assert sum(unit.size for unit in units_of(source)) == source.files[0].size


@pytest.mark.parametrize("size", [1, 13, 14, 15, 28, 100, 10_000])
def test_a_long_line_belongs_to_the_unit_it_begins_in(tmp_path, monkeypatch, size):
    rows = [{"text": "a"}, {"text": "x" * 5000}, {"text": "b"}]
    source = resolved(write(tmp_path / "a.jsonl", rows))
    monkeypatch.setattr(units, "UNIT_BYTES", size)
    found = [(d.line, d.text) for d in iterate_documents(source)]
    assert found == [(number, row["text"]) for number, row in enumerate(rows, start=1)]


@pytest.mark.parametrize("rows", [7, 100])
def test_row_groups_of_a_large_parquet_file_are_units(tmp_path, monkeypatch, rows):
    table = pa.table({"text": [f"row {i}" for i in range(1000)], "other": ["x" * 100] * 1000})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=rows)
    source = resolved(tmp_path / "a.parquet")
    assert len(units_of(source)) == 1
    monkeypatch.setattr(units, "UNIT_BYTES", 3000)
    pieces = units_of(source)
    assert [piece.begin for piece in pieces] == [0, *(piece.end for piece in pieces[:-1])]
    assert pieces[-1].end == -(-1000 // rows)
    assert len(pieces) > 3
    assert all(0 < piece.size <= source.files[0].size for piece in pieces)
    assert [(d.line, d.text) for d in iterate_documents(source)] == [(i + 1, f"row {i}") for i in range(1000)]


def source_of(files: list[SourceFile]) -> ResolvedSource:
    return ResolvedSource(
        name="a", path="a", role="domain", weight=1.0, text="text", split_by=None, kind="files", files=tuple(files)
    )


def file(number: int, size: int = 5000, stamp: str = "1") -> SourceFile:
    return SourceFile(f"folder/{number:06}.py", f"/x/{number}", size, stamp)


def test_ten_thousand_small_files_are_few_units_and_each_is_in_one():
    files = [file(number, number % 9000) for number in range(10_000)]
    pieces = units_of(source_of(files))
    assert [one for piece in pieces for one in piece.files] == files
    assert 4 <= len(pieces) <= 40
    assert all(piece.size <= units.UNIT_BYTES for piece in pieces)
    assert len(units_of(source_of([file(number, 0) for number in range(30_000)]))) < 80


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 2999), st.sampled_from(["removed", "changed", "added", "grown"]))
def test_one_file_more_less_or_changed_alters_its_own_group(number, what):
    files = [file(2 * number, 20_000) for number in range(3000)]
    before = set(units_of(source_of(files)))
    if what == "removed":
        del files[number]
    elif what == "added":
        files.insert(number + 1, file(2 * number + 1, 20_000))
    else:
        files[number] = file(2 * number, 20_000 if what == "changed" else 8_000_000, "2")
    after = set(units_of(source_of(files)))
    assert before != after
    assert len(before) > 8
    assert len(after - before) <= 3
    assert len(before - after) <= 3


def test_no_unit_of_small_files_is_much_larger_than_the_others():
    pieces = units_of(source_of([file(number, 10_000_000) for number in range(50)]))
    assert max(piece.size for piece in pieces) <= units.UNIT_BYTES
    packed = [SourceFile(f"{number}.jsonl.gz", "x", 20_000_000, "") for number in range(5)]
    assert [len(piece.files) for piece in units_of(source_of(packed))] == [1] * 5


def test_a_unit_is_json_and_comes_back(tmp_path):
    source = resolved(write(tmp_path / "a.jsonl", [{"body": "x", "id": 1}]), text="body", split_by="id")
    (unit,) = units_of(source)
    again = Unit.from_dict(json.loads(json.dumps(unit.as_dict())))
    assert again == unit
    assert [item for _, item in read_unit(again)] == [Document("x", "1", 1)]


@pytest.mark.parametrize("kind", ["code", "prose"])
def test_the_built_in_text_is_read_in_units_too(kind):
    source = resolved(f"stdlib:{kind}")
    files = source.files[:25]
    found = [
        (unit.files[index].name, item)
        for unit in units_of(source_of(files).__class__(**vars(source) | {"files": files}))
        for index, item in read_unit(unit)
    ]
    make = {"code": stdlib.code_documents, "prose": stdlib.prose_documents}[kind]
    assert found == [(one.name, document) for one in files for document in make([(one.name, one.path)])]
    assert len(found) > 10
