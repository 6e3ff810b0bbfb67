"""The built-in corpus: the standard library of the running interpreter, as code and as prose.

It needs no download and no disk, is of good quality, and its two halves are as different as a domain and a general
text should be:

- code: every module's source without docstrings and comments. The layout stays as its authors wrote it;
- prose: the docstrings, one document per module, and the language reference that ``help()`` reads
  (``pydoc_data.topics``), one document per topic.

The split key of both is the top-level module, so the prose about a held-out module is held out too, and no training
text of one corpus gives away a held-out text of the other. A module and its other half (``decimal`` and
``_pydecimal``, ``abc`` and ``_py_abc``, ``weakref`` and ``_weakrefset``) have one key, and so have all topics, which
quote each other.

Left out: tests (their deliberately odd code is a poor model), other people's packages, and generated tables of data.
"""

from __future__ import annotations

import ast
import inspect
import io
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

from llama_pro_fast.text.documents import Document

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "turtledemo", "__pycache__", "pydoc_data"}
TOPICS_FILE = "pydoc_data/topics.py"
HALVES = {"collections_abc": "collections", "weakrefset": "weakref"}
"""Private modules that are part of a public one of another name."""
SMALLEST_PROSE = 200
"""Characters. Shorter than this a module's docstrings are a phrase, not a text."""


def stdlib_files(kind: str) -> list[tuple[str, Path]]:
    """Name relative to the standard library and path of every file that ``code`` or ``prose`` is made from, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, subfolders, names in os.walk(root):
        # `config-3.11-x86_64-linux-gnu` is no package. Pruned on the way down: site-packages can be vast.
        subfolders[:] = [name for name in subfolders if name.isidentifier() and name not in SKIPPED_FOLDERS]
        for name in names:
            # `_sysconfigdata` holds the build flags of this machine.
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                files.append((path.relative_to(root).as_posix(), path))
    # As code the reference would be one literal full of the prose corpus.
    if kind == "prose" and (root / TOPICS_FILE).is_file():
        files.append((TOPICS_FILE, root / TOPICS_FILE))
    return sorted(files)


def code_documents(files: Iterable[tuple[str, Path]]) -> Iterator[Document]:
    """Each module's code; modules that do not parse and generated tables are passed over."""
    for name, source, tree in _parsed(files):
        yield Document(strip_comments_and_docstrings(source, tree), _top_level(name))


def prose_documents(files: Iterable[tuple[str, Path]]) -> Iterator[Document]:
    """Each module's docstrings and each topic of the reference."""
    for name, _, tree in _parsed(files):
        if name == TOPICS_FILE:
            literal = next(node.value for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign))
            for _, text in sorted(ast.literal_eval(literal).items()):
                yield Document(_encodable(text), _top_level(name))
            continue
        text = "\n\n".join(inspect.cleandoc(statement.value.value).strip() for _, statement in _docstrings(tree))
        if len(text) >= SMALLEST_PROSE:
            yield Document(_encodable(text), _top_level(name))


def strip_comments_and_docstrings(source: str, tree: ast.Module) -> str:
    """``source`` without comments and docstrings; lines left empty by that go, all other layout stays.

    Args:
        source: a module's text with ``\\n`` line ends.
        tree: its syntax tree.
    """
    lines = source.split("\n")
    cuts: list[tuple[tuple[int, int], tuple[int, int], str]] = []  # (row from 0, column) begin and end, replacement
    blank: set[int] = set()
    bodies: list[int] = []  # first rows after a function's docstring
    for owner, statement in _docstrings(tree):
        # ast counts columns in UTF-8 bytes.
        begin = (statement.lineno - 1, _characters(lines[statement.lineno - 1], statement.col_offset))
        end = (statement.end_lineno - 1, _characters(lines[statement.end_lineno - 1], statement.end_col_offset))
        before, after = lines[begin[0]][: begin[1]], lines[end[0]][end[1] :].lstrip()
        alone = not before.strip() and (not after or after.startswith("#"))
        # A body needs a statement, and what shares the line (`class A: "doc"; x = 1`) keeps its grammar.
        needed = not alone or (len(owner.body) == 1 and not isinstance(owner, ast.Module))
        cuts.append((begin, end, "pass" if needed else ""))
        if isinstance(owner, ast.FunctionDef | ast.AsyncFunctionDef) and not needed:
            bodies.append(end[0] + 1)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            cuts.append(((token.start[0] - 1, token.start[1]), (token.end[0] - 1, token.end[1]), ""))
        elif token.type == tokenize.NL and not lines[token.start[0] - 1].strip():
            blank.add(token.start[0] - 1)

    removed: set[int] = set()
    for begin, end, replacement in sorted(cuts, reverse=True):
        lines[begin[0]] = (lines[begin[0]][: begin[1]] + replacement + lines[end[0]][end[1] :]).rstrip()
        removed.update(range(begin[0] + 1, end[0] + 1))
        if not lines[begin[0]]:
            removed.add(begin[0])
    for row in bodies:  # the blank line that set the docstring apart goes with it
        while row in blank:
            removed.add(row)
            row += 1

    kept: list[str] = []
    blanks = 2  # none at the top, and never more than two where a comment has gone from between
    for row, line in enumerate(lines):
        if row in removed:
            continue
        blanks = blanks + 1 if row in blank else 0
        if blanks <= 2 and (kept or line):
            kept.append(line)
    return "\n".join(kept).rstrip() + "\n" if any(kept) else ""


def _parsed(files: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, str, ast.Module]]:
    for name, path in files:
        try:
            with tokenize.open(path) as file:
                source = file.read()
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        # `encodings` is mostly character maps of 256 lines each, all with the same note on how they were generated.
        if "gencodec.py" not in source[:500]:
            yield name, source, tree


def _docstrings(node: ast.AST) -> Iterator[tuple[ast.AST, ast.Expr]]:
    """Every (module, class or function; the statement that is its docstring) from ``node`` down, in source order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and type(first.value.value) is str:
            yield node, first
    # Not `ast.walk`: it visits the expressions too, which are most of a tree.
    for field in ("body", "orelse", "handlers", "finalbody", "cases"):
        for child in getattr(node, field, ()):
            yield from _docstrings(child)


def _encodable(text: str) -> str:
    # A docstring's value may hold half of a surrogate pair, written as an escape.
    return text.strip().encode(errors="replace").decode() + "\n"


def _top_level(name: str) -> str:
    module = re.sub(r"^_(py_?)?(?=[a-z])", "", name.split("/")[0].removesuffix(".py"))
    return HALVES.get(module, module)


def _characters(line: str, byte_offset: int) -> int:
    return byte_offset if line.isascii() else len(line.encode()[:byte_offset].decode())
