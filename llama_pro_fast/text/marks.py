"""What a file is, told by its first bytes, where that is not what its name says."""

from __future__ import annotations

from llama_pro_fast.errors import UserError
from llama_pro_fast.text.documents import Fault
from llama_pro_fast.text.folders import split_compression
from llama_pro_fast.text.places import OpenFile

LFS = b"version https://git-lfs"
PACKED = {
    ".gz": (b"\x1f\x8b", "gzip"),
    ".zst": (b"\x28\xb5\x2f\xfd", "zstd"),
    ".bz2": (b"BZh", "bzip2"),
    ".xz": (b"\xfd7zXZ\0", "xz"),
}
SKIPPABLE = b"\x2a\x4d\x18"
"""A zstd file may begin with a frame that holds no data, whose first byte is anything from 0x50 to 0x5f."""
TABLES = {"parquet": (b"PAR1",), "arrow": (b"ARROW1", b"\xff\xff\xff\xff")}
OTHERS = dict(PACKED.values()) | {
    b"PK\x03\x04": "a zip archive",
    b"PAR1\x15": "parquet",  # PAR1 alone is a gene, and the name of a column
    b"ARROW1\0\0": "arrow",
    b"%PDF-": "a PDF",
    b"SQLite format 3": "an SQLite database",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"\x89HDF": "HDF5",
    b"\x93NUMPY": "a NumPy array",
}
WIDE = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def check_beginning(file: OpenFile, known: str | None) -> Fault | None:
    """Compare a file's first bytes with its name.

    Args:
        known: the format its name tells.

    Returns:
        A fault of a text or a source file, of which a folder may hold one that is none; or of an empty table or
        archive, which no writer has finished.

    Raises:
        UserError: the file is something else, and its rows are nothing that can be read.
    """
    if file.head.startswith(LFS):
        raise UserError(f"{file.path}: a git-lfs pointer, not the file: run `git lfs pull` (or download it again)")
    if packed := PACKED.get(split_compression(file.name)[1]):
        if not file.head:
            return Fault(1, "cut short", "an empty file")
        mark, name = packed
        is_skippable = name == "zstd" and file.head[1:4] == SKIPPABLE and 0x50 <= file.head[0] <= 0x5F
        if not file.head.startswith(mark) and not is_skippable:
            raise UserError(f"{file.path}: not {name}, as its ending says: it begins with {_shown(file.head)}")
    head = file.stream.peek(64)[:64]
    if known in TABLES:
        if not file.size:
            return Fault(1, "cut short", "an empty file")
        if not head.startswith(TABLES[known]):
            raise UserError(
                f"{file.path}: cannot be read as {known}: it begins with {_shown(head)}, which no {known} file does"
            )
        return None
    found, remedy = _found(head), "give its text as UTF-8"
    if found and found.startswith("UTF"):
        remedy = f"convert it to UTF-8 (`iconv -f {found} -t UTF-8`)"
    elif found:
        remedy = "name it as what it is, or unpack it"
    elif known not in ("txt", "code") and head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        found, remedy = "an HTML page", "download it again"
    if not found:
        return None
    if known in ("txt", "code"):
        return Fault(1, f"not UTF-8 text but {found}", remedy, file.size)
    raise UserError(f"{file.path}: {found}, not {known}: {remedy}")


def _found(head: bytes) -> str | None:
    for mark, name in (WIDE | OTHERS).items():
        if head.startswith(mark):
            return name
    halves = head[::2], head[1::2]  # of UTF-16 without a mark, one half of ASCII text is zeros
    if len(head) >= 4 and any(half.count(0) == len(half) for half in halves) and head.strip(b"\0"):
        return "UTF-16"
    return None


def _shown(head: bytes) -> str:
    return repr(head[:12])[1:]
