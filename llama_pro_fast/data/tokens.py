"""Tokens on disk: a source is tokenised once, and from then on is two memory-mapped rows of numbers.

    CACHE/<key>/meta.json  train.bin  train.offsets.npy  train.bytes.npy  and the same three of held_out

`*.bin` holds the documents of one side of the split end to end, in the source's order; `*.offsets.npy` where each
begins, and the end of the last; `*.bytes.npy` how many bytes of text in each there are to predict. The key is a hash
of everything the tokens depend on (the files' contents, the tokenizer, the settings), so a
change makes another store (a file counts as unchanged while its size, time and inode are).

A folder named by a key is complete by construction: tokens are written to `<key>.partial`, flushed to the disk, and
the folder is renamed last. `meta.json` holds a digest of each file and one of itself, so that what a disk or a hand has
changed since is found, and made again; a file is read for that once, and then when its size, time or inode change. A
lock on `<key>.lock`, which the kernel releases however a process ends, lets a second process wait for the first and
then read what it wrote, and tells an abandoned partial folder from a growing one.
"""

from __future__ import annotations

import fcntl
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

from llama_pro_fast.console import say
from llama_pro_fast.data.documents import Document, is_held_out
from llama_pro_fast.data.sources import ResolvedSource, iterate_documents
from llama_pro_fast.digests import file_digests, file_hash
from llama_pro_fast.errors import UserError
from llama_pro_fast.files import why_refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 4
"""Part of every key: raise it when the same text would give other tokens or other files."""

META = "meta.json"

BATCH_CHARACTERS = 2**21
"""Text handed to the tokenizer at once: enough for all its threads, and a few tens of MB as Python lists."""


@dataclass(frozen=True)
class TokenSplit:
    """One side of a source, training or held-out.

    Attributes:
        tokens: ``[tokens]`` uint16 or uint32, the documents end to end, each with its EOS.
        offsets: ``[documents + 1]`` int64, from 0 to ``len(tokens)``; no document is empty.
        num_bytes: ``[documents]`` int64, UTF-8 bytes of each document's text after its first token, which nothing
            predicts: where the tokenizer adds a BOS, of the whole text. A first token that ends inside a character
            (byte-level tokenizers split rare ones) is taken to end with it, so up to 3 bytes are missing there.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    num_bytes: np.ndarray

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


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
        """The store in ``folder``, or None where there is no complete one, with every byte as it was written."""
        if (meta := _read_meta(folder)) is None:
            return None
        files = [folder / name for name in meta["files"]]
        if not all(map(os.path.isfile, files)) or file_digests(files, folder.parent) != [*meta["files"].values()]:
            return None
        splits = {split: _open_split(folder, split, np.dtype(meta["dtype"])) for split in ("train", "held_out")}
        return cls(**splits, num_skipped=meta["skipped"], key=folder.name)


def default_cache() -> Path:
    """`llama-pro-fast` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "llama-pro-fast"


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
    cache = Path(os.path.expanduser(cache_dir)) if cache_dir is not None else default_cache()
    fingerprint = _fingerprint(source, tokenizer, held_out, cache)
    key = _key(fingerprint)
    try:
        store = TokenStore.open(cache / key) or _build(source, tokenizer, held_out, cache, key, fingerprint, progress)
    except OSError as error:
        # Trouble with reading a source is a UserError by now, so this is the cache.
        raise UserError(f"{cache}: the cache of tokens cannot be used: {why_refused(error)} (--data.cache)") from error
    _check_sides(source, store, held_out)
    return store


def _check_sides(source: ResolvedSource, store: TokenStore, held_out: float) -> None:
    """Stop where a side that is needed is empty."""
    none_held_out = not store.held_out.num_documents
    if not none_held_out and (store.train.num_documents or source.weight == 0):
        return
    number = store.train.num_documents + store.held_out.num_documents
    if number == 1:
        raise UserError(
            f"{source.path}: one document, which cannot be split into training and held-out text: "
            "give more text or more files"
        )
    which, change = ("none", "raise") if none_held_out else ("all", "lower")
    raise UserError(
        f"{source.path}: {number} documents, {which} of them held out at {held_out}: {change} --data.held_out or "
        "add documents"
    )


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
        if (cache / key).exists():
            say(f"{cache / key}: the stored tokens of {source.name} are damaged; they are made again")
            shutil.rmtree(cache / key, ignore_errors=True)
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
            for document, (ids, num_bytes) in zip(with_text, _tokenize(with_text, tokenizer), strict=True):
                if ids:
                    (kept_out if is_held_out(document.split_key, held_out) else train).append(ids, num_bytes)
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
        "skipped": skipped,
        "files": train.digests | kept_out.digests,
        "fingerprint": fingerprint,
    }
    with open(folder / META, "w") as file:
        json.dump({"digest": _digest(_canonical(meta)), **meta}, file, indent=1)
        _to_disk(file)


class _HashedFile:
    """A file to be written, flushed to the disk and given a digest."""

    def __init__(self, path: Path) -> None:
        self._file, self._hash = open(path, "wb"), file_hash()  # noqa: SIM115

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)

    def close(self) -> str:
        with self._file:
            _to_disk(self._file)
        return self._hash.hexdigest()

    def abandon(self) -> None:
        self._file.close()


class _SplitWriter:
    """Appends documents to `<split>.bin`; of each only two numbers stay in memory until the end.

    After it ``digests`` has those of its files, by name.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype):
        self._folder, self._split, self._dtype = folder, split, dtype
        self._file = _HashedFile(folder / f"{split}.bin")
        self._offsets = array("q", [0])
        self._num_bytes = array("q")
        self.digests: dict[str, str] = {}

    def append(self, ids: list[int], num_bytes: int) -> None:
        self._file.write(np.array(ids, self._dtype).tobytes())
        self._offsets.append(self._offsets[-1] + len(ids))
        self._num_bytes.append(num_bytes)

    @property
    def num_documents(self) -> int:
        return len(self._offsets) - 1

    @property
    def num_tokens(self) -> int:
        return self._offsets[-1]

    def __enter__(self) -> _SplitWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            self._file.abandon()
            return
        self.digests[f"{self._split}.bin"] = self._file.close()
        for name, values in (("offsets", self._offsets), ("bytes", self._num_bytes)):
            file = _HashedFile(self._folder / f"{self._split}.{name}.npy")
            np.save(file, np.array(values, np.int64))
            self.digests[f"{self._split}.{name}.npy"] = file.close()


def _read_meta(folder: Path) -> dict[str, Any] | None:
    """The content of meta.json, if it is what was written there, for this key."""
    try:
        meta = json.loads((folder / META).read_bytes())
        whole = meta.pop("digest") == _digest(_canonical(meta)) and _key(meta["fingerprint"]) == folder.name
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None
    return meta if whole else None


def _open_split(folder: Path, split: str, dtype: np.dtype) -> TokenSplit:
    path = folder / f"{split}.bin"
    # An empty file cannot be mapped.
    tokens = np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
    return TokenSplit(tokens, *(np.load(folder / f"{split}.{name}.npy") for name in ("offsets", "bytes")))


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


def _tokenize(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[list[int], int]]:
    """Of each document its token ids, the EOS last, and the UTF-8 bytes of its text after the first token.

    There are no ids where the tokenizer makes nothing of the text.
    """
    if not documents:
        return
    encoded = tokenizer(
        [document.text for document in documents],
        add_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # it would warn of documents longer than the model's positions: packing cuts them
    )
    eos = tokenizer.eos_token_id
    for document, ids, encoding in zip(documents, encoded["input_ids"], encoded.encodings, strict=True):
        if not ids:
            yield ids, 0
            continue
        _, end = encoding.token_to_chars(0) or (0, 0)  # None for an added BOS
        if eos is not None and ids[-1] != eos:
            ids.append(eos)
        yield ids, len(document.text[end:].encode())


def _fingerprint(
    source: ResolvedSource, tokenizer: PreTrainedTokenizerFast, held_out: float, cache: Path
) -> dict[str, Any]:
    """Everything the tokens depend on. Weights, names and the place of the files are not part of it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Leftovers of the last call, and no part of ours.
    state.pop("truncation", None)
    state.pop("padding", None)
    tokenizer_parts = [type(tokenizer).__name__, state, tokenizer.eos_token_id, tokenizer.split_special_tokens]
    names, paths = zip(*source.files, strict=True)
    return {
        "format": FORMAT,
        "kind": source.kind,
        "text": source.text,
        "split": source.split,
        "python": platform.python_version() if source.kind != "files" else None,  # its parser reads the built-in text
        "files": dict(zip(names, file_digests(paths, cache), strict=True)),
        "tokenizer": _digest(_canonical(tokenizer_parts)),
        "held_out": held_out,
    }


def _key(fingerprint: dict[str, Any]) -> str:
    return _digest(_canonical(fingerprint))


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _digest(data: bytes) -> str:
    return file_hash(data).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_leftovers(cache: Path) -> None:
    """Delete what killed processes have left; one still at work holds its lock.

    Only names that :func:`_build` gives: the cache may be a folder of the user's, with partial things of others in it.
    """
    for partial in cache.glob("[0-9a-f]" * 32 + ".partial"):
        with open(partial.with_suffix(".lock"), "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(partial, ignore_errors=True)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
