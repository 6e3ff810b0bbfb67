"""The packages import where optional or platform-bound things are missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

MODULES = "llama_pro_fast.train, llama_pro_fast.expand, llama_pro_fast.export, llama_pro_fast.cli, llama_pro_kernels"


@pytest.mark.parametrize("missing", ["triton", "datasets jsonargparse"])
def test_everything_imports_without(missing):
    """Triton is there on Linux only; benches run where `datasets` and `jsonargparse` are not installed."""
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in missing.split())
    subprocess.run([sys.executable, "-c", f"import sys; {blocked}import {MODULES}"], check=True)


def test_the_kernels_folder_is_no_package():
    """A package named `kernels` shadows Hugging Face's wheel, and transformers fails to import."""
    code = "import importlib.util as u; s = u.find_spec('kernels'); sys.exit(s is not None and s.origin is not None)"
    subprocess.run([sys.executable, "-c", f"import sys; {code}"], check=True)
