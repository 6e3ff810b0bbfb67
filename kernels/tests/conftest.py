"""What the tests of the ops share: devices, the 2× rule, a look at what autograd keeps.

The same tests run on the reference, natively on a GPU, and through Triton's interpreter in a child process with
TRITON_INTERPRET=1 (test_interpreted.py).
"""

import contextlib
import dataclasses
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES, autouse=True)
def device(request):
    """Every test runs on every device of the machine, from the same seed."""
    torch.manual_seed(0)
    with torch.device(request.param):
        yield request.param


@pytest.fixture(scope="session", autouse=True)
def _few_programs():
    """The interpreter takes milliseconds for a program, so there the sum over a weight gradient's parts has few."""
    if INTERPRETED:
        from llama_pro_kernels.triton_kernels import rms_norm

        rms_norm.CONFIG = dataclasses.replace(rms_norm.CONFIG, reduce_columns=512)


@pytest.fixture
def assert_twice_as_good():
    """The rule: error at most 2× that of plain PyTorch in the same dtype, plus eight roundings of fp32.

    The latter is for where plain PyTorch happens to be exact; ``atol`` is for what is made of larger numbers.
    Triton's interpreter cuts bf16 off instead of rounding it, so there one step of 2⁻⁷ is allowed.
    """

    def check(ours, plain, exact, atol=0.0):
        assert ours.dtype == plain.dtype
        assert ours.shape == exact.shape
        if not exact.numel():
            return
        exact = exact.double()
        error = (ours.double() - exact).abs().max()
        largest = exact.abs().max()
        allowed = 2 * (plain.double() - exact).abs().max() + 8 * 2**-24 * largest + atol
        if INTERPRETED and ours.dtype == torch.bfloat16:
            allowed = torch.maximum(allowed, largest * 2**-7)
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"

    return check


@pytest.fixture
def kept():
    """``with kept() as tensors``: what autograd operations save for backward."""

    @contextlib.contextmanager
    def watch():
        tensors = []

        def pack(tensor):
            tensors.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield tensors

    return watch


@pytest.fixture
def same_storage():
    """Whether two tensors share memory."""
    return lambda a, b: a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
