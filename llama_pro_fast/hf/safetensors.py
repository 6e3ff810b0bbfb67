"""The safetensors format: where in a file each tensor's bytes lie, read and written without loading them
(huggingface.co/docs/safetensors)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama_pro_fast.errors import UserError
from llama_pro_fast.files import check_regular

ALIGNMENT = 64
LARGEST_HEADER = 100_000_000  # the format's own limit
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ``dtype`` in safetensors' spelling (``"BF16"``), ``offset`` in bytes from file start."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_header(path: Path) -> list[TensorEntry]:
    """The table of one safetensors file: 8 bytes of length, then JSON (format: huggingface.co/docs/safetensors).

    Raises:
        UserError: the file is missing, is not safetensors, or is shorter or longer than its table says.
    """
    remedy = "download it again"
    check_regular(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, LARGEST_HEADER):
                raise UserError(f"{path}: damaged (not a safetensors file); {remedy}")
            table = json.loads(file.read(length))
        table.pop("__metadata__", None)
        start = 8 + length
        entries = []
        for name, row in table.items():
            dtype, shape, (begin, stop) = row["dtype"], row["shape"], row["data_offsets"]
            if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in (*shape, begin, stop)):
                raise TypeError(name)
            entries.append(TensorEntry(name, path.name, dtype, tuple(shape), start + begin, stop - begin))
    except FileNotFoundError as error:
        raise UserError(f"{path}: the index names this shard and it is not there; {remedy}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged (its header is not readable); {remedy}") from error
    entries.sort(key=lambda entry: entry.offset)
    end = start
    for entry in entries:
        if entry.offset != end or entry.num_bytes < 0:
            raise UserError(f"{path}: damaged (its tensors overlap or leave gaps); {remedy}")
        width = TORCH_DTYPES[entry.dtype].itemsize if entry.dtype in TORCH_DTYPES else None
        if width and math.prod(entry.shape) * width != entry.num_bytes:
            raise UserError(f"{path}: damaged ({entry.name} has not the bytes its shape asks for); {remedy}")
        end += entry.num_bytes
    if end != size:
        raise UserError(f"{path}: damaged ({size:,} bytes where its header says {end:,}); {remedy}")
    return entries


def num_not_finite(piece: memoryview, dtype: str) -> int:
    """How many values of a floating ``dtype`` (safetensors' spelling) in a piece of a tensor are NaN or infinite."""
    values = torch.frombuffer(piece, dtype=TORCH_DTYPES[dtype])
    # The extremes take one pass, ten times as fast as a look at each value, and a NaN among the values is one of them.
    if torch.stack(torch.aminmax(values)).isfinite().all():
        return 0
    return int((~values.isfinite()).sum())


def write_header(file, entries: list[tuple[str, str, tuple[int, ...], int]]) -> None:
    """Write the table of a safetensors file for tensors ``(name, dtype, shape, num_bytes)`` in this order."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, num_bytes in entries:
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    header = json.dumps(table, separators=(",", ":")).encode()
    # Readers map the file, and a product may round otherwise where its weights do not start on a cache line.
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    file.write(len(header).to_bytes(8, "little") + header)
