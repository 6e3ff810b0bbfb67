"""The built-in corpus: code without prose, prose without code, and one split for both."""

from __future__ import annotations

import ast
import io
import textwrap
import tokenize
from pathlib import Path

import pytest

from llama_pro_fast.text.documents import is_held_out
from llama_pro_fast.text.stdlib import (
    SKIPPED_FOLDERS,
    TOPICS_FILE,
    code_documents,
    prose_documents,
    stdlib_files,
    strip_comments_and_docstrings,
)


def strip(source: str) -> str:
    source = textwrap.dedent(source)
    return strip_comments_and_docstrings(source, ast.parse(source))


def without_docstrings(tree: ast.Module) -> str:
    """The tree's dump, `pass` standing for a body that was only a docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Module):
            if node.body and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
            if not node.body and not isinstance(node, ast.Module):
                node.body = [ast.Pass()]
    return ast.dump(tree)


def stripped(files: list[tuple[str, Path]]) -> list[tuple[str, str]]:
    """(relative name, stripped source) of every module among them."""
    return [(name, document.text) for name, path in files for document in code_documents([(name, path)])]


@pytest.fixture(scope="module")
def code() -> list[tuple[str, str]]:
    return stripped(FILES)


FILES = stdlib_files("code")


@pytest.mark.slow
def test_every_module_compiles_and_has_no_docstring(code):
    assert len(code) > 300
    for name, text in code:
        # Level 2 of the compiler differs from level 1 in that it drops docstrings: here there is nothing to drop.
        kept, dropped = (compile(text, name, "exec", dont_inherit=True, optimize=level) for level in (1, 2))
        assert kept == dropped, name


@pytest.mark.slow
def test_comments_are_gone_and_nothing_else_has_changed():
    paths, some = dict(FILES), stripped(FILES[::15])  # all of them agree, and take half a minute
    assert len(some) > 20
    for name, text in some:
        assert tokenize.COMMENT not in {token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)}
        with tokenize.open(paths[name]) as file:
            original = ast.parse(file.read())
        assert ast.dump(ast.parse(text)) == without_docstrings(original), name


@pytest.mark.slow
def test_tests_packages_and_tables_are_left_out(code):
    names = [name for name, _ in code]
    assert names == sorted(names)
    assert not [name for name in names if SKIPPED_FOLDERS & set(name.split("/")[:-1])]
    assert not [name for name in names if name.startswith(("pydoc_data", "_sysconfigdata", "encodings/cp125"))]
    assert {"textwrap.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)


def test_layout_stays_and_lines_left_empty_go():
    source = '''\
    #!/usr/bin/env python
    # licence

    """Module."""

    import os  # why


    # a heading

    class A:
        """Class."""

        x = "# no comment"

        def f(self):
            """Ünïcode """; return """kept


            as it is"""  # gone

        def g(self):
            """One.

            Two.
            """

            # inside
            return [1,  # first
                    # nothing
                    2]

        async def h(self): "only"

        class B:
            ("only" " this")
    '''
    assert strip(source) == textwrap.dedent('''\
    import os


    class A:

        x = "# no comment"

        def f(self):
            pass; return """kept


            as it is"""

        def g(self):
            return [1,
                    2]

        async def h(self): pass

        class B:
            pass
    ''')


def test_a_module_of_words_only_leaves_nothing():
    assert strip('"""Doc."""\n# comment\n') == ""


def test_prose_is_docstrings_and_topics():
    files = [(name, path) for name, path in stdlib_files("prose") if name.startswith(("textwrap", "pydoc_data"))]
    documents = list(prose_documents(files))
    (textwrap_doc,) = [document.text for document in documents if document.split_key == "textwrap"]
    assert textwrap_doc.startswith("Text wrapping and filling.\n\n")
    assert "def " not in textwrap_doc
    topics = [document.text for document in documents if document.split_key != "textwrap"]
    assert len(topics) > 50
    assert any(text.startswith('The "while" statement') for text in topics)
    for document in documents:
        document.text.encode()


def test_code_and_prose_share_the_split():
    some = ("json", "random", "textwrap", "string.py", "types.py")
    keys = []
    for kind, documents in (("code", code_documents), ("prose", prose_documents)):
        files = [(name, path) for name, path in stdlib_files(kind) if name.startswith(some)]
        keys.append({document.split_key for document in documents(files)})
    assert keys[0] == keys[1] == {"json", "random", "textwrap", "string", "types"}


def test_topics_quote_each_other_and_stay_on_one_side():
    topics = [(name, path) for name, path in stdlib_files("prose") if name == TOPICS_FILE]
    assert {document.split_key for document in prose_documents(topics)} == {"pydoc_data"}


@pytest.mark.parametrize(
    ("module", "halves"),
    [
        ("decimal", ["decimal.py", "_pydecimal.py"]),
        ("io", ["io.py", "_pyio.py"]),
        ("abc", ["abc.py", "_py_abc.py"]),
        ("collections", ["collections/__init__.py", "collections/abc.py", "_collections_abc.py"]),
        ("weakref", ["weakref.py", "_weakrefset.py"]),
    ],
)
def test_a_module_and_its_other_half_stay_on_one_side(module, halves):
    """The C module's stand-in in Python holds the same docstrings, often the same code."""
    files = [(name, path) for name, path in FILES if name in halves]
    assert len(files) == len(halves)
    for documents in (code_documents, prose_documents):
        keys = {document.split_key for document in documents(files)}
        assert keys == {module}


def test_a_name_that_begins_with_two_underscores_keeps_them():
    keys = [document.split_key for document in code_documents([f for f in FILES if f[0].startswith("__")])]
    assert keys
    assert all(key.startswith("__") for key in keys)


def test_the_default_split_holds_out_some_modules():
    modules = {name.split("/")[0].removesuffix(".py") for name, _ in FILES}
    held_out = {module for module in modules if is_held_out(module, 0.02)}
    assert {"json", "random", "trace"} <= held_out
    assert len(held_out) < 0.1 * len(modules)
