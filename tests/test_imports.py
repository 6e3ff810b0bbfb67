"""The packages import where optional or platform-bound things are missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULES = "llama_pro_fast.train, llama_pro_fast.expand, llama_pro_fast.export, llama_pro_fast.cli, llama_pro_kernels"


@pytest.mark.slow
def test_everything_imports_without_what_may_be_missing():
    """Triton is there on Linux only; benches run where `datasets` and `jsonargparse` are not installed."""
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in ("triton", "datasets", "jsonargparse"))
    subprocess.run([sys.executable, "-c", f"import sys; {blocked}import {MODULES}"], check=True)


@pytest.mark.parametrize("folder", [".", "bench", "tests", "tests/model"])
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
