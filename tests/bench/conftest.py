from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What a machine with a GPU may lack. None in sys.modules means "cannot be imported" to `import` and to find_spec alike.
BLOCKER = """
import sys
sys.modules["datasets"] = sys.modules["jsonargparse"] = sys.modules["liger_kernel"] = None
"""


@pytest.fixture(scope="session")
def run_bench(tmp_path_factory):
    """Run a script of bench/ (or another) from the checkout, nothing installed, without what a GPU machine may lack.

    Returns the finished process; what it wrote to stderr is in its stdout.
    """
    blocker = tmp_path_factory.mktemp("blocker")
    (blocker / "sitecustomize.py").write_text(BLOCKER)

    def run(script: str | Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join(map(str, [blocker, ROOT, ROOT / "kernels", ROOT / "bench"]))
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
        command = ["bash" if str(script).endswith(".sh") else sys.executable, str(ROOT / "bench" / script), *arguments]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=600, **output)

    return run
