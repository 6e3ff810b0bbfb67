"""parquet and arrow: rows by their number, and mess costs no more than itself."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import arrow, items, parquet, shown, texts, write

from llama_pro_fast.text.documents import Document, Fault


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("write_table", [parquet, arrow])
def test_tables_of_every_kind_of_string(tmp_path, kind, write_table):
    table = pa.table({"body": pa.array(["ü", None, "b"]).cast(kind), "n": [1, 2, 3]})
    path = write_table(tmp_path / f"a.{write_table.__name__}", table)
    assert [(item.line, item.text) for item in items(path, text="body")] == [(1, "ü"), (2, ""), (3, "b")]


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_arrow_files_and_streams_of_many_batches(tmp_path, as_file, compression):
    found = [f"row {i}" for i in range(2500)]
    options = pa.ipc.IpcWriteOptions(compression=compression)
    path = arrow(tmp_path / "a.arrow", {"id": range(2500), "text": found}, as_file=as_file, rows=700, options=options)
    assert shown(path) == list(enumerate(found, start=1))


@pytest.mark.parametrize("as_file", [True, False])
def test_of_a_cut_arrow_file_the_batches_before_the_cut_are_read(tmp_path, as_file):
    path = arrow(tmp_path / "a.arrow", {"text": [f"row {i}" for i in range(3000)]}, as_file=as_file, rows=100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    *documents, fault = items(path)
    assert len(documents) in range(1500, 2101, 100)
    assert (fault.line, fault.reason) == (len(documents) + 1, "cut short")
    assert 0 <= fault.lost < path.stat().st_size / 10


def test_only_the_columns_that_are_needed_are_read(tmp_path):
    """The other one is broken, and nobody notices."""
    path = parquet(tmp_path / "a.parquet", {"text": ["a", "b"], "other": ["x" * 100] * 2}, compression="none")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"x" * 100, b"\xff" * 100))
    assert texts(path) == ["a", "b"]


def test_a_row_group_that_cannot_be_read_costs_itself(tmp_path):
    table = {"text": [f"row {i} {i * 7919 % 10007}" for i in range(400)]}
    path = parquet(tmp_path / "a.parquet", table, row_group_size=100, compression="zstd", use_dictionary=False)
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    begin = chunk.data_page_offset + 40
    data[begin : begin + 400] = b"\0" * 400
    path.write_bytes(data)
    found = items(path)
    faults = [item for item in found if isinstance(item, Fault)]
    assert [(fault.line, fault.reason) for fault in faults] == [(101, "row group cannot be read")]
    assert faults[0].lost == chunk.total_compressed_size
    kept = [*range(1, 101), *range(201, 401)]
    assert [item.line for item in found if isinstance(item, Document)] == kept


def test_bytes_that_are_no_utf8_cost_their_row(tmp_path):
    bad = pa.Array.from_buffers(
        pa.string(), 3, [*pa.array(["a", "bb", "c"]).buffers()[:2], pa.py_buffer(b"a\xff\xffc")]
    )
    for write_table in (parquet, arrow):
        path = write_table(tmp_path / f"a.{write_table.__name__}", pa.table({"text": bad}))
        assert shown(path) == [(1, "a"), (2, "not UTF-8"), (3, "c")]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz", "a.csv.zst"])
def test_a_table_or_archive_that_was_not_written_to_its_end_is_lost_and_no_more(tmp_path, name):
    write(tmp_path / "in" / f"0{name}", b"")
    whole = parquet(tmp_path / "whole.parquet", {"text": ["some text"] * 1000}).read_bytes()
    write(tmp_path / "in" / "1.parquet", whole[: len(whole) // 2])
    write(tmp_path / "in" / "2.jsonl", [{"text": "whole"}])
    assert shown(tmp_path / "in") == [(1, "cut short"), (1, "cut short"), (1, "whole")]
    assert items(tmp_path / "in")[1].lost == len(whole) // 2
