"""Which files of a folder are its text, told by their names alone.

A folder is read as one kind: rows, or .json files, or plain text and source code. So the README beside a table, the
package.json of a source tree and the test split of a data set are not trained on, and what is left out is listed.
"""

from __future__ import annotations

import fnmatch
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from llama_pro_fast.errors import UserError

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
CODE = re.findall(
    r"\S+",
    """ada adb ads agda asm awk bash c c++ cc cl clj cljs cmake coffee cpp cs css cu cuh cxx d dart elm erl ex exs f f03
    f90 f95 fish for fs fsx glsl go gradle graphql groovy h hcl hh hlsl hpp hrl hs htm html hxx idr java jl js jsx kt
    kts lean less lhs lisp lsp lua m metal mjs cjs mk ml mli mm move nim nix pas php pl pm pp proto ps1 py pyi pyx r
    rb rkt rs s sass scala scm scss sh sol sql sty sv svelte swift tcl tex tf thy ts tsx v vb vhd vhdl vim vue wgsl
    zig zsh""",
)
"""Endings of source code."""
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".json": "json",
    ".txt": "txt",
    ".md": "txt",
    ".markdown": "txt",
    ".rst": "txt",
} | {f".{ending}": "code" for ending in CODE}
ROWS = {"jsonl", "csv", "tsv", "parquet", "arrow"}
WHOLE = {"parquet", "arrow"}
"""Formats with a compression of their own, which are not read out of a .gz."""
ENDINGS = ".jsonl, .json, .csv, .tsv, .txt, .md, .rst, source code (each also as .gz or .zst), .parquet or .arrow"

SIDE_NAMES = re.compile(r"(readme|licen[sc]e|copying|notice|changelog|citation|contributing)s?([-_.].*)?")
"""Files called so are about a folder and not its text, unless they are rows or source code."""
SIDE_FILES = (
    *("requirements*.txt", "cmakelists.txt", "robots.txt", "merges.txt", "vocab.*", "tokenizer*.json", "cache-*.arrow"),
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "*.index.json"),
    *(
        "special_tokens_map.json",
        "added_tokens.json",
        "generation_config.json",
        "package.json",
        "package-lock.json",
        "tsconfig*.json",
    ),
)
_SIDE_FILE = re.compile("|".join(map(fnmatch.translate, SIDE_FILES)))
SIDE_FOLDERS = {"__pycache__", "node_modules", "__macosx"}

SPLITS = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation", "testing": "test"} | {
    name: name for name in ("train", "validation", "test", "eval")
}
"""Names of splits, and what they mean."""


SIDE, UNKNOWN = "side file", "unknown ending"


class NotRead(NamedTuple):
    """A file that is there and is not read."""

    name: str
    why: str


class Chosen(NamedTuple):
    """Of a folder's names those that are read, in order; those that are not; and its splits, if it has several."""

    names: list[str]
    not_read: list[NotRead]
    splits: list[str]


def format_of(name: str) -> str | None:
    """The format a file's name tells, a key of the readers; None where it tells none that can be read."""
    inner, compression = split_compression(name)
    known = FORMATS.get(posixpath.splitext(inner)[1].lower())
    return None if compression and known in WHOLE else known


def split_compression(name: str) -> tuple[str, str]:
    """``("rows.jsonl", ".gz")`` of ``rows.jsonl.gz``; the second is empty where the file is not compressed."""
    ending = posixpath.splitext(name)[1].lower()
    return (name[: -len(ending)], ending) if ending in COMPRESSED else (name, "")


def choose(names: Iterable[str], split: str | None, where: str) -> Chosen:
    """The files of a folder that are its text.

    Args:
        names: relative to the folder, of everything in it and below.
        split: the one that is asked for.
        where: names the folder in errors.

    Raises:
        UserError: there is no text, or no such split.
    """
    not_read, by_format = [], {}
    for name in sorted(names):
        if is_hidden(name):
            continue
        if is_side_file(name):
            not_read.append(NotRead(name, SIDE))
        elif (known := format_of(name)) is None:
            not_read.append(NotRead(name, UNKNOWN))
        else:
            by_format.setdefault(known, []).append(name)
    count = Counter({known: len(files) for known, files in by_format.items()})
    rows, plain = sum(count[known] for known in ROWS), count["txt"] + count["code"]
    if rows and rows >= count["code"]:
        read, why = ROWS, "beside rows"
    elif count["json"] > plain:
        read, why = {"json"}, "beside .json"
    else:
        read, why = {"txt", "code"}, "beside plain text or code"
    kept = sorted(name for known in read for name in by_format.get(known, ()))
    not_read += [NotRead(name, why) for known in by_format.keys() - read for name in by_format[known]]
    if not kept:
        found = f" ({describe(not_read)})" if not_read else ""
        raise UserError(f"{where}: the folder holds no file with text{found}: put {ENDINGS} files in it")
    # A source tree may well hold train.py and a folder called test.
    found = {} if count["code"] and "code" in read else splits_of(kept)
    return choose_split(kept, found, split, where, sorted(not_read))


def choose_split(
    names: Sequence[str], found: dict[str, str], split: str | None, where: str, not_read: Sequence[NotRead] = ()
) -> Chosen:
    """Of ``names`` those of one split.

    Args:
        found: split of each name that has one.
        split: the one that is asked for; None: ``train``, where there are several.

    Raises:
        UserError: there is no such split.
    """
    splits = sorted(set(found.values()))
    if split is None and len(splits) < 2:
        return Chosen(list(names), list(not_read), splits)
    wanted = split or "train"
    same = [known for known in splits if known == wanted] or [s for s in splits if _meaning(s) == _meaning(wanted)]
    if not same:
        if not splits:
            remedy = "leave `split:` out (and `split_by:` names a column that decides what is held out)"
            raise UserError(f"{where}: no split {split!r}, its files name none: {remedy}")
        raise UserError(f"{where}: no split {wanted!r} among {', '.join(splits)}: name one of them with `split:`")
    kept = [name for name in names if found.get(name) in same]
    chosen = set(kept)
    others = [NotRead(n, f"split {found[n]}" if n in found else "no split") for n in names if n not in chosen]
    return Chosen(kept, [*not_read, *others], splits)


def splits_of(names: Sequence[str]) -> dict[str, str]:
    """The split of each file: by a folder or a file called so, as ``train/…``, ``test.jsonl``,
    ``train_sft-00000-of-00002.parquet``, or ``news_dev.csv`` beside ``news_train.csv``.

    Where none is called train, the files without a split are the training text of those with one.
    """
    found, company = {}, {}
    for name in names:
        *folders, file = PurePosixPath(split_compression(name)[0].lower()).with_suffix("").parts
        if match := _SHARD.fullmatch(file):
            found[name] = match["split"]
        elif folder := next((folder for folder in folders if folder in SPLITS), None):
            found[name] = folder
        elif match := _WORD.search(file):
            rest = file[: match.start()] + "*" + file[match.end() :]
            company.setdefault(("/".join(folders), re.sub(r"\d+", "0", rest)), {})[name] = match[0]
    for together in company.values():
        if "train" in map(_meaning, together.values()):
            found |= together
    if found and not any(split.startswith("train") for split in found.values()):
        found |= {name: "train" for name in names if name not in found}
    return found


_KEYWORDS = "|".join(sorted(SPLITS, key=len, reverse=True))
_SHARD = re.compile(
    rf"(?P<split>(?:{_KEYWORDS})(?:_\w+?)?(?=-\d+-of-\d)|{_KEYWORDS})(?:[-_.]?\d+)?(?:-of-\d+)?(?:-[0-9a-f]{{16}})?"
)
_WORD = re.compile(rf"(?<![^\W\d_])(?:{_KEYWORDS})(?![^\W\d_])")


def _meaning(split: str) -> str:
    return SPLITS.get(split, split)


def is_hidden(name: str) -> bool:
    """Whether the file, or a folder it lies in, is hidden."""
    return name.startswith(".") or "/." in name


def is_side_file(name: str) -> bool:
    """Whether a file is about the others in its folder, and not text of its own."""
    *folders, file = name.lower().split("/")
    if SIDE_FOLDERS.intersection(folders) or _SIDE_FILE.match(file):
        return True
    return SIDE_NAMES.fullmatch(file) is not None and format_of(file) in (None, "txt")


def describe(not_read: Sequence[NotRead]) -> str:
    """What is not read, in a line: ``LICENSE.txt, requirements.txt, 3 .png, 2 .jsonl (split test)``."""
    parts = []
    for why in sorted({entry.why for entry in not_read}, key=lambda why: (why != SIDE, why != UNKNOWN, why)):
        by_ending: dict[str, list[str]] = {}
        for name in (entry.name for entry in not_read if entry.why == why):
            inner, compression = split_compression(name)
            by_ending.setdefault(posixpath.splitext(inner)[1] + compression, []).append(name)
        said: list[str] = []
        for ending, names in by_ending.items():
            said += names if len(names) < 3 else [f"{len(names)} {ending or 'without an ending'}"]
        parts.append(", ".join(said) + ("" if why in (SIDE, UNKNOWN) else f" ({why})"))
    return ", ".join(parts)
