import os

import pytest
import torch

from llama_pro_kernels import reference, swiglu_forward
from llama_pro_kernels.library import implementation


def test_triton_for_cuda_and_under_the_interpreter_else_the_reference(device):
    x = torch.ones(2, 4)
    if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        from llama_pro_kernels import triton_kernels

        assert implementation(x) is triton_kernels
    else:
        assert implementation(x) is reference
    assert implementation(x.double()) is reference


def test_the_kernel_is_what_runs(device, monkeypatch):
    expected = 0 if implementation(torch.ones(2, 4)) is reference else 1
    module = pytest.importorskip("llama_pro_kernels.triton_kernels.swiglu")
    started, launch = [], module.launch

    def counting(kernel, *arguments, **options):
        started.append(kernel)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(module, "launch", counting)
    assert swiglu_forward(torch.ones(2, 4)).shape == (2, 2)
    assert len(started) == expected
    swiglu_forward(torch.ones(2, 4, dtype=torch.float64))
    assert len(started) == expected


def test_a_cuda_tensor_without_triton_is_one_clear_line(monkeypatch):
    import sys

    class OnCuda:
        dtype, is_cuda, device = torch.bfloat16, True, "cuda:0"

    import llama_pro_kernels

    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith("llama_pro_kernels.triton_kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(llama_pro_kernels, "triton_kernels", raising=False)
    with pytest.raises(ImportError, match="needs Triton for tensors on cuda:0: pip install triton"):
        implementation(OnCuda())
