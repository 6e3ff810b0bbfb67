import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import llama_pro_kernels

KERNELS = Path(llama_pro_kernels.__file__).parents[1]


@pytest.mark.slow
def test_imports_and_runs_without_triton_and_never_knows_the_trainer():
    program = """
import sys
sys.modules["triton"] = None
import torch, llama_pro_kernels
llama_pro_kernels.swiglu(torch.ones(1, 4))
assert not any(name.split(".")[0] == "llama_pro_fast" for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=KERNELS)


def test_the_documented_example_runs():
    done = doctest.testmod(llama_pro_kernels)
    assert done.attempted >= 10
    assert done.failed == 0


def test_the_folder_is_no_package():
    """A kernels/__init__.py would shadow the wheel that transformers imports."""
    assert not (KERNELS / "__init__.py").exists()


def test_every_public_name_exists_and_is_documented():
    for name in llama_pro_kernels.__all__:
        assert inspect.getdoc(getattr(llama_pro_kernels, name)), name
