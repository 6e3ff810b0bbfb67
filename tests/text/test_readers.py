"""Readers: every format gives the same documents with their true lines, and mess costs no more than itself."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import compressed, items, refusal, resolved, shown, texts, write

from llama_pro_fast.text import csv_rows, json_rows, places
from llama_pro_fast.text.documents import Document
from llama_pro_fast.text.sources import iterate_documents

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
ROWS = st.lists(
    st.fixed_dictionaries({"text": st.none() | TEXT}, optional={"meta": st.lists(TEXT, max_size=2)}),
    min_size=1,
    max_size=8,
)
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
quick = settings(deadline=None, max_examples=40)


def expected(found: list[dict]) -> list[str]:
    return [row["text"] or "" for row in found]


# jsonl


def test_rows_may_differ_and_empty_ones_are_empty_documents(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        b'\xef\xbb\xbf{"id": 1}\n{"text": "one", "id": "x"}\n\n{"text": null}\r\n \t\n'
        + '{"text": "zwei ü 🦙\\n", "meta": {"k": []}}'.encode(),
    )
    assert shown(path) == [(1, ""), (2, "one"), (4, ""), (6, "zwei ü 🦙\n")]


def test_files_with_marks_that_were_joined_are_read(tmp_path):
    one = b'\xef\xbb\xbf{"text": "a"}\n'
    assert texts(write(tmp_path / "a.jsonl", one + one)) == ["a", "a"]
    assert texts(write(tmp_path / "a.json", one + one)) == ["a", "a"]


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        (b'{"text": "b"', "not JSON", "Expecting ',' delimiter at character 14"),
        (b'{"text": "b', "not JSON", "character 1"),
        (b"nonsense", "not JSON", "character 1"),
        (b"\0\0\0\0", "not JSON", "character 1"),
        (b"[" * 100_000, "not JSON", "recursion"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "not JSON", "4300"),
        (b'{"text": "\xff"}', "not UTF-8", "byte 11"),
        (b'{"text": "a", "other": "\xff"}', "not UTF-8", "byte 25"),
        (b'{"text": "half \\ud83d"}', "half of a surrogate pair", "column 'text' at character 6"),
        (b"[1, 2]", "not an object but list", ""),
        (b'"text"', "not an object but string", ""),
        (b"null", "not an object but null", ""),
        (b'{"text": 3}', "not text but number", "column 'text'"),
        (b'{"text": true}', "not text but boolean", "column 'text'"),
        (b'{"text": ["a"]}', "not text but list", "column 'text'"),
        (b'{"text": {"a": 1}}', "not text but object", "column 'text'"),
        (json.dumps({"text": CHAT}).encode(), "not text but a chat", "column 'text'"),
    ],
)
def test_a_bad_row_costs_itself_and_is_named(tmp_path, row, reason, detail):
    # In a .json file a list is an array of rows.
    for name in ("a.jsonl", "a.ndjson", *(() if row.startswith(b"[") else ("a.json",))):
        found = items(write(tmp_path / name, b'{"text": "a"}\n\n' + row + b'\n{"text": "c"}\n'))
        assert found[0] == Document("a", "a", 1)
        assert found[2:] == [Document("c", "c", 4)]
        assert (found[1].line, found[1].reason, found[1].lost) == (3, reason, 0)
        assert name == "a.json" or detail in found[1].detail


def test_the_first_row_may_be_the_bad_one(tmp_path):
    path = write(tmp_path / "a.jsonl", b'[1, 2]\n{"text": "b"}\n')
    assert shown(path) == [(1, "not an object but list"), (2, "b")]


@pytest.mark.parametrize("rows", ['[{"text": "a"}]\n', '[\n {"text": "a"}\n]', '\n[\n{"text": "a"}]'])
def test_an_array_called_jsonl_is_named(tmp_path, rows):
    assert "a.jsonl: begins with '[', a JSON array" in refusal(write(tmp_path / "a.jsonl", rows))
    assert texts(write(tmp_path / "a.json", rows)) == ["a"], "the remedy does not work"


# json


@quick
@given(ROWS, st.sampled_from([None, 0, 1, 4]), st.booleans(), st.integers(1, 40))
def test_an_array_is_read_however_it_is_written(tmp_path_factory, found, indent, ascii_only, buffer):
    path = tmp_path_factory.getbasetemp() / "array.json"
    write(path, json.dumps(found, indent=indent, ensure_ascii=ascii_only))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "BUFFER", buffer)
        assert shown(path) == list(enumerate(expected(found), start=1)) if any("text" in row for row in found) else True


@quick
@given(ROWS, st.sampled_from([None, 2]), st.integers(1, 40))
def test_objects_one_after_the_other_are_read_with_their_lines(tmp_path_factory, found, indent, buffer):
    path = tmp_path_factory.getbasetemp() / "lines.json"
    written = [json.dumps(row, indent=indent) for row in found]
    write(path, "\n\n".join(written) + "\n")
    lines = [1 + sum(before.count("\n") + 2 for before in written[:number]) for number in range(len(written))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "BUFFER", buffer)
        assert shown(path) == list(zip(lines, expected(found), strict=True))


@quick
@given(st.integers(0, 5), st.sampled_from(["x", "{", '"', "}", ",", ":"]), st.sampled_from([None, 1, 2]), st.data())
def test_a_broken_element_costs_itself_where_elements_begin_lines(tmp_path_factory, broken, wrong, indent, data):
    """Whatever character is put wherever in it: the elements before it are read, and those behind its neighbour."""
    path = tmp_path_factory.getbasetemp() / "broken.json"
    elements = [json.dumps({"text": f"text {i}", "meta": [{"k": i}, {"k": [{}]}]}, indent=indent) for i in range(6)]
    place = data.draw(st.integers(0, len(elements[broken])))
    elements[broken] = elements[broken][:place] + wrong + elements[broken][place:]
    write(path, "[\n" + ",\n".join(elements) + "\n]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "BUFFER", 10)
        read = [item.text for item in items(path) if isinstance(item, Document)]
    intact = [f"text {i}" for i in range(6) if i not in (broken, broken + 1)]
    assert [text for text in read if text in intact] == intact


@pytest.mark.parametrize(
    ("array", "found"),
    [
        ('[\n{"text": "a"},\n{"text": "b" "c"},\n{"text": "d"}\n]', [(1, "a"), (2, "not JSON"), (3, "d")]),
        ('[{"text": "a"}, {"text": "b"', [(1, "a"), (2, "not JSON")]),
        ('[{"text": "a"}, {"text": "b"}', [(1, "a"), (2, "b"), (2, "cut short")]),
        ('[{"text": "a"}, 3, ["b"]]', [(1, "a"), (2, "not an object but number"), (3, "not an object but list")]),
        ('[{"text": "a"}]\n[{"text": "b"}]\n', [(1, "a"), (2, "b")]),
        ('[{"text": "a"}]\nand more', [(1, "a"), (1, "not JSON")]),
        ("[]", []),
        ("", []),
        ("  \n ", []),
    ],
)
def test_what_is_wrong_in_an_array_is_said_with_the_number_of_its_element(tmp_path, array, found):
    assert shown(write(tmp_path / "a.json", array)) == found


def test_bytes_that_are_no_utf8_cost_their_element(tmp_path):
    path = write(
        tmp_path / "a.json", b'[{"text": "a"}, {"text": "\xff"}, {"text": "c", "n": "\xc3"}, {"text": "\xc3\xbc"}]'
    )
    assert shown(path) == [(1, "a"), (2, "not UTF-8"), (3, "not UTF-8"), (4, "ü")]


@pytest.mark.parametrize("buffer", [10, 1000, 2**18])
def test_a_broken_element_on_one_line_costs_itself_where_the_next_begins_like_the_last(tmp_path, monkeypatch, buffer):
    monkeypatch.setattr(json_rows, "BUFFER", buffer)
    found = [{"text": f"text {i}", "meta": [{"k": i}, {"k": {}}]} for i in range(1000)]
    path = write(tmp_path / "a.json", json.dumps(found).replace('"text 500"', '"text" 500'))
    assert shown(path) == [(i + 1, f"text {i}" if i != 500 else "not JSON") for i in range(1000)]


def test_what_is_lost_behind_a_broken_element_is_counted(tmp_path):
    array = '[{"text": "a"}, {"text": "b" "c"}' + " " * 5000 + "ü" * 5000
    first, fault = items(write(tmp_path / "a.json", array))
    assert first.text == "a"
    assert (fault.reason, fault.lost) == ("not JSON", len(array[16:].encode()))


def test_an_array_is_not_read_whole(tmp_path):
    path = write(tmp_path / "a.json", json.dumps([{"text": "some words " * 20}] * 40_000))
    (tmp_path / "b.json").write_text("[nonsense " + "some words " * 800_000)  # a broken element that never ends
    for file in (path, tmp_path / "b.json"):
        source = resolved(file)
        tracemalloc.start()
        number = sum(1 for _ in iterate_documents(source))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < path.stat().st_size / 4
    assert number == 0


# csv and tsv


@quick
@given(
    st.lists(TEXT, min_size=1, max_size=8), st.sampled_from([("csv", ","), ("csv", ";"), ("tsv", "\t")]), st.booleans()
)
def test_what_a_csv_writer_writes_is_read(tmp_path_factory, found, kind, quote_all):
    ending, delimiter = kind
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter, quoting=csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL)
    writer.writerow(["id", "text"])
    lines = []
    for text in found:
        lines.append(len(buffer.getvalue().replace("\r\n", "\n").replace("\r", "\n").split("\n")))
        writer.writerow(["1", text])
    path = write(tmp_path_factory.getbasetemp() / f"a.{ending}", buffer.getvalue())
    assert shown(path) == list(zip(lines, found, strict=True))


def test_a_csv_file_keeps_its_lines_through_mess(tmp_path):
    path = write(
        tmp_path / "a.csv",
        b'\xef\xbb\xbfid,text\n1,"a\nb"\n\n3,d,e\n4\n5,"x" y\n6,\xff\n7,"say ""hi"""\n8,ok\n9,"never closed\n10,last\n',
    )
    assert shown(path) == [
        (2, "a\nb"),
        (5, "too many fields"),
        (6, "too few fields"),
        (7, "not CSV"),
        (8, "not UTF-8"),
        (9, 'say "hi"'),
        (10, "ok"),
        (11, "not CSV"),
        (12, "last"),
    ]


@pytest.mark.parametrize("behind", ["", '"quoted"\n', '"over\ntwo lines"\n'])
def test_a_quote_that_nobody_closes_costs_its_line(tmp_path, behind):
    rows = [f"{i},row {i}\n" for i in range(3000)]
    rows[10] = '10,"open\n'
    rows[20] = '20,"and "again\n'
    path = write(tmp_path / "a.csv", "id,text\n" + "".join(rows) + (f"3000,{behind}" if behind else ""))
    found = shown(path)
    expected = [(i + 2, f"row {i}") for i in range(3000) if i not in (10, 20)]
    assert [(line, text) for line, text in found if text.startswith("row ")] == expected
    assert {(12, "not CSV"), (22, "not CSV")} <= set(found)
    assert found[-1][1] == (behind.strip().strip('"') or "row 2999")


def test_what_is_behind_an_open_quote_and_too_long_to_be_read_again_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_rows, "READ_AGAIN", 1000)
    behind = '1,"open\n' + "2,row\n" * 1000
    path = write(tmp_path / "a.csv", "id,text\n0,first\n" + behind)
    assert shown(path) == [(2, "first"), (3, "not CSV")]
    assert items(path)[-1].lost == len(behind)


def test_a_csv_field_may_be_long_and_lines_may_end_in_any_way(tmp_path):
    assert texts(write(tmp_path / "a.csv", f"text\n{'x' * 1_000_000}\n")) == ["x" * 1_000_000]
    assert texts(write(tmp_path / "b.csv", b"id,text\r1,a\r2,b\r")) == ["a", "b"]
    assert texts(write(tmp_path / "c.csv", b"")) == []
    assert shown(write(tmp_path / "d.csv", b"\n \nid;text\n1;a, b\n")) == [(4, "a, b")]


def test_a_csv_without_the_column_is_refused_by_its_header(tmp_path):
    assert "no column 'text' among 'body', 'id'" in refusal(write(tmp_path / "a.csv", "id,body\n1,a\n"))
    assert texts(tmp_path / "a.csv", text="body") == ["a"]
    assert "no column 'repo', by which" in refusal(tmp_path / "a.csv", text="body", split_by="repo")


# Compression


@quick
@given(st.sampled_from(["gz", "zst", "bz2", "xz"]), st.lists(ROWS, min_size=1, max_size=3))
def test_a_compressed_file_is_read_like_the_file_itself_of_several_parts_too(tmp_path_factory, ending, parts):
    folder = tmp_path_factory.getbasetemp()
    plain_rows = ["".join(json.dumps(row) + "\n" for row in part).encode() for part in parts]
    path = write(folder / f"a.jsonl.{ending}", b"".join(compressed(part, ending) for part in plain_rows))
    assert items(path) == items(write(folder / "a.jsonl", b"".join(plain_rows)))


@quick
@given(st.sampled_from(["gz", "zst", "bz2", "xz"]), st.sampled_from(["jsonl", "csv", "json"]), st.floats(0, 1))
def test_of_a_cut_archive_what_could_be_read_is_kept_and_the_cut_is_said(tmp_path_factory, ending, kind, share):
    found = [f"text {i} {i * 7919 % 10007}" for i in range(60)]
    data = (
        "".join(json.dumps({"text": text}) + "\n" for text in found)
        if kind != "csv"
        else "\n".join(["text", *found, ""])
    )
    parts = [data[: len(data) // 2].encode(), data[len(data) // 2 :].encode()]
    whole = b"".join(compressed(part, ending) for part in parts)
    first = len(compressed(parts[0], ending))
    cut = first + max(7, int(share * (len(whole) - first - 1)))
    path = write(tmp_path_factory.getbasetemp() / f"cut.{kind}.{ending}", whole[:cut])
    *documents, fault = items(path)
    assert [document.text for document in documents] == found[: len(documents)]
    assert len(documents) >= 29, "the first part is whole"
    assert (fault.reason, fault.line) == ("cut short", len(documents) + 1 + (kind == "csv"))
    assert 0 <= fault.lost <= cut


def test_a_damaged_archive_loses_what_lies_behind_the_damage(tmp_path):
    rows = ({"text": f"{i} " + " ".join(str(i * 7919 * k % 10007) for k in range(50))} for i in range(2000))
    data = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    half = len(data) // 2
    broken = data[:half] + b"\xff" * 100 + data[half + 100 :]
    *documents, fault = items(write(tmp_path / "a.jsonl.gz", broken))
    assert 900 < len([item for item in documents if isinstance(item, Document)]) < 2000
    assert fault.reason == "damaged"
    assert 0 < fault.lost < 0.6 * len(data)
    broken = data[:-8] + b"\0" * 8  # the checksum
    *documents, fault = items(write(tmp_path / "b.jsonl.gz", broken))
    assert len(documents) == 2000
    assert (fault.reason, fault.lost) == ("damaged", len(data)), "nobody knows which of them are good"


def test_a_cut_text_is_kept_up_to_the_cut(tmp_path):
    text = "".join(f"line {number}\n" for number in range(10_000))
    data = gzip.compress(text.encode())
    document, fault = items(write(tmp_path / "a.txt.gz", data[: len(data) * 9 // 10]))
    assert text.startswith(document.text)
    assert len(document.text) > len(text) // 2
    assert fault.reason == "cut short"


def test_a_buffer_ends_anywhere(tmp_path, monkeypatch):
    found = [{"text": f"🦙 {i} ü"} for i in range(50)]
    write(tmp_path / "a.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))
    write(tmp_path / "b.csv", "text\n" + "".join(f'"{row["text"]}"\n' for row in found))
    for buffer in range(1, 40):
        monkeypatch.setattr(places, "BUFFER", buffer)
        assert texts(tmp_path / "a.jsonl") == texts(tmp_path / "b.csv") == expected(found)
