"""Where text comes from: files, folders, patterns, the hub, addresses, and the built-in corpus.

A source in a recipe is a path (or `stdlib:code`, `stdlib:prose`); :func:`resolve_sources` looks it up and lists its
files. What is in them is read by :mod:`llama_pro_fast.text.units`, piece by piece.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from llama_pro_fast.config import DataConfig, Source
from llama_pro_fast.errors import UserError
from llama_pro_fast.files import check_regular
from llama_pro_fast.text import hub, stdlib
from llama_pro_fast.text.documents import Document, SourceFile
from llama_pro_fast.text.folders import (
    ENDINGS,
    UNKNOWN,
    WHOLE,
    Chosen,
    NotRead,
    choose,
    choose_split,
    describe,
    format_of,
    split_compression,
    splits_of,
)
from llama_pro_fast.text.places import (
    is_address,
    is_pattern,
    local_file,
    local_folder,
    local_pattern,
    remote_files,
)
from llama_pro_fast.text.units import read_unit, units_of

SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-4, 1000
STDLIB = ("stdlib:code", "stdlib:prose")


@dataclass(frozen=True, kw_only=True)
class ResolvedSource:
    """A source that exists.

    Attributes:
        name: how reports call it; unique among the sources of its role.
        path: as the user wrote it.
        role: ``domain`` or ``general``.
        weight: how often its training documents stand in an epoch; 0 is only measured; None where a share is given.
        share: its share of the tokens of every step, or None.
        text: column of the text in files with columns.
        split_by: column whose value decides on which side of the split a row falls; None: its text does.
        kind: ``files``, ``stdlib:code`` or ``stdlib:prose``.
        files: sorted by name.
        not_read: what is there beside them.
    """

    name: str
    path: str
    role: str
    weight: float | None
    share: float | None = None
    text: str
    split_by: str | None
    kind: str
    files: tuple[SourceFile, ...]
    not_read: tuple[NotRead, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether its documents are trained on by its own weight or share, and not only measured."""
        return self.share is not None or self.weight != 0

    def describe_not_read(self) -> str:
        """What is there and is not read, in a line; empty if nothing is."""
        return describe(self.not_read)


def resolve_sources(
    data: DataConfig, *, default_general: bool = True, only_measured: bool = False
) -> list[ResolvedSource]:
    """The domain sources, then the general ones.

    Args:
        default_general: where the recipe names no general text, `stdlib:prose` is it, only measured.
        only_measured: nothing will be trained on any of them, so weights, shares and the replay say nothing, and there
            may be no domain.

    Raises:
        UserError: no domain; a path that does not exist or holds nothing that can be read; a bad weight or share; two
            sources of one name.
    """
    if not data.domain and not only_measured:
        raise UserError("no text to learn: give --data.domain a file, a folder or stdlib:code")
    sources = [_resolve(source, "domain", 1.0) for source in listed(data.domain)]
    general = data.general or ("stdlib:prose" if default_general else [])
    replayed = bool(data.replay and data.general and not only_measured)
    sources += [_resolve(source, "general", 1.0 if replayed else 0.0) for source in listed(general)]
    if replayed:
        _check_replay(data.replay, [source for source in sources if source.role == "general"])
    by_name: dict[tuple[str, str], ResolvedSource] = {}
    for source in sources:
        other = by_name.setdefault((source.role, source.name), source)
        if other is not source:
            raise UserError(
                f"two {source.role} sources are called {source.name!r} ({other.path} and {source.path}): "
                "give one of them another `name`"
            )
    return [replace(source, weight=0.0, share=None) for source in sources] if only_measured else sources


def _check_replay(replay: float, general: list[ResolvedSource]) -> None:
    for source in general:
        if source.share is not None:
            raise UserError(
                f"{source.path}: share {source.share}, and data.replay {replay} for all general sources: leave one "
                "out; the replay is divided among them by their weights"
            )
    if not any(source.weight for source in general):
        raise UserError(
            f"data.replay {replay}: every general source has weight 0: give one of them a weight above 0, or "
            "--data.replay 0"
        )


def iterate_documents(source: ResolvedSource) -> Iterator[Document]:
    """Every document in the order of the files; a null or missing text comes as an empty document, and what cannot be
    read is passed over.

    Raises:
        UserError: a file holds nothing that is this source's text.
    """
    lines: dict[str, int] = {}
    for unit in units_of(source):
        reading = read_unit(unit)
        for index, item in reading:
            if isinstance(item, Document):
                before = lines.get(unit.files[index].name, 0)
                yield item._replace(line=before + item.line) if before else item
        for file, count in zip(unit.files, reading.lines, strict=True):
            lines[file.name] = lines.get(file.name, 0) + count


def listed(sources: str | list[Source] | None) -> list[Source]:
    """A recipe's text as a list of sources."""
    return [Source(path=sources)] if isinstance(sources, str) else sources or []


def _resolve(source: Source, role: str, default_weight: float) -> ResolvedSource:
    path, weight, share = source.path, source.weight, source.share
    if weight is not None and share is not None:
        raise UserError(f"{path}: weight {weight} and share {share}: give one of the two")
    if share is None:
        weight = default_weight if weight is None else weight
        if weight and not SMALLEST_WEIGHT <= weight <= LARGEST_WEIGHT:
            raise UserError(
                f"{path}: weight {weight} is not 0, nor a number from {SMALLEST_WEIGHT} to {LARGEST_WEIGHT:,}: 1 "
                "counts its documents once an epoch"
            )
    elif not 0 < share < 1:
        raise UserError(f"{path}: share {share} is not between 0 and 1 (both excluded)")
    kind = path if path in STDLIB else "files"
    if kind == "files":
        files, not_read, name = _files(source)
    else:
        if source.split or source.subset:
            raise UserError(f"{path}: has no splits and no subsets: leave `split:` and `subset:` out")
        files = [local_file(*file) for file in stdlib.stdlib_files(kind.removeprefix("stdlib:"))]
        not_read, name = [], kind
        if not files:
            raise UserError(f"{path}: this Python has no sources of its standard library: give a path of text")
    return ResolvedSource(
        name=source.name or name,
        path=path,
        role=role,
        weight=weight,
        share=share,
        text=source.text,
        split_by=source.split_by,
        kind=kind,
        files=tuple(files),
        not_read=tuple(not_read),
    )


def _files(source: Source) -> tuple[list[SourceFile], list[NotRead], str]:
    """A source's files, what is not read beside them, and its name."""
    given = source.path
    if not given:
        raise UserError("a source without a path: give a file, a folder or stdlib:code")
    path = Path(os.path.expanduser(given))
    if given.startswith("stdlib:"):
        raise UserError(f"{given}: no such built-in text: there are {' and '.join(STDLIB)}")
    if is_address(given):
        return _remote(source)
    if not os.path.exists(path):  # and not `path.exists()`, which fails on a name that is too long
        if hub.is_id(given):
            folder, chosen = hub.hub_folder(given, source.subset, source.split)
            name = given.rpartition("/")[2] + (f"-{source.subset}" if source.subset else "")
            return [local_file(n, folder / n) for n in chosen.names], chosen.not_read, name
        if is_pattern(given):
            return _pattern(source, path)
        raise UserError(
            f"{given}: no such file or folder: give a {ENDINGS} file, a folder of them, a data set of the hub "
            "(organisation/name) or stdlib:code"
        )
    check_regular(path)
    name = _name(path)
    if not path.is_dir():
        _refuse_split(source)
        _check_ending(path.name, given)
        return [local_file(path.name, path)], [], name
    path = hub.snapshot_of(path)
    configs = hub.read_configs(path / hub.CARD)
    if source.subset and not configs:
        raise UserError(f"{given}: no subset {source.subset!r}, a folder has none: give the folder of the subset")
    chosen = hub.choose_files(local_folder(path), configs, source.subset, source.split, given)
    return [local_file(n, path / n) for n in chosen.names], chosen.not_read, name


def _pattern(source: Source, path: Path) -> tuple[list[SourceFile], list[NotRead], str]:
    _refuse_subset(source)
    root, names = local_pattern(str(path))
    chosen = _matches(names, source)
    name = _name(root) if root.name else source.path
    return [local_file(n, root / n) for n in chosen.names], chosen.not_read, name


def _remote(source: Source) -> tuple[list[SourceFile], list[NotRead], str]:
    _refuse_subset(source)
    files, is_folder = remote_files(source.path)
    by_name = {file.name: file for file in files}
    if is_folder:
        chosen = choose(by_name, source.split, source.path)
    elif is_pattern(source.path):
        chosen = _matches(sorted(by_name), source)
    else:
        _refuse_split(source)
        _check_ending(files[0].name, source.path)
        chosen = Chosen(list(by_name), [], [])
    address = PurePosixPath(source.path.partition("::")[0].rstrip("/"))
    fixed = next((part for part in (address, *address.parents) if not is_pattern(str(part))), address)
    return [by_name[n] for n in chosen.names], chosen.not_read, _stem(fixed) if not is_folder else fixed.name


def _matches(names: list[str], source: Source) -> Chosen:
    """Of the files that match a pattern those whose ending can be read."""
    kept = [name for name in names if format_of(name)]
    not_read = [NotRead(name, UNKNOWN) for name in names if not format_of(name)]
    if not kept:
        if not not_read:
            raise UserError(f"{source.path}: no file matches this pattern: mend it (`**` is any number of folders)")
        raise UserError(
            f"{source.path}: no file of this pattern can be read ({describe(not_read)}): text is read from {ENDINGS}"
        )
    return (
        choose_split(kept, splits_of(kept), source.split, source.path, not_read)
        if source.split
        else Chosen(kept, not_read, [])
    )


def _check_ending(name: str, given: str) -> None:
    if format_of(name):
        return
    inner, compression = split_compression(name)
    ending = PurePosixPath(inner).suffix
    if compression and ending.lower() in (f".{known}" for known in WHOLE):
        raise UserError(f"{given}: unpack it: {ending} files have a compression of their own")
    if compression and not ending:
        raise UserError(f"{given}: its name does not say what is in it: call it …jsonl{compression}, or what it is")
    raise UserError(f"{given}: unknown ending {ending + compression!r}: text is read from {ENDINGS}")


def _refuse_subset(source: Source) -> None:
    if source.subset:
        raise UserError(f"{source.path}: no subset {source.subset!r}: only data sets of the hub have subsets")


def _refuse_split(source: Source) -> None:
    _refuse_subset(source)
    if source.split:
        raise UserError(
            f"{source.path}: no split {source.split!r}, it is one file: leave `split:` out; `split_by:` names a column "
            "that decides what is held out"
        )


def _name(path: Path) -> str:
    path = Path(os.path.abspath(path))  # `.` and `..` have no name, and a link's own name means more than its target's
    return path.name if path.is_dir() else _stem(path)


def _stem(path: PurePosixPath | Path) -> str:
    return PurePosixPath(split_compression(path.name)[0]).stem
