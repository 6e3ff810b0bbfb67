"""The tests of the ops once more, through the Triton kernels: in a child process, under Triton's interpreter.

TRITON_INTERPRET=1 is for the whole process and makes ``triton.compile`` fail there, so it is set for a child and for
nothing else. On a GPU the kernels run natively in the parent, and this proves the interpreter's path all the same.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = [
    "test_adamw.py",
    "test_addressing.py",
    "test_dispatch.py",
    "test_e4m3.py",
    "test_precision.py",
    "test_registration.py",
    "test_rms_norm.py",
    "test_swiglu.py",
    "test_rotary.py",
    "test_qk_norm_rotary.py",
    "test_linear_products.py",
    "test_linear_cross_entropy.py",
    "test_linear_cross_entropy_kl.py",
    "test_linear_kl.py",
]


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the child")
def test_every_op_through_the_interpreter(device):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not waits_for_the_device", *FILES]
    # Without a GPU: the interpreter computes on the host. The child starts in another folder, so paths are made whole.
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = os.environ | {
        "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)
    }  # fmt: skip
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout.splitlines()[-1]
