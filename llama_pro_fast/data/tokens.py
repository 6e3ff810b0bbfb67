"""Tokens on disk: a source is tokenised once, and from then on is two memory-mapped rows of numbers.

    CACHE/<key>/train.bin  train.offsets.npy  held_out.bin  held_out.offsets.npy  meta.json

`*.bin` holds the documents of one side of the split end to end, in the source's order; `*.offsets.npy` where each
begins, and the end of the last. The key is a hash of everything the tokens depend on (the files' contents, the
tokenizer, the settings), so a store is never out of date: a change makes another one.

A folder named by a key is complete by construction: tokens are written to `<key>.partial`, flushed to the disk, and
the folder is renamed last. A lock on `<key>.lock`, which the kernel releases however a process ends, lets a second
process wait for the first and then read what it wrote, and tells an abandoned partial folder from a growing one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_pro_fast.data.documents import Document, is_held_out
from llama_pro_fast.data.sources import ResolvedSource, iterate_documents
from llama_pro_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 1
"""Part of every key: raise it when the same text would give other tokens or other files."""

BATCH_CHARACTERS = 2**21
"""Text handed to the tokenizer at once: enough for all its threads, and a few tens of MB as Python lists."""


@dataclass(frozen=True)
class TokenSplit:
    """One side of a source, training or held-out.

    Attributes:
        tokens: ``[tokens]`` uint16 or uint32, the documents end to end, each with its EOS.
        offsets: ``[documents + 1]`` int64, from 0 to ``len(tokens)``; no document is empty.
        num_bytes: length of the text in UTF-8 bytes (without the EOS).
    """

    tokens: np.ndarray
    offsets: np.ndarray
    num_bytes: int

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def bytes_per_token(self) -> float:
        """Turns nats per token into bits per byte: ``loss / log(2) / bytes_per_token``."""
        return self.num_bytes / self.num_tokens


@dataclass(frozen=True)
class TokenStore:
    """A tokenised source.

    Attributes:
        train: documents to train on.
        held_out: documents kept out of training.
        num_skipped: documents without text, in neither side.
        key: names the store; equal keys mean equal tokens.
    """

    train: TokenSplit
    held_out: TokenSplit
    num_skipped: int
    key: str

    @classmethod
    def open(cls, folder: Path) -> TokenStore | None:
        """The store in ``folder``, or None where there is no complete one."""
        try:
            meta = json.loads((folder / "meta.json").read_text())
            splits = {split: _open_split(folder, split, meta) for split in ("train", "held_out")}
        except (FileNotFoundError, NotADirectoryError, ValueError):
            # ValueError: a file shorter than meta.json says, as a file system that lost power may leave it.
            return None
        return cls(**splits, num_skipped=meta["skipped"], key=folder.name)


def default_cache() -> Path:
    """`llama-pro-fast` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-pro-fast"


def tokenize_source(
    source: ResolvedSource,
    tokenizer: PreTrainedTokenizerFast,
    *,
    held_out: float,
    cache_dir: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TokenStore:
    """The source's tokens, from the cache when they are there.

    Special tokens are added as the tokenizer does it, and its EOS to every document that does not end in it.

    Args:
        held_out: share of the documents kept out of training, chosen by :func:`is_held_out`.
        cache_dir: by default :func:`default_cache`.
        progress: called now and then with the documents and tokens written so far; not called for a cache hit.

    Raises:
        UserError: the source holds no text, or none on a side that is needed (training only where the weight is above
            0); a file cannot be read; the cache cannot be written; the tokenizer is not a fast one.
    """
    if not 0 < held_out < 1:
        raise UserError(f"data.held_out is {held_out}: give a share above 0 and below 1")
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{type(tokenizer).__name__} is no fast tokenizer: the model's folder needs a tokenizer.json")
    cache = Path(cache_dir).expanduser() if cache_dir is not None else default_cache()
    fingerprint = _fingerprint(source, tokenizer, held_out)
    key = _digest(json.dumps(fingerprint, sort_keys=True).encode())
    try:
        store = TokenStore.open(cache / key) or _build(source, tokenizer, held_out, cache, key, fingerprint, progress)
    except OSError as error:
        # Trouble with reading a source is a UserError by now, so this is the cache.
        raise UserError(
            f"{cache}: the cache of tokens cannot be used ({error.strerror or error}): make room or give another "
            "folder with --data.cache"
        ) from error
    counts = f"{source.path}: {store.train.num_documents + store.held_out.num_documents} documents"
    if not store.held_out.num_documents:
        raise UserError(f"{counts}, none of them held out at {held_out}: raise --data.held_out or add documents")
    if source.weight > 0 and not store.train.num_documents:
        raise UserError(f"{counts}, all of them held out at {held_out}: lower --data.held_out or add documents")
    return store


def _build(
    source: ResolvedSource,
    tokenizer: PreTrainedTokenizerFast,
    held_out: float,
    cache: Path,
    key: str,
    fingerprint: dict[str, Any],
    progress: Callable[[int, int], None] | None,
) -> TokenStore:
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{key}.lock"):
        if store := TokenStore.open(cache / key):  # another process has built it while this one waited for the lock
            return store
        _remove_leftovers(cache)
        shutil.rmtree(cache / key, ignore_errors=True)  # cut short by a loss of power
        partial = cache / f"{key}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            _write(source, tokenizer, held_out, partial, fingerprint, progress)
            partial.rename(cache / key)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # gives a full disk its room back
            raise
        store = TokenStore.open(cache / key)
        assert store is not None
        return store


def _write(
    source: ResolvedSource,
    tokenizer: PreTrainedTokenizerFast,
    held_out: float,
    folder: Path,
    fingerprint: dict[str, Any],
    progress: Callable[[int, int], None] | None,
) -> None:
    # Not len(tokenizer): a vocabulary may have holes.
    largest = max(tokenizer.get_vocab().values(), default=0)
    dtype = np.dtype(np.uint16 if largest < 2**16 else np.uint32)
    skipped = 0
    with _SplitWriter(folder, "train", dtype) as train, _SplitWriter(folder, "held_out", dtype) as kept_out:
        for documents in _batches(iterate_documents(source)):
            with_text = [document for document in documents if document.text.strip()]
            skipped += len(documents) - len(with_text)
            for document, ids in zip(with_text, _tokenize(with_text, tokenizer), strict=True):
                if ids:
                    (kept_out if is_held_out(document.split_key, held_out) else train).append(document, ids)
                else:
                    skipped += 1
            if progress is not None:
                progress(train.num_documents + kept_out.num_documents, train.num_tokens + kept_out.num_tokens)
        if not train.num_documents + kept_out.num_documents:
            raise UserError(
                f"{source.path}: no document with text ({skipped} empty): give other files or another column"
            )
        meta = {
            "format": FORMAT,
            "dtype": dtype.name,
            "train": train.counts(),
            "held_out": kept_out.counts(),
            "skipped": skipped,
            "fingerprint": fingerprint,
        }
    with open(folder / "meta.json", "w") as file:
        json.dump(meta, file, indent=1)
        _to_disk(file)


class _SplitWriter:
    """Appends documents to `<split>.bin`; only the offsets, 8 bytes a document, stay in memory until the end."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype):
        self._folder, self._split, self._dtype = folder, split, dtype
        self._file = open(folder / f"{split}.bin", "wb")  # noqa: SIM115
        self._offsets = array("q", [0])
        self._num_bytes = 0

    def append(self, document: Document, ids: list[int]) -> None:
        self._file.write(np.array(ids, self._dtype).tobytes())
        self._offsets.append(self._offsets[-1] + len(ids))
        self._num_bytes += len(document.text.encode())

    @property
    def num_documents(self) -> int:
        return len(self._offsets) - 1

    @property
    def num_tokens(self) -> int:
        return self._offsets[-1]

    def counts(self) -> dict[str, int]:
        return {"documents": self.num_documents, "tokens": self.num_tokens, "bytes": self._num_bytes}

    def __enter__(self) -> _SplitWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with self._file:
            if kind is None:
                _to_disk(self._file)
        if kind is None:
            with open(self._folder / f"{self._split}.offsets.npy", "wb") as file:
                np.save(file, np.frombuffer(self._offsets, np.int64))
                _to_disk(file)


def _open_split(folder: Path, split: str, meta: dict[str, Any]) -> TokenSplit:
    path, dtype, counts = folder / f"{split}.bin", np.dtype(meta["dtype"]), meta[split]
    if path.stat().st_size != counts["tokens"] * dtype.itemsize:
        raise ValueError(f"{path} is cut short")
    # An empty file cannot be mapped.
    tokens = np.memmap(path, dtype, mode="r") if counts["tokens"] else np.empty(0, dtype)
    offsets = np.load(folder / f"{split}.offsets.npy")
    if len(offsets) != counts["documents"] + 1:
        raise ValueError(f"{path}: offsets are cut short")
    return TokenSplit(tokens, offsets, counts["bytes"])


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document.text) + 100  # so that many empty or tiny documents make a batch too
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tokenize(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """Token ids of each document, the EOS last; an empty list where the tokenizer makes nothing of the text."""
    if not documents:
        return
    encoded = tokenizer(
        [document.text for document in documents],
        add_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # it would warn of documents longer than the model's positions: packing cuts them
    )["input_ids"]
    eos = tokenizer.eos_token_id
    for ids in encoded:
        if ids and eos is not None and ids[-1] != eos:
            ids.append(eos)
        yield ids


def _fingerprint(source: ResolvedSource, tokenizer: PreTrainedTokenizerFast, held_out: float) -> dict[str, Any]:
    """Everything the tokens depend on. Weights, names and the place of the files are not part of it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Leftovers of the last call, and no part of ours.
    state.pop("truncation", None)
    state.pop("padding", None)
    tokenizer_parts = [type(tokenizer).__name__, state, tokenizer.eos_token_id, tokenizer.split_special_tokens]
    return {
        "format": FORMAT,
        "kind": source.kind,
        "text": source.text,
        "python": platform.python_version() if source.kind != "files" else None,  # its parser reads the built-in text
        "files": {name: _file_digest(path) for name, path in source.files},
        "tokenizer": _digest(json.dumps(tokenizer_parts, sort_keys=True).encode()),
        "held_out": held_out,
    }


def _file_digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check the file and its permissions") from error


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_leftovers(cache: Path) -> None:
    """Delete what killed processes have left; one still at work holds its lock."""
    for partial in cache.glob("*.partial"):
        with open(partial.with_suffix(".lock"), "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(partial, ignore_errors=True)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
