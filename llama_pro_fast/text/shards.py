"""Shards on disk: how they are written, found again, and known to be whole.

    CACHE/shards/<key>/tokens.bin      uint16 or uint32: the documents that train end to end, then the held-out ones
                       documents.npy   DOCUMENT: where each ends, its digest, its place in its file
                       counts.npy      how often each token stands in those that train, anywhere but first
                       learned.bin     a bit for each token, only where some are not to be predicted
                       meta.json       a digest of each file, and one of itself

A shard's key is a hash of its documents and of everything else its tokens depend on, so it is found again whatever
becomes of the files that its text was read from: an edited row, a file more or a file renamed costs only the shards
whose documents are others. Nothing in a shard depends on time, place or order of work.

A folder under a key's own name is complete by construction: a shard is written to `<key>.partial`, flushed to the disk
and renamed last. What a disk or a hand has changed since is found by the digests, and made again. A lock on
`<key>.lock`, which the kernel releases however a process ends, lets a second process wait for the first, and tells
abandoned remains from growing ones.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from llama_pro_fast.digests import file_digests, file_hash, remember

FORMAT = 7
"""Part of every key: raise it when the same text would give other tokens or other files."""

META = "meta.json"
DOCUMENT = np.dtype([("end", "<i8"), ("digest", "<u8"), ("num_bytes", "<i8"), ("line", "<i4"), ("file", "<u4")])
"""A document of a shard: the end of its tokens; the hash of its text; the UTF-8 bytes of its text after the first token
where it is held out, else -1; its line, counted from the shard's first document of its file; its file's number among
the shard's."""
FLUSHED_TOKENS = 2**18
KEY = "[0-9a-f]" * 32


class ShardWriter:
    """Writes a shard into a folder; of each document only a few numbers stay in memory until the end.

    Args:
        documents: ``[n]`` of :data:`DOCUMENT`, those that train first; ``end`` and ``num_bytes`` are filled in here.
        num_train: how many of them train.
        dtype: of the tokens.
    """

    def __init__(self, folder: Path, documents: np.ndarray, num_train: int, dtype: np.dtype) -> None:
        self._folder, self._documents, self._num_train, self._dtype = folder, documents, num_train, dtype
        self._file = _HashedFile(folder / "tokens.bin")
        self._buffer = array("I")
        self._lengths, self._num_bytes = array("q"), array("q")
        self._counts = np.zeros(0, np.int64)
        self._firsts = array("I")
        self._not_learned: list[np.ndarray] = []
        self.num_tokens = 0

    def append(self, ids: Sequence[int], num_bytes: int = -1, learned: np.ndarray | None = None) -> None:
        """The next of the documents; without ids it is left out.

        Args:
            num_bytes: as in :data:`DOCUMENT`.
            learned: bool, of the same length: False for a token that is not to be predicted; None: all are.
        """
        if len(self._lengths) == self._num_train:
            self._flush()  # so that no flush holds tokens of both sides
        if ids and len(self._lengths) < self._num_train:
            self._firsts.append(ids[0])  # which nothing predicts
        self._lengths.append(len(ids))
        self._num_bytes.append(num_bytes)
        if learned is not None:
            self._not_learned.append(self.num_tokens + np.flatnonzero(~learned))
        if isinstance(ids, list):
            self._buffer.fromlist(ids)
        else:  # of a long text
            for begin in range(0, len(ids), FLUSHED_TOKENS):
                self._buffer.extend(ids[begin : begin + FLUSHED_TOKENS])
                self._flush()
        self.num_tokens += len(ids)
        if len(self._buffer) >= FLUSHED_TOKENS:
            self._flush()

    def _flush(self) -> None:
        tokens = np.frombuffer(self._buffer, np.uint32).astype(self._dtype)
        self._file.write(tokens)
        if len(self._lengths) <= self._num_train and len(tokens):
            counts = np.bincount(tokens, minlength=len(self._counts))
            counts[: len(self._counts)] += self._counts
            self._counts = counts - np.bincount(np.frombuffer(self._firsts, np.uint32), minlength=len(counts))
            self._firsts = array("I")
        self._buffer = array("I")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            self._file.abandon()
            return
        self._flush()
        lengths = np.array(self._lengths, np.int64)
        assert len(lengths) == len(self._documents)
        self._documents["end"], self._documents["num_bytes"] = np.cumsum(lengths), self._num_bytes
        digests = {"tokens.bin": self._file.close()}
        for name, values in (("documents", self._documents[lengths > 0]), ("counts", self._counts)):
            digests[f"{name}.npy"] = self._save(f"{name}.npy", lambda file, values=values: np.save(file, values))
        if not_learned := [numbers for numbers in self._not_learned if len(numbers)]:
            learned = np.ones(self.num_tokens, bool)
            learned[np.concatenate(not_learned)] = False
            digests["learned.bin"] = self._save("learned.bin", lambda file: file.write(np.packbits(learned)))
        meta = {
            "format": FORMAT,
            "key": self._folder.stem,
            "dtype": self._dtype.name,
            "empty": int((lengths == 0).sum()),
            "files": digests,
        }
        self._save(META, lambda file: file.write(signed(meta)))

    def _save(self, name: str, write: Callable[[Any], Any]) -> str:
        file = _HashedFile(self._folder / name)
        write(file)
        return file.close()


class _HashedFile:
    """A file to be written, flushed to the disk and given a digest."""

    def __init__(self, path: Path) -> None:
        self._file, self._hash = open(path, "wb"), file_hash()  # noqa: SIM115

    def write(self, content: Any) -> None:
        self._file.write(content)
        self._hash.update(content)

    def close(self) -> str:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._hash.hexdigest()

    def abandon(self) -> None:
        with suppress(OSError):  # of a full disk, which has been told
            self._file.close()


def make_shard(shards: Path, key: str, write: Callable[[Path], Any], waiting: Callable[[], Any]) -> bool:
    """Make a shard that is not there, or not whole.

    Args:
        shards: the folder of all.
        write: fills a folder with it.
        waiting: called now and then while another process makes it.

    Returns:
        Whether one was there and damaged.

    Raises:
        OSError: the cache cannot be written.
    """
    folder, partial = shards / key, shards / f"{key}.partial"
    if _is_whole(folder):
        return False
    with _locked(shards / f"{key}.lock", waiting):
        if _is_whole(folder):  # another process has made it meanwhile
            return False
        is_damaged = folder.exists()
        for remains in (folder, partial):
            shutil.rmtree(remains, ignore_errors=True)
        try:
            partial.mkdir()
            write(partial)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # gives a full disk its room back
            raise
        return is_damaged


def whole_shards(cache: Path, keys: Iterable[str]) -> set[str]:
    """Those of the shards that are there with every byte as it was written.

    A file is read for that once, and then when its size, time or inode change (:func:`file_digests`).
    """
    expected: dict[Path, str] = {}
    found = set()
    for key in dict.fromkeys(keys):
        if (meta := read_meta(folder := cache / "shards" / key)) is None:
            continue
        files = {folder / name: digest for name, digest in meta["files"].items()}
        if all(map(os.path.isfile, files)):
            expected |= files
            found.add(key)
    digests = file_digests(expected, cache) if expected else []
    return found - {
        path.parent.name for path, digest in zip(expected, digests, strict=True) if expected[path] != digest
    }


def remember_shards(cache: Path, keys: Iterable[str]) -> None:
    """What has just been made need not be read to know that it is whole."""
    metas = [(cache / "shards" / key, read_meta(cache / "shards" / key)) for key in keys]
    remember({folder / name: digest for folder, meta in metas if meta for name, digest in meta["files"].items()}, cache)


def remove_leftovers(shards: Path) -> None:
    """Delete what killed processes have left; one still at work holds its lock.

    Only names that :func:`make_shard` gives: the cache may be a folder of the user's, with things of others in it.
    """
    for key in {path.stem for end in ("partial", "lock") for path in shards.glob(f"{KEY}.{end}")}:
        with suppress(BlockingIOError), _locked(shards / f"{key}.lock"):
            shutil.rmtree(shards / f"{key}.partial", ignore_errors=True)


def read_meta(folder: Path) -> dict[str, Any] | None:
    """The content of a shard's meta.json, if it is what was written there, for this key."""
    meta = read_signed(folder / META)
    return meta if meta is not None and meta.get("key") == folder.name else None


def signed(values: dict[str, Any]) -> bytes:
    """As JSON, with a digest of itself."""
    return json.dumps({"digest": digest(values), **values}, indent=1).encode()


def read_signed(path: Path) -> dict[str, Any] | None:
    """What :func:`signed` made of it, or None if the file is not there or something else."""
    try:
        values = json.loads(path.read_bytes())
        return values if values.pop("digest") == digest(values) else None
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None


def digest(value: Any) -> str:
    """Of anything that JSON can spell."""
    return file_hash(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _is_whole(folder: Path) -> bool:
    if (meta := read_meta(folder)) is None:
        return False
    for name, expected in meta["files"].items():
        try:
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, file_hash).hexdigest() != expected:
                    return False
        except FileNotFoundError:
            return False
    return True


@contextmanager
def _locked(path: Path, waiting: Callable[[], Any] | None = None) -> Iterator[None]:
    """Hold a lock, waiting for it or raising BlockingIOError. Its file is there only as long as somebody holds it."""
    while True:
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting is None:
                    raise
                waiting()
                time.sleep(0.1)
                continue
            if not _is_at(path, file):  # deleted by the one that held it, between the opening and the lock
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(path: Path, file: Any) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
