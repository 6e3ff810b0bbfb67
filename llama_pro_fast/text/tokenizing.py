"""The work on one unit: its documents in shards of tokens, and a note of what they are.

    CACHE/units/<key>.json   of a unit: its shards, how many rows it has, what could not be read

A note's key stands for a unit as it was when it was looked up (its files' names, sizes and times) and for all settings,
so text is neither read nor tokenised again as long as nothing has changed. Where a file has changed its unit is read
again, and only shards that are not there are made (:mod:`llama_pro_fast.text.shards`).
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llama_pro_fast.digests import SETTLED_NS, file_hash
from llama_pro_fast.errors import UserError
from llama_pro_fast.files import write_whole
from llama_pro_fast.text.documents import Fault, Unit, is_held_out, text_hash
from llama_pro_fast.text.encoding import Encoder, EncoderSettings
from llama_pro_fast.text.folders import format_of
from llama_pro_fast.text.places import is_address, local_file
from llama_pro_fast.text.shards import DOCUMENT, FORMAT, ShardWriter, digest, make_shard, signed
from llama_pro_fast.text.units import read_unit

SHARD_BYTES = 2**25
"""UTF-8 bytes of a shard's text from which on it ends, with a document whose hash says so: the shards behind one that
is new or gone are then the same as before."""
ENDING_BYTES = 2**22
"""Of text more, after which it is expected to have ended."""
LARGEST_SHARD_BYTES = 2**25 + 2**24
DOCUMENT_COST = 100
"""Bytes that a document counts for beside its text: a shard does not have millions of tiny ones."""
PLACES = 20
"""Faults of a kind whose places are noted."""

Report = Callable[[int, int, int], Any]
"""Takes bytes of text done, and documents and tokens written."""


def note_key(unit: Unit, settings: EncoderSettings, held_out: float) -> str:
    """Names the note of a unit. Where its files lie is not part of it."""
    described = unit.as_dict()
    for file in described["files"]:
        del file["path"]
    # The parser of the running Python reads the built-in text.
    python = platform.python_version() if unit.kind != "files" else None
    return digest([FORMAT, settings.key, held_out, described, python])


class UnitTokenizer:
    """Tokenises units into a cache.

    Args:
        held_out: share of the documents kept out of training.
        cache: holds the folders ``shards`` and ``units``.
        threads: of the tokenizer.
    """

    def __init__(self, settings: EncoderSettings, *, held_out: float, cache: Path, threads: int = 1) -> None:
        self._settings, self._held_out, self._cache = settings, held_out, cache
        self._encoder = Encoder(settings, threads)
        self._dtype = np.dtype(np.uint16 if self._encoder.largest_id < 2**16 else np.uint32)

    def tokenize(self, unit: Unit, report: Report) -> tuple[dict[str, Any], list[str]]:
        """Make the shards of a unit that are not there.

        Args:
            report: called often, also while nothing is written.

        Returns:
            The note, and the keys of shards that were there and damaged.

        Raises:
            UserError: the source is not what it should be.
            OSError: the cache cannot be written.
        """
        began, reading, progress = time.time_ns(), read_unit(unit, self._settings.eos), _Progress(report)
        rows, empty, first_empty, faults = 0, 0, None, {}
        shards, damaged, draft = [], [], _Draft()
        by_lines = [format_of(file.name) in ("txt", "code") for file in unit.files]
        for number, item in reading:
            rows += 1
            if rows % 256 == 0:
                progress.tell()
            if isinstance(item, Fault):
                _count(item, number, faults)
                continue
            documents = self._encoder.documents(item.text)
            if not documents:
                empty, first_empty = empty + 1, first_empty or [number, item.line]
            for text, offset in documents:
                line = item.line
                if offset and by_lines[number]:
                    line += item.text.count("\n", 0, offset + len(text) - len(text.lstrip()))
                hashed = text_hash(text)
                # A row's text is its own key, unless a column is.
                key = text if item.split_key == item.text else item.split_key
                kept_out = hashed < self._held_out * 2.0**64 if key is text else is_held_out(key, self._held_out)
                draft.add(text, kept_out, hashed, line, number)
                if draft.is_full(hashed):
                    shards.append(self._shard(draft, progress, damaged))
                    draft = _Draft()
        if draft.size:
            shards.append(self._shard(draft, progress, damaged))
        note = {
            "shards": shards,
            "rows": rows,
            "empty": empty,
            "first_empty": first_empty,
            "faults": faults,
            "lines": reading.lines,
        }
        if _is_lasting(unit, began, faults):
            # A lost or damaged note costs one reading, so it need not be on the disk at once.
            key = note_key(unit, self._settings, self._held_out)
            write_whole(self._cache / "units" / f"{key}.json", signed(note))
        return note, damaged

    def _shard(self, draft: _Draft, progress: _Progress, damaged: list[str]) -> dict[str, Any]:
        documents, num_train = draft.documents(), len(draft.texts[False])
        key = file_hash(f"{FORMAT} {self._settings.key} {num_train} ".encode() + documents.tobytes()).hexdigest()
        before = progress.text_bytes
        bytes_per_character = draft.num_bytes / sum(len(text) for texts in draft.texts.values() for text in texts)

        def done(characters: int) -> None:
            progress.text_bytes += int(characters * bytes_per_character)
            progress.tell()

        def write(folder: Path) -> None:
            with ShardWriter(folder, documents, num_train, self._dtype) as writer:
                for kept_out, texts in draft.texts.items():
                    for ids, num_bytes in self._encoder.encode(texts, measured=kept_out, done=done):
                        writer.append(ids, num_bytes)
                        progress.documents += 1
                        progress.tokens += len(ids)

        if make_shard(self._cache / "shards", key, write, progress.tell):
            damaged.append(key)
        progress.text_bytes = before + draft.num_bytes
        progress.tell()
        return {"key": key, "files": list(map(list, draft.files.items()))}


class _Progress:
    def __init__(self, report: Report) -> None:
        self._report = report
        self.text_bytes = self.documents = self.tokens = 0

    def tell(self) -> None:
        self._report(self.text_bytes, self.documents, self.tokens)


class _Draft:
    """The documents of the next shard.

    Attributes:
        texts: by whether they are held out.
        files: the line of the first document of each file, by its number in the unit.
        num_bytes: of text.
        size: the same, and something for each document.
    """

    def __init__(self) -> None:
        self.texts: dict[bool, list[str]] = {False: [], True: []}
        self.files: dict[int, int] = {}
        self.num_bytes = self.size = 0
        self._rows: dict[bool, list[tuple[int, ...]]] = {False: [], True: []}

    def add(self, text: str, kept_out: bool, hashed: int, line: int, file: int) -> None:
        num_bytes = len(text) if text.isascii() else len(text.encode())
        first = self.files.setdefault(file, line)
        self.texts[kept_out].append(text)
        # The files come one after the other, so this one is the last.
        self._rows[kept_out].append((0, hashed, num_bytes, line - first, len(self.files) - 1))
        self.num_bytes += num_bytes
        self.size += num_bytes + DOCUMENT_COST
        self._last = num_bytes + DOCUMENT_COST

    def is_full(self, hashed: int) -> bool:
        """Whether it ends with the document that was added last."""
        if self.size < SHARD_BYTES:
            return False
        return self.size >= LARGEST_SHARD_BYTES or hashed * ENDING_BYTES < self._last * 2**64

    def documents(self) -> np.ndarray:
        """``[documents]`` of :data:`DOCUMENT`, those that train first; ``num_bytes`` is that of the whole text yet."""
        return np.array(self._rows[False] + self._rows[True], DOCUMENT)


def _count(fault: Fault, file: int, faults: dict[str, Any]) -> None:
    found = faults.setdefault(fault.reason, {"count": 0, "lost": 0, "places": []})
    found["count"] += 1
    found["lost"] += fault.lost
    if len(found["places"]) < PLACES:
        found["places"].append([file, fault.line, fault.detail])


def _is_lasting(unit: Unit, began: int, faults: dict[str, Any]) -> bool:
    """Whether the unit would be read the same once more: its files are those that were looked up, and had not been
    written to within a tick of a file system's clock; and what is missing of them is not the network's fault."""
    if "gone" in faults:
        return False
    for file in unit.files:
        if is_address(file.path):
            if not file.stamp or {"cut short", "damaged"} & faults.keys():
                return False
            continue
        try:
            path = Path(file.path)
            if local_file(file.name, path) != file or began - path.stat().st_mtime_ns <= SETTLED_NS:
                return False
        except (OSError, UserError):
            return False
    return True
