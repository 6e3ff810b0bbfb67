"""A source's text becomes a store of tokens: what the cache does not hold is made, by worker processes.

The main process only waits: it hands out units, adds up what is done, and opens the shards in the end. So as many cores
are used as there are.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_pro_fast.console import say
from llama_pro_fast.errors import UserError
from llama_pro_fast.files import why_refused
from llama_pro_fast.text.documents import Unit
from llama_pro_fast.text.encoding import EncoderSettings
from llama_pro_fast.text.pool import Pool
from llama_pro_fast.text.shards import read_signed, remember_shards, remove_leftovers, whole_shards
from llama_pro_fast.text.sources import ResolvedSource
from llama_pro_fast.text.store import FaultCount, RowCounts, Shard, TokenStore, default_cache
from llama_pro_fast.text.tokenizing import PLACES, UnitTokenizer, note_key
from llama_pro_fast.text.units import units_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LITTLE_BYTES = 2**22
"""On disk: less is tokenised before workers would have started."""
TELL_SECONDS = 0.25
SHOWN_REASONS, SHOWN_PLACES = 3, 3

Progress = Callable[[int, int, int, int, int], Any]


def tokenize_source(
    source: ResolvedSource,
    tokenizer: PreTrainedTokenizerFast,
    *,
    held_out: float,
    special_tokens: str = "text",
    cache_dir: str | Path | None = None,
    workers: int | None = None,
    max_bad_share: float = 0.01,
    progress: Progress | None = None,
) -> TokenStore:
    """The source's tokens; what is in the cache is not made again.

    Special tokens are added as the tokenizer does it, and its EOS to every document that does not end in it.

    Args:
        held_out: share of the documents kept out of training, chosen by :func:`is_held_out`; 1 is all of them, of a
            source that does not train.
        special_tokens: what their names are where they stand in a text, ``text`` or ``tokens``.
        cache_dir: by default :func:`default_cache`.
        workers: processes; by default one for each CPU.
        max_bad_share: so much of the source's rows (or bytes) may be unreadable.
        progress: called a few times a second with the bytes on disk that are done, those that were to be done, and the
            bytes of text, the documents and the tokens that are done; not called for a cache hit. What it raises ends
            the work.

    Raises:
        UserError: the source holds no text, or none on a side that is needed (training only where it trains); too much
            of it cannot be read; it is not what it should be; the cache cannot be written; the tokenizer is not a fast
            one; a worker was ended from outside. What has been done stays in the cache.
    """
    if not (0 < held_out < 1 or (held_out == 1 and not source.trains)):
        raise UserError(f"data.held_out is {held_out}: give a share above 0 and below 1")
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{type(tokenizer).__name__} is no fast tokenizer: the model's folder needs a tokenizer.json")
    cache = Path(os.path.expanduser(cache_dir)) if cache_dir is not None else default_cache()
    settings, units = EncoderSettings.of(tokenizer, special_tokens), units_of(source)
    try:
        notes, missing = _noted([note_key(unit, settings, held_out) for unit in units], cache)
        if missing:
            for folder in ("shards", "units"):
                (cache / folder).mkdir(parents=True, exist_ok=True)
            damaged = []
            try:
                remove_leftovers(cache / "shards")
                work = [(number, units[number]) for number in missing]
                for number, note, found in _made(work, settings, held_out, cache, workers, progress):
                    notes[number] = note
                    damaged += found
                remember_shards(cache, (shard["key"] for number in missing for shard in notes[number]["shards"]))
            except BaseException:
                with suppress(OSError):
                    remove_leftovers(cache / "shards")  # of workers that were ended on the way
                raise
            if damaged:
                more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
                where = f"{cache / 'shards' / damaged[0]}{more}"
                say(f"{where}: stored tokens of {source.name} were damaged; they are made again")
        store = _open(units, notes, cache, settings.key)
    except OSError as error:
        # Trouble with reading a source is a fault or a UserError by now, so this is the cache.
        raise UserError(f"{cache}: the cache of tokens cannot be used: {why_refused(error)} (--data.cache)") from error
    _check_rows(source, store.rows, max_bad_share)
    _check_sides(source, store, held_out)
    return store


def _noted(keys: Sequence[str], cache: Path) -> tuple[list[dict[str, Any] | None], list[int]]:
    """The notes there are, and the numbers of those that are missing, or of whose shards one is, or is not whole."""
    notes = [read_signed(cache / "units" / f"{key}.json") for key in keys]
    whole = whole_shards(cache, (shard["key"] for note in notes if note for shard in note["shards"]))
    return notes, [
        number
        for number, note in enumerate(notes)
        if note is None or not whole.issuperset(shard["key"] for shard in note["shards"])
    ]


def _made(
    work: Sequence[tuple[int, Unit]],
    settings: EncoderSettings,
    held_out: float,
    cache: Path,
    workers: int | None,
    progress: Progress | None,
) -> Iterator[tuple[int, dict[str, Any], list[str]]]:
    """(number, note, damaged shards) of each unit, in any order."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    tally = _Tally(dict(work), progress)
    count = min(workers or cpus, len(work))
    is_local = any("memory://" in file.path for _, unit in work for file in unit.files)
    if count == 1 or is_local or sum(unit.size for _, unit in work) < LITTLE_BYTES:
        tokenizer = UnitTokenizer(settings, held_out=held_out, cache=cache, threads=cpus)
        for number, unit in work:

            def report(*counts: int, number: int = number) -> None:
                tally.heard(number, counts)
                tally.tell()

            made = tokenizer.tokenize(unit, report)
            tally.finished(number)
            yield number, *made
    else:
        init = {"settings": asdict(settings), "held_out": held_out, "cache": os.path.abspath(cache)}
        with Pool(init, count, cpus) as pool:
            # The largest first, so that in the end none is left to run alone.
            largest_first = sorted(work, key=lambda each: each[1].size, reverse=True)
            for number, note, damaged in pool.work(largest_first, tally.heard, tally.tell):
                tally.finished(number)
                yield number, note, damaged
    tally.tell(last=True)


class _Tally:
    """Adds up what is done of some units, and tells it a few times a second."""

    def __init__(self, units: dict[int, Unit], progress: Progress | None) -> None:
        self._units, self._progress = units, progress
        self._all_bytes = sum(unit.size for unit in units.values())
        self._running: dict[int, Sequence[int]] = {}
        self._done = [0, 0, 0, 0]  # bytes on disk and of text, documents, tokens of units that are finished
        self._next, self._told = 0.0, 0

    def heard(self, number: int, counts: Sequence[int]) -> None:
        """A unit's bytes of text, documents and tokens so far."""
        self._running[number] = counts

    def finished(self, number: int) -> None:
        counts = self._units[number].size, *self._running.pop(number, (0, 0, 0))
        self._done = [a + b for a, b in zip(self._done, counts, strict=True)]

    def tell(self, *, last: bool = False) -> None:
        if self._progress is None or (time.monotonic() < self._next and not last):
            return
        self._next = time.monotonic() + TELL_SECONDS
        on_disk, *counts = self._done
        ratio = on_disk / counts[0] if counts[0] else 1.0
        for number, running in self._running.items():
            on_disk += min(self._units[number].size, int(running[0] * ratio))
            counts = [a + b for a, b in zip(counts, running, strict=True)]
        self._told = max(self._told, on_disk)  # which is an estimate for those that run
        self._progress(self._told, self._all_bytes, *counts)


def _open(units: Sequence[Unit], notes: Sequence[dict[str, Any]], cache: Path, encoder: str) -> TokenStore:
    shards, lines, faults = [], {}, {}
    rows = empty = lost = 0
    first_empty = None

    def place(unit: Unit, file: int, line: int) -> tuple[str, int]:
        name = unit.files[file].name
        return name, lines.get(name, 0) + line

    for unit, note in zip(units, notes, strict=True):
        for shard in note["shards"]:
            shards.append((shard["key"], [place(unit, *each) for each in shard["files"]]))
        rows, empty = rows + note["rows"], empty + note["empty"]
        if note["first_empty"] and not first_empty:
            first_empty = place(unit, *note["first_empty"])
        for reason, fault in note["faults"].items():
            found = faults.setdefault(reason, FaultCount(reason, 0, []))
            places = [(*place(unit, file, line), detail) for file, line, detail in fault["places"]]
            faults[reason] = FaultCount(reason, found.count + fault["count"], (found.places + places)[:PLACES])
            lost += fault["lost"]
        # Of a file in several units, which follow each other, each counts its own lines.
        for file, count in zip(unit.files, note["lines"], strict=True):
            lines[file.name] = lines.get(file.name, 0) + count
    counts = RowCounts(
        rows=rows,
        empty=empty,
        first_empty=first_empty,
        faults=sorted(faults.values(), key=lambda fault: -fault.count),
        lost_bytes=lost,
        all_bytes=sum(unit.size for unit in units),
    )
    opened = [Shard.open(cache / "shards" / key, files) for key, files in shards]
    return TokenStore(opened, encoder=encoder, rows=counts)


def _check_rows(source: ResolvedSource, rows: RowCounts, max_bad_share: float) -> None:
    """Stop where too much could not be read."""
    if rows.bad_share <= max_bad_share:
        return
    what = f"{rows.faulty:,} of {rows.rows:,} rows cannot be read"
    if rows.lost_bytes / max(1, rows.all_bytes) > rows.faulty / max(1, rows.rows):
        what = f"{rows.lost_bytes:,} of {rows.all_bytes:,} bytes cannot be read"
    reasons = [f"{reason} ({count:,}: {_listed(map(_place, places))})" for reason, count, places in rows.faults]
    raise UserError(
        f"{source.path}: {what}, {rows.bad_share:.2%} and more than the {max_bad_share:.2%} that may be: "
        f"{_listed(reasons, SHOWN_REASONS)}: mend or remove them, or raise --data.max_bad_share"
    )


def _place(place: tuple[str, int, str]) -> str:
    name, line, detail = place
    return f"{name} line {line}" + (f", {detail}" if detail else "")


def _listed(parts: Iterable[str], most: int = SHOWN_PLACES) -> str:
    parts = list(parts)
    return "; ".join(parts[:most]) + ("; …" if len(parts) > most else "")


def _check_sides(source: ResolvedSource, store: TokenStore, held_out: float) -> None:
    """Stop where a side that is needed is empty."""
    number = store.train.num_documents + store.held_out.num_documents
    if not number:
        raise UserError(
            f"{source.path}: no document with text ({store.num_empty} empty): give other files or another column"
        )
    none_held_out = not store.held_out.num_documents
    if not none_held_out and (store.train.num_documents or not source.trains):
        return
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
