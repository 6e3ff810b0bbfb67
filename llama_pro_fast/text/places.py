"""Where files lie: on this machine, or behind an address that fsspec opens; and how their bytes are read.

A file that ends too early, or not at all as it should, ends here like any other, with a fault to be reported: what
could be read of it is kept.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import lzma
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_pro_fast.errors import UserError
from llama_pro_fast.files import check_regular, first_line
from llama_pro_fast.text.documents import Fault, SourceFile
from llama_pro_fast.text.folders import split_compression

BUFFER = 2**18
"""Bytes asked of a file at once."""


def is_address(path: str) -> bool:
    """Whether fsspec opens it: ``s3://…``, ``memory://…``, ``zip://…::…``."""
    return "://" in path


def is_pattern(path: str) -> bool:
    """Whether ``*``, ``?`` or ``[`` in it stand for other characters."""
    return glob.has_magic(path)


def local_file(name: str, path: Path) -> SourceFile:
    """A file of this machine; one that is not there (a link to nothing) has no size, and its reading is a fault.

    Raises:
        UserError: it is no regular file, or may not be read.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            check_regular(path)
        if not os.access(path, os.R_OK):
            raise PermissionError(0, "Permission denied")
    except FileNotFoundError:
        return SourceFile(name, str(path), 0, "gone")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({why(error)}): check the file and its permissions") from error
    return SourceFile(name, str(path), status.st_size, f"{status.st_mtime_ns}-{status.st_ino}")


def local_folder(root: Path) -> list[str]:
    """Names, relative to ``root``, of every file in it and below that is not hidden; links to folders are followed.

    Raises:
        UserError: a folder may not be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({why(error)}): check the folder and its permissions")

    names, seen = [], set()
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # links in a circle
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        names += [Path(folder, name).relative_to(root).as_posix() for name in files if not name.startswith(".")]
    return names


def local_pattern(pattern: str) -> tuple[Path, list[str]]:
    """The folder before the first ``*`` of a pattern, and the names relative to it of the files that match.

    Where folders match and no file, everything in them does. A folder that links lead to more than once, or in a
    circle, is read once: ``**`` follows them, up to forty times.
    """
    parts = Path(pattern).parts
    fixed = Path(*parts[: next(index for index, part in enumerate(parts) if is_pattern(part))])
    matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
    files = {match for match in matches if not match.is_dir()}
    if not files:
        files = {match / name for match in matches if match.is_dir() for name in local_folder(match)}
    once: dict[str, Path] = {}
    folders: dict[Path, str] = {}
    for file in sorted(files, key=lambda file: (len(file.parts), file)):
        if file.parent not in folders:
            folders[file.parent] = os.path.realpath(file.parent)
        once.setdefault(os.path.join(folders[file.parent], file.name), file)
    return fixed, sorted(file.relative_to(fixed).as_posix() for file in once.values())


def remote_files(address: str) -> tuple[list[SourceFile], bool]:
    """The files behind an address, which may be one, a folder or a pattern; and whether it is a folder.

    Raises:
        UserError: nothing can be read there.
    """
    try:
        system, path = _system(address)
        path = path.rstrip("/") if path.strip("/") else path
        if is_pattern(path):
            found, root = system.glob(path, detail=True), path[: re.search(r"[*?[]", path).start()].rpartition("/")[0]
        elif is_folder := system.isdir(path):
            found, root = system.find(path, detail=True), path
        else:
            found, root = {path: system.info(path)}, path.rpartition("/")[0]
        is_folder = not is_pattern(path) and is_folder
        files = [
            _remote_file(name, info, root, system, address)
            for name, info in sorted(found.items())
            if info["type"] == "file"
        ]
    except ImportError as error:
        raise UserError(f"{address}: {first_line(error)} (with pip, in the same environment)") from error
    except FileNotFoundError as error:
        raise UserError(f"{address}: no such file or folder: check the address") from error
    except Exception as error:  # each protocol has errors of its own
        raise UserError(
            f"{address}: cannot be read ({first_line(error)}): check the address and your access"
        ) from error
    if not files:
        raise UserError(f"{address}: no file there: check the address")
    return files, is_folder


def _system(address: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    return url_to_fs(address)


def _remote_file(path: str, info: dict[str, Any], root: str, system: Any, address: str) -> SourceFile:
    known = ("ETag", "etag", "checksum", "sha", "LastModified", "last_modified", "mtime", "updated", "created", "CRC")
    stamp = [str(info[key]) for key in known if info.get(key)]
    _, chained, rest = address.partition("::")
    name = path[len(root) :].lstrip("/") if path.startswith(root) else path.rpartition("/")[2]
    return SourceFile(name, system.unstrip_protocol(path) + chained + rest, info.get("size") or 0, "-".join(stamp))


class OpenFile:
    """A file while it is being read.

    Attributes:
        name, path, size: of the file.
        raw: its bytes as they lie on disk.
        head: the first of them.
        stream: its bytes, decompressed.
        lines: physical lines (or rows) read; the reader counts them.
    """

    def __init__(self, file: SourceFile, begin: int = 0) -> None:
        """Raises OSError, or what fsspec's protocols raise, where the file cannot be opened."""
        self.name, self.path, self.size = file.name, file.path, file.size
        self.lines = 0
        self.raw, self._system = _open_raw(file.path)
        self.head = self.raw.read(64)
        self.raw.seek(begin)
        _, ending = split_compression(file.name)
        self._bytes = _Whole(self.raw, ending)
        self.stream = io.BufferedReader(self._bytes, BUFFER)

    @property
    def is_cut(self) -> bool:
        """Whether the file has ended earlier than it should."""
        return self._bytes.error is not None

    @property
    def num_left(self) -> int:
        """Bytes on disk from which no text has been read."""
        return max(0, self.size - self._bytes.position)

    def begins_with(self, mark: bytes) -> bool:
        """Whether these are the next bytes of the stream."""
        return self.stream.peek(len(mark)).startswith(mark)

    def ends_with(self, mark: bytes) -> bool:
        """Whether these are the last bytes on disk."""
        self.raw.seek(-min(len(mark), self.size), os.SEEK_END)
        return self.raw.read() == mark

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.close()

    def fault(self) -> Fault | None:
        """What ended the file too early, if anything did."""
        if (error := self._bytes.error) is None:
            if not self._bytes.is_at_end or not self.num_left:
                return None
            if ending := split_compression(self.name)[1]:  # bz2 and lzma pass over what they cannot read at the end
                return Fault(self.lines + 1, "damaged", f"what follows is not {ending}", self.num_left)
            return Fault(self.lines + 1, "gone", "the file has become shorter", self.num_left)
        text = first_line(error)
        if not split_compression(self.name)[1]:
            return Fault(self.lines + 1, "gone", text, self.num_left)
        if isinstance(error, EOFError) or "Truncated" in text:
            return Fault(self.lines + 1, "cut short", text, self.num_left)
        # A checksum stands at the end, and nobody knows what of the text before it is wrong.
        is_checksum = "CRC" in text or "checksum" in text
        return Fault(self.lines + 1, "damaged", text, self.size if is_checksum else self.num_left)


class _Whole(io.RawIOBase):
    """The bytes of a file, decompressed, up to its end or to where it can be read no further."""

    def __init__(self, raw: Any, ending: str) -> None:
        self._raw, self.position, self._given, self.error = raw, 0, 0, None
        self.is_at_end = False
        self._read = self._reader(ending)

    def _reader(self, ending: str) -> Any:
        if ending == ".zst":
            return _Zst(self._raw).read
        if opened := {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(ending):
            return opened(self._raw, "rb").read1
        return self._raw.read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.error is not None:
            return 0
        try:
            data = self._read(len(buffer))
            self.position = self._raw.tell()
        except Exception as error:  # of a disk, a decompressor or a protocol: each has its own
            self.error = error
            return 0
        buffer[: len(data)] = data
        self._given += len(data)
        self.is_at_end = not data
        return len(data)

    def tell(self) -> int:
        return self._given


class _Zst:
    """pyarrow's decompressor. What it has unpacked when a read fails is lost, so the last bytes are read one by one."""

    def __init__(self, raw: Any) -> None:
        self._raw, self._step, self._given = raw, 2**16, 0
        self._streams: list[Any] = []  # a stream that nobody holds closes its file
        self._open()

    def _open(self) -> None:
        import pyarrow as pa

        self._streams.append(pa.CompressedInputStream(pa.PythonFile(self._raw, mode="r"), "zstd"))

    def read(self, size: int) -> bytes:
        try:
            data = self._streams[-1].read(min(size, self._step))
        except OSError:
            if self._step == 1:
                raise
            self._raw.seek(0)
            self._open()
            left = self._given
            while left:
                left -= len(self._streams[-1].read(min(left, 2**20)))
            self._step = 1
            return self.read(size)
        self._given += len(data)
        return data


def _open_raw(path: str) -> tuple[Any, Any]:
    """The file's bytes, and what must live as long: an archive closes itself when nobody holds it."""
    if not is_address(path):
        return open(path, "rb", buffering=0), None
    system, inner = _system(path)
    return system.open(inner, "rb"), system


def why(error: BaseException) -> str:
    """What a file system or a server said, in a line."""
    return getattr(error, "strerror", None) or first_line(error)


def lines_of(file: OpenFile, end: int | None = None) -> Iterator[bytes]:
    """The lines, each with its end; those that begin before byte ``end`` of what is read."""
    position = 0
    if end is not None and end <= 0:
        return
    for line in file.stream:
        yield line
        position += len(line)
        if end is not None and position >= end:
            return
