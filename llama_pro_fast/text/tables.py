"""Readers of parquet and arrow: only the columns that are needed, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llama_pro_fast.errors import UserError
from llama_pro_fast.files import first_line
from llama_pro_fast.text.documents import Document, Fault, SourceFile
from llama_pro_fast.text.places import OpenFile
from llama_pro_fast.text.rows import CHAT, Columns, not_text

BATCH_BYTES = 2**22
"""Bytes of rows that are made Python objects at once."""


def parquet_groups(file: SourceFile, column: str) -> list[tuple[int, int]]:
    """Of each row group the bytes on disk, and those of its text once it is unpacked; none where that is unknown."""
    import pyarrow.parquet as pq

    try:
        with OpenFile(file) as opened, pq.ParquetFile(opened.raw) as table:
            return [_group_sizes(table.metadata.row_group(group), column) for group in range(table.num_row_groups)]
    except Exception:  # whoever reads the file will say what is wrong with it
        return []


def _group_sizes(group: Any, column: str) -> tuple[int, int]:
    chunks = [group.column(index) for index in range(group.num_columns)]
    text = [chunk for chunk in chunks if chunk.path_in_schema == column]
    return sum(chunk.total_compressed_size for chunk in chunks), sum(c.total_uncompressed_size for c in text or chunks)


def read_parquet(file: OpenFile, columns: Columns, begin: int, end: int | None) -> Iterator[Document | Fault]:
    """The rows of the row groups from ``begin`` to before ``end``."""
    import pyarrow.parquet as pq

    try:
        # pre_buffer would hold whole columns of a row group.
        table = pq.ParquetFile(file.raw, pre_buffer=False, buffer_size=2**20)
    except Exception as error:
        yield Fault(1, "cut short" if not file.ends_with(b"PAR1") else "damaged", first_line(error), file.size)
        return
    with table:
        wanted = _wanted(table.schema_arrow, columns)
        for index in range(begin, table.num_row_groups if end is None else end):
            group = table.metadata.row_group(index)
            last = file.lines + group.num_rows
            size, unpacked = _group_sizes(group, columns.text)
            rows = min(1024, max(1, BATCH_BYTES * group.num_rows // max(unpacked, 1)))
            try:
                for batch in table.iter_batches(rows, row_groups=[index], columns=wanted, use_threads=False):
                    yield from _items(batch, columns, file)
            except UserError:
                raise
            except Exception as error:
                left = last - file.lines
                lost = size * left // max(group.num_rows, 1)
                yield Fault(file.lines + 1, "row group cannot be read", first_line(error), lost)
            file.lines = last


def read_arrow(file: OpenFile, columns: Columns) -> Iterator[Document | Fault]:
    """The rows of an IPC stream, or of an IPC file, which is a stream between two marks."""
    import pyarrow as pa

    if is_file := file.begins_with(b"ARROW1"):
        file.stream.read(8)
    good = 0
    try:
        stream = pa.ipc.open_stream(file.stream)
        names = _wanted(stream.schema, columns)
        while True:
            try:
                batch = stream.read_next_batch()
            except StopIteration:
                if is_file and not file.stream.peek(1):  # no footer: it ended between two batches
                    yield Fault(file.lines + 1, "cut short", "the file has no end")
                break
            good, batch = file.stream.tell(), batch.select(names)
            step = min(1024, max(1, BATCH_BYTES * batch.num_rows // max(batch.nbytes, 1)))
            for begin in range(0, batch.num_rows, step):
                yield from _items(batch.slice(begin, step), columns, file)
    except (pa.ArrowException, OSError) as error:
        is_short = not file.stream.peek(1)
        yield Fault(file.lines + 1, "cut short" if is_short else "damaged", first_line(error), file.size - good)


def _wanted(schema: Any, columns: Columns) -> list[str]:
    columns.check(schema.names)
    kind = schema.field(columns.text).type
    _check_text(columns.path, columns.text, kind)
    return list(dict.fromkeys(filter(None, (columns.text, columns.split_by))))


def _check_text(path: str, column: str, kind: Any) -> None:
    import pyarrow as pa

    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if str(value) in ("string", "large_string", "string_view", "null"):
        return
    if (pa.types.is_list(value) or pa.types.is_large_list(value)) and pa.types.is_struct(value.value_type):
        raise UserError(f"{path}: column {column!r} holds {kind}, which looks like chats, and {CHAT}")
    raise UserError(not_text(path, column, str(kind)))


def _items(batch: Any, columns: Columns, file: OpenFile) -> Iterator[Document | Fault]:
    for values in zip(*(_values(batch.column(name)) for name in batch.schema.names), strict=True):
        file.lines += 1
        if isinstance(values[0], UnicodeDecodeError):
            yield Fault(file.lines, "not UTF-8", f"byte {values[0].start + 1} of column {columns.text!r}")
        else:
            yield columns.item(dict(zip(batch.schema.names, values, strict=True)), file.lines)


def _values(column: Any) -> Sequence[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error
