"""The text of the packaged base: what is taken from an archive, that nothing held out slips in, and what is allowed."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import base_text
import pytest
import yaml
from base_text import DOCUMENT, HELD_OUT, Package, Text, cleaned, download, packages, texts

from llama_pro_fast.config import DataConfig, Source
from llama_pro_fast.errors import UserError
from llama_pro_fast.recipe import RECIPES
from llama_pro_fast.text.documents import Document, is_held_out
from llama_pro_fast.text.sources import iterate_documents, resolve_sources

LICENSES = {"MIT", "BSD-2-Clause", "BSD-3-Clause", "Apache-2.0", "PSF-2.0"}
MODULES = [f"module{number}" for number in range(100)]
HELD_OUT_MODULE = next(name for name in MODULES if is_held_out(name, HELD_OUT))
TRAINED_MODULE = next(name for name in MODULES if not is_held_out(name, HELD_OUT))


def package(module: str = "pkg", **settings) -> Package:
    row = {"name": module, "version": "1.0", "archive": "sdist", "module": module, "license": "MIT", "sha256": "0" * 64}
    return Package(**(row | settings))


def sentences(about: str) -> str:
    return f"{about} is described here at such a length that it counts as a paragraph of its own."


def module(about: str) -> str:
    """Python source whose docstring is long enough to be a document."""
    docstring = "\n\n".join(sentences(about + more) for more in ("", " again", " and the rest"))
    return f'"""{docstring}\n"""\nx = 1\n'


TAKEN = {
    "docs/index.rst": sentences("The index"),
    "docs/guide/intro.md": sentences("The guide"),
    "doc/notes.txt": sentences("A note"),
    "docs/example.py": module("An example"),
    "src/pkg/__init__.py": module("The package"),
    "setup.py": module("The set-up"),
}
LEFT = {
    "README.rst": sentences("What is not in a folder of documentation"),
    "docs/changelog.rst": sentences("A changelog"),
    "docs/CHANGES.md": sentences("Changes"),
    "docs/releases/1.0.txt": sentences("A release"),
    "docs/whatsnew/v1.rst": sentences("News"),
    "docs/AUTHORS.txt": sentences("The authors"),
    "docs/license.rst": sentences("The licence"),
    "docs/requirements.txt": sentences("Requirements"),
    "docs/picture.svg": sentences("A picture"),
    "docs/tests/index.rst": sentences("Documentation of tests"),
    "tests/test_pkg.py": module("A test"),
    "src/pkg/testing/tools.py": module("A tool for tests"),
    "src/pkg/_vendor/other.py": module("Other people's code"),
    "src/pkg/small.py": '"""A phrase."""\n',
    "src/pkg/broken.py": '"""' + sentences("What does not parse") * 4 + '"""\ndef :\n',
}


@pytest.fixture(params=["sdist", "wheel"])
def archive(request, tmp_path) -> tuple[Package, Path]:
    """An archive with all of these files, as pip would have put it down."""
    files = TAKEN | LEFT
    if request.param == "wheel":
        path = tmp_path / "pkg-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            for name, content in reversed(files.items()):
                wheel.writestr(name, content)
    else:
        path = tmp_path / "pkg-1.0.tar.gz"
        with tarfile.open(path, "w:gz") as sdist:
            for name, content in reversed(files.items()):
                entry = tarfile.TarInfo(f"pkg-1.0/{name}")
                entry.size = len(content.encode())
                sdist.addfile(entry, io.BytesIO(content.encode()))
            link = tarfile.TarInfo("pkg-1.0/docs/link.rst")
            link.type, link.linkname = tarfile.SYMTYPE, "index.rst"
            sdist.addfile(link)
    return package(archive=request.param), path


def test_documentation_and_docstrings_are_taken_and_nothing_else(archive):
    row, path = archive
    root = "pkg-1.0/" if row.archive == "sdist" else ""
    found = list(texts(row, path))
    assert [text.path for text in found] == sorted(root + name for name in TAKEN)
    assert {text.package for text in found} == {row}
    by_path = {text.path.removeprefix(root): text.text for text in found}
    for name, content in TAKEN.items():
        if name.endswith(".py"):
            assert by_path[name].strip() == content.split('"""')[1].strip()
            assert "x = 1" not in by_path[name]
        else:
            assert by_path[name] == content


def test_bytes_that_are_no_utf_8_do_not_stop_it(tmp_path):
    path = tmp_path / "pkg.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("docs/latin.rst", sentences("Ünicode").encode("latin-1"))
    (text,) = texts(package(archive="wheel"), path)
    text.text.encode()
    assert text.text.endswith(sentences("nicode"))


def test_an_archive_cannot_write_outside_its_folder(tmp_path):
    path = tmp_path / "pkg.tar.gz"
    with tarfile.open(path, "w:gz") as sdist:
        entry = tarfile.TarInfo("../escaped.rst")
        sdist.addfile(entry, io.BytesIO(b""))
    with pytest.raises(tarfile.FilterError):
        list(texts(package(), path))


# What is left out of the documents


def document(module: str, *paragraphs: str, path: str = "docs/a.rst") -> Text:
    return Text(package(module), path, "\n\n".join(paragraphs))


ONE, TWO, THREE, FOUR = (sentences(name) for name in ("First", "Second", "Third", "Fourth"))


def clean(*documents: Text, prose: tuple[str, ...] = ()) -> list[str]:
    return [text.text for text in cleaned(documents, prose)]


def test_a_paragraph_that_stood_before_is_left_out():
    found = clean(document(TRAINED_MODULE, ONE, TWO), document(TRAINED_MODULE, THREE, ONE))
    assert found == [f"{ONE}\n\n{TWO}\n", f"{THREE}\n"]


def test_within_one_document_too():
    assert clean(document(TRAINED_MODULE, ONE, TWO, ONE)) == [f"{ONE}\n\n{TWO}\n"]


def test_paragraphs_are_told_by_their_words_not_by_their_layout():
    wrapped = ONE.replace(" ", "\n    ")
    assert clean(document(TRAINED_MODULE, ONE, TWO), document(TRAINED_MODULE, wrapped, THREE))[1] == f"{THREE}\n"
    assert clean(document(TRAINED_MODULE, wrapped)) == [f"{wrapped}\n"], "what stays keeps its layout"


def test_short_paragraphs_may_recur():
    heading = "Parameters\n----------"
    found = clean(document(TRAINED_MODULE, heading, ONE), document(TRAINED_MODULE, heading, TWO))
    assert found == [f"{heading}\n\n{ONE}\n", f"{heading}\n\n{TWO}\n"]


def test_paragraphs_of_held_out_prose_are_left_out():
    assert clean(document(TRAINED_MODULE, ONE, TWO), prose=(f"Title\n\n{TWO}",)) == [f"{ONE}\n"]


def test_held_out_modules_come_first_and_keep_what_both_sides_have():
    """So what a held-out text says is on its side alone, whatever the order of the packages."""
    training, held_out = document(TRAINED_MODULE, ONE, TWO), document(HELD_OUT_MODULE, TWO, THREE)
    for documents in ((training, held_out), (held_out, training)):
        found = list(cleaned(documents, ()))
        assert [text.package.module for text in found] == [HELD_OUT_MODULE, TRAINED_MODULE]
        assert [text.text for text in found] == [f"{TWO}\n\n{THREE}\n", f"{ONE}\n"]


def test_no_paragraph_of_a_held_out_text_is_left_on_the_training_side():
    every = [sentences(f"Number {n}") for n in range(12)]
    documents = [
        document((HELD_OUT_MODULE, TRAINED_MODULE)[n % 2], *(every[(n + k) % 12] for k in range(4))) for n in range(8)
    ]
    sides = {True: set(), False: set()}
    for text in cleaned(documents, (every[0],)):
        sides[is_held_out(text.package.module, HELD_OUT)].update(text.text.strip().split("\n\n"))
    assert sides[True]
    assert sides[False]
    assert not (sides[True] | {every[0]}) & sides[False]


def test_a_document_of_which_nothing_is_left_is_dropped():
    assert len(clean(document(TRAINED_MODULE, ONE), document(TRAINED_MODULE, "Heading", ONE))) == 1


def test_a_long_file_becomes_several_documents_cut_between_paragraphs():
    """So that a page of half a megabyte is not all that many steps in a row see."""
    paragraphs = [sentences(f"Number {n}") for n in range(1000)]
    found = list(cleaned([document(TRAINED_MODULE, *paragraphs, path="docs/long.rst")], ()))
    assert "\n\n".join(text.text.rstrip("\n") for text in found) == "\n\n".join(paragraphs)
    assert {text.path for text in found} == {"docs/long.rst"}
    lengths = [len(text.text) for text in found]
    assert len(lengths) > 3
    assert all(DOCUMENT <= length < 1.1 * DOCUMENT for length in lengths[:-1])


def test_what_is_longer_than_a_document_is_no_paragraph():
    dump = "0xdeadbeef " * (DOCUMENT // 11 + 1)
    assert clean(document(TRAINED_MODULE, ONE, dump, TWO)) == [f"{ONE}\n\n{TWO}\n"]


# The allow-list


def test_every_package_has_a_permissive_licence_and_a_digest():
    rows = packages()
    assert len(rows) > 10
    for row in rows:
        assert set(row.license.split(" AND ")) <= LICENSES, row
        assert re.fullmatch(r"[0-9a-f]{64}", row.sha256), row
        assert row.archive in ("sdist", "wheel"), row
        assert re.fullmatch(r"[0-9][0-9.]*", row.version), row
        assert row.module.isidentifier(), row
    for field in ("name", "module", "sha256"):
        assert len({getattr(row, field) for row in rows}) == len(rows), f"{field} of two packages is the same"


def test_some_packages_are_held_out_and_most_are_not():
    held_out = [row.name for row in packages() if is_held_out(row.module, HELD_OUT)]
    assert 0 < len(held_out) < len(packages()) / 4


@pytest.mark.parametrize("name", ["prose-3m", "quickstart"])
def test_the_recipes_hold_the_same_modules_out(name):
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    assert recipe["data"]["held_out"] == HELD_OUT


def test_the_base_is_trained_by_module_and_on_no_code():
    sources = yaml.safe_load((RECIPES / "prose-3m.yaml").read_text())["data"]["domain"]
    assert {(row["path"], row.get("split")) for row in sources} == {
        ("base-text.jsonl", "module"),
        ("stdlib:prose", None),
    }


# Getting the archives, and the whole


def test_pip_is_held_to_the_digest_and_asked_for_nothing_else(tmp_path, monkeypatch):
    commands = []

    def pip(command, **_):
        target = Path(command[command.index("--dest") + 1])
        target.mkdir()
        (target / "archive").write_text("")
        commands.append((command, Path(command[-1]).read_text()))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(base_text.subprocess, "run", pip)
    rows = [package("one", sha256="1" * 64), package("two", archive="wheel", sha256="2" * 64)]
    assert download(rows, tmp_path) == {row: tmp_path / row.name / "archive" for row in rows}
    for (command, requirement), row in zip(commands, rows, strict=True):
        assert requirement == f"{row.name}==1.0 --hash=sha256:{row.sha256}\n"
        assert "--no-deps" in command
        assert ("--no-binary" in command) == (row.archive == "sdist")
        assert ("--only-binary" in command) == (row.archive == "wheel")


def test_what_pip_says_is_one_line_that_names_the_package(tmp_path, monkeypatch):
    said = "WARNING: old pip\nERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n  Expected sha256 1\nERROR: more\n"
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(base_text.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError) as caught:
        download([package("one")], tmp_path)
    assert str(caught.value) == "one 1.0: pip did not get it: ERROR: THESE PACKAGES DO NOT MATCH THE HASHES"


@pytest.fixture
def collect(archive, tmp_path, monkeypatch):
    """Write the text of two packages, one of which is held out; nothing is downloaded."""
    row, path = archive
    rows = [dataclasses.replace(row, name=m, module=m) for m in (TRAINED_MODULE, HELD_OUT_MODULE)]
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        wheel.writestr("docs/other.rst", f"{sentences('The index')}\n\n{ONE}\n\n{TWO}\n")
    archives = dict(zip(rows, (path, tmp_path / "other.whl"), strict=True))
    prose = [Document(sentences("The guide"), HELD_OUT_MODULE), Document(sentences("A note"), TRAINED_MODULE)]
    monkeypatch.setattr(base_text, "packages", lambda: rows)
    monkeypatch.setattr(base_text, "download", lambda rows, folder: archives)
    monkeypatch.setattr(base_text, "stdlib_files", lambda kind: kind)
    docstrings = base_text.prose_documents
    monkeypatch.setattr(base_text, "prose_documents", lambda files: prose if files == "prose" else docstrings(files))
    return lambda name="out.jsonl": base_text.main([str(tmp_path / name)])


def test_the_file_is_rows_that_a_source_split_by_module_reads(collect, tmp_path, capsys):
    assert collect() == 0
    path = tmp_path / "out.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {frozenset(row) for row in rows} == {frozenset({"text", "module", "package", "license", "path"})}
    source = resolve_sources(DataConfig(domain=[Source(path=str(path), split_by="module")]))[0]
    assert [document.split_key for document in iterate_documents(source)] == [row["module"] for row in rows]
    assert {row["module"] for row in rows} == {HELD_OUT_MODULE, TRAINED_MODULE}

    training = "".join(row["text"] for row in rows if row["module"] == TRAINED_MODULE)
    assert sentences("The package") in training
    assert sentences("A note") in training, "the standard library's training side is no reason to leave a text out"
    assert sentences("The guide") not in training, "a held-out docstring of the standard library is trained on"
    assert sentences("The index") not in training, "a text of a held-out package is trained on"
    assert f"{len(rows)} documents" in capsys.readouterr().out


def test_collecting_twice_gives_the_same_bytes(collect, tmp_path):
    collect("a.jsonl")
    collect("b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


@pytest.mark.parametrize("same", [True, False])
def test_it_says_whether_that_is_the_text_of_the_packaged_base(collect, tmp_path, monkeypatch, capsys, same):
    collect()
    digest = hashlib.sha256((tmp_path / "out.jsonl").read_bytes()).hexdigest()
    sources = {"text": {"python": "3.11.7", "sha256": digest if same else "0" * 64}}
    monkeypatch.setattr(base_text, "_sources", lambda: sources)
    capsys.readouterr()
    collect()
    said = capsys.readouterr().out
    assert digest in said
    assert ("not the text the packaged base was trained on" in said) != same
    assert ("3.11.7" in said) != same


def test_a_missing_folder_is_said_before_anything_is_downloaded(collect, tmp_path, monkeypatch):
    monkeypatch.setattr(base_text, "download", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(UserError, match="no folder"):
        collect("new/out.jsonl")


def test_a_failed_collection_leaves_no_file(collect, tmp_path, monkeypatch):
    def failing(rows, folder):
        raise UserError("pip did not get it")

    monkeypatch.setattr(base_text, "download", failing)
    with pytest.raises(UserError):
        collect()
    assert not (tmp_path / "out.jsonl").exists()
