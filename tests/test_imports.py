"""The packages import where optional or platform-bound things are missing."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import llama_pro_fast

MODULES = (
    "llama_pro_fast.train, llama_pro_fast.expand, llama_pro_fast.evaluate, llama_pro_fast.export, llama_pro_fast.cli, "
    "llama_pro_kernels"
)


@pytest.mark.slow
def test_everything_imports_without_what_may_be_missing():
    """Triton is there on Linux only; benches run where `datasets` and `jsonargparse` are not installed."""
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in ("triton", "datasets", "jsonargparse"))
    subprocess.run([sys.executable, "-c", f"import sys; {blocked}import {MODULES}"], check=True)


@pytest.mark.parametrize("folder", [".", "bench", "tools", "tests", "tests/model"])
def test_nothing_of_ours_is_named_kernels(folder):
    """A module or package `kernels` first on the path shadows Hugging Face's wheel, and transformers does not import.

    The folder of a script that is run is on the path, so what lies beside it counts.
    """
    root = Path(__file__).resolve().parent.parent
    code = "import importlib.util as u; spec = u.find_spec('kernels'); print(spec and spec.origin)"
    environment = os.environ | {"PYTHONPATH": str(root / folder)}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, check=True, capture_output=True, text=True
    )
    assert not found.stdout.startswith(str(root)), found.stdout


ABOVE = {
    "model": set(),
    "text": set(),
    "data": {"model", "text"},
    "hf": {"model"},
    "expansion": {"model", "hf"},
    "planning": {"model", "hf", "expansion"},
    "evaluation": {"model", "hf", "text", "data"},
    "runs": set(),
    "reporting": {"model", "hf", "expansion", "planning", "runs"},
    "training": {"model", "hf", "expansion", "planning", "text", "data", "evaluation", "runs", "reporting"},
}
"""A folder of the library, and those it may import. Verbs import them all, and what lies beside the verbs none."""
VERBS = {"train", "expand", "plan", "prepare", "evaluate", "report", "export", "api", "__init__"}


def imported(path: Path) -> set[str]:
    """What of the library a file imports: folders by name, modules at the top by name; also inside functions."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    dotted = {f"{node.module}.{alias.name}" for node in nodes if node.module for alias in node.names}
    return {name.split(".")[1] for name in dotted if name.startswith("llama_pro_fast.")}


def test_the_floors_of_the_library_hold():
    library = Path(llama_pro_fast.__file__).parent
    assert {path.parent.name for path in library.glob("*/*.py")} == set(ABOVE)
    for path in library.rglob("*.py"):
        folder = path.parent.name if path.parent != library else None
        allowed = ABOVE[folder] | {folder} if folder else set(ABOVE) if path.stem in VERBS else set()
        # A verb is asked for from outside, or by the package's own functions; no module of the library needs one.
        allowed |= {"api"} if path.stem == "__init__" else set()
        found = (imported(path) & (set(ABOVE) | VERBS)) - allowed
        assert not found, f"{path.relative_to(library)} imports {found}"
    for path in (library.parent / "kernels" / "llama_pro_kernels").rglob("*.py"):
        assert not imported(path), f"{path.name} imports the library"


def test_the_decoder_knows_no_files_and_no_transformers():
    for path in (Path(llama_pro_fast.__file__).parent / "model").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(import|from) (transformers|safetensors|pathlib|os|json)\b", text, re.MULTILINE), (
            path
        )


def test_the_library_has_no_circle():
    graph = {}
    library = Path(llama_pro_fast.__file__).parent
    for path in library.rglob("*.py"):
        name = ".".join(path.relative_to(library.parent).with_suffix("").parts)
        tree = ast.parse(path.read_text(encoding="utf-8")).body
        nodes = [node for node in tree if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llama")]
        graph[name] = {m for node in nodes for m in (node.module, *(f"{node.module}.{a.name}" for a in node.names))}
    TopologicalSorter({name: {m for m in needed if m in graph} for name, needed in graph.items()}).prepare()


@pytest.mark.slow
def test_the_names_from_python_are_functions_whatever_else_is_imported():
    code = (
        "import llama_pro_fast.train, llama_pro_fast.expand, llama_pro_fast.export, llama_pro_fast.evaluate, types\n"
        "from llama_pro_fast import evaluate, expand, export, freeze_to_new_blocks, load, train\n"
        "import llama_pro_fast.train as same\n"
        "assert same is train\n"
        "functions = (evaluate, expand, export, freeze_to_new_blocks, load, train)\n"
        "assert all(isinstance(f, types.FunctionType) for f in functions)\n"
        "from llama_pro_fast.train import main"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
