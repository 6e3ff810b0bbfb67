"""Sources as tests write and read them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llama_pro_fast.config import DataConfig, Source
from llama_pro_fast.errors import UserError
from llama_pro_fast.text.documents import Document, Fault
from llama_pro_fast.text.sources import ResolvedSource, resolve_sources
from llama_pro_fast.text.units import read_unit, units_of


def write(path: Path, content: str | bytes | list) -> Path:
    """Write text, bytes, or rows as jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parquet(path: Path, table: pa.Table | dict, **options) -> Path:
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path, **options)
    return path


def arrow(path: Path, table: pa.Table | dict, *, as_file: bool = False, rows: int = 1000, **options) -> Path:
    table = table if isinstance(table, pa.Table) else pa.table(table)
    new = pa.ipc.new_file if as_file else pa.ipc.new_stream
    with new(str(path), table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def compressed(data: bytes, ending: str) -> bytes:
    whole = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    return whole[ending](data) if ending in whole else pa.compress(data, "zstd", asbytes=True)


def resolved(path, **settings) -> ResolvedSource:
    return resolve_sources(DataConfig(domain=[Source(path=str(path), **settings)]), default_general=False)[0]


def items(path, **settings) -> list[Document | Fault]:
    """All that a source's units give."""
    return [item for unit in units_of(resolved(path, **settings)) for _, item in read_unit(unit)]


def texts(path, **settings) -> list[str]:
    """The texts of a source in which nothing is wrong."""
    found = items(path, **settings)
    assert all(isinstance(item, Document) for item in found), found
    return [item.text for item in found]


def shown(path, **settings) -> list[tuple[int, str]]:
    """(line, text or reason) of everything in a source."""
    return [(item.line, item.text if isinstance(item, Document) else item.reason) for item in items(path, **settings)]


def refusal(path, **settings) -> str:
    """The one line a source is refused with."""
    with pytest.raises(UserError) as caught:
        items(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)
