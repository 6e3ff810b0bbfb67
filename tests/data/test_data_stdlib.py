"""The built-in corpus: code without prose, prose without code, and one split for both."""

from __future__ import annotations

import ast
import io
import textwrap
import tokenize

import pytest

from llama_pro_fast.data.documents import is_held_out
from llama_pro_fast.data.stdlib import (
    SKIPPED_FOLDERS,
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


@pytest.fixture(scope="module")
def code() -> list[tuple[str, str]]:
    """(relative name, stripped source) of every module."""
    return [(name, document.text) for name, path in FILES for document in code_documents([(name, path)])]


FILES = stdlib_files("code")


def test_every_module_compiles_and_has_no_docstring(code):
    assert len(code) > 300
    for name, text in code:
        # Level 2 of the compiler differs from level 1 in that it drops docstrings: here there is nothing to drop.
        kept, dropped = (compile(text, name, "exec", dont_inherit=True, optimize=level) for level in (1, 2))
        assert kept == dropped, name


def test_comments_are_gone_and_nothing_else_has_changed(code):
    paths = dict(FILES)
    for name, text in code[::15]:  # all of them agree, and take half a minute
        assert tokenize.COMMENT not in {token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)}
        with tokenize.open(paths[name]) as file:
            original = ast.parse(file.read())
        assert ast.dump(ast.parse(text)) == without_docstrings(original), name


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
    by_key = {document.split_key: document.text for document in documents}
    assert len(by_key) == len(documents) > 50
    assert by_key["textwrap"].startswith("Text wrapping and filling.\n\n")
    assert "def " not in by_key["textwrap"]
    assert "pydoc_data.topics:while" in by_key
    for text in by_key.values():
        text.encode()


def test_code_and_prose_share_the_split():
    some = ("json", "random", "textwrap", "string.py", "types.py")
    keys = []
    for kind, documents in (("code", code_documents), ("prose", prose_documents)):
        files = [(name, path) for name, path in stdlib_files(kind) if name.startswith(some)]
        keys.append({document.split_key for document in documents(files)})
    assert keys[0] == keys[1] == {"json", "random", "textwrap", "string", "types"}


def test_the_default_split_holds_out_some_modules():
    modules = {name.split("/")[0].removesuffix(".py") for name, _ in FILES}
    held_out = {module for module in modules if is_held_out(module, 0.02)}
    assert {"json", "random", "trace"} <= held_out
    assert len(held_out) < 0.1 * len(modules)
