"""Which attention backend is chosen, and what is said where one cannot serve."""

import sys
from importlib import metadata, util

import pytest
import torch

from llama_pro_kernels import select_attention_backend
from llama_pro_kernels.attention_backends import KERNELS
from llama_pro_kernels.attention_selection import BACKENDS

bf16, fp32 = torch.bfloat16, torch.float32
NEWEST = {"flash-attn": "2.8.3.post1", "flash-attn-4": "4.0.0b36"}


@pytest.fixture
def gpu(monkeypatch):
    """``gpu(capability, ...)``: this machine has such a GPU, these packages, this PyTorch and cuDNN."""

    def install(capability, *, packages=None, flash_3=False, pytorch="2.14.0+cu130", cudnn=92500, built_in=True):
        packages = packages or {}

        def version(name):
            if name not in packages:
                raise metadata.PackageNotFoundError(name)
            return packages[name]

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built_in)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
        monkeypatch.setattr(torch, "__version__", pytorch)
        monkeypatch.setattr(metadata, "version", version)
        monkeypatch.setattr(util, "find_spec", lambda name: object() if flash_3 else None)

    return install


@pytest.fixture
def switch(monkeypatch):
    """``switch(on, warn_only)``: PyTorch's switch for deterministic algorithms."""

    def set_to(on, warn_only=False):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: on)
        monkeypatch.setattr(torch, "is_deterministic_algorithms_warn_only_enabled", lambda: warn_only)

    return set_to


def refusal(device, dtype, **options):
    """The message of a refused request."""
    with pytest.raises(ValueError) as error:
        select_attention_backend(device, dtype, **options)
    message = str(error.value)
    assert "\n" not in message
    assert repr(options["requested"]) in message
    return message


def test_every_backend_has_kernels_and_a_row():
    assert KERNELS.keys() == BACKENDS.keys()


def test_without_a_gpu():
    assert select_attention_backend("cpu", fp32) == "cpu_flash"
    assert select_attention_backend("cpu", fp32, window=8) == "reference"
    assert select_attention_backend("cpu", fp32, head_dim=12, deterministic=True) == "cpu_flash"
    assert select_attention_backend("cpu", fp32, requested="reference", deterministic=True) == "reference"
    assert select_attention_backend("cuda", fp32) == "reference"
    assert select_attention_backend("meta", bf16) == "reference"


ALL = {"packages": NEWEST, "flash_3": True}


@pytest.mark.parametrize(
    ("capability", "installed", "options", "chosen"),
    [
        ((7, 5), ALL, {}, "reference"),
        ((8, 0), ALL, {}, "flash"),
        ((8, 9), {"packages": NEWEST, "built_in": False}, {}, "flash_attn"),
        ((9, 0), {}, {}, "flash"),
        ((9, 0), {"flash_3": True}, {}, "flash_3"),
        ((9, 0), {"packages": NEWEST}, {}, "flash_4"),
        ((9, 0), ALL, {}, "flash_4"),
        ((9, 0), ALL, {"window": 8}, "flash_4"),
        ((9, 0), ALL, {"head_dim": 256}, "flash_3"),
        ((9, 0), ALL, {"head_dim": 12}, "reference"),
        ((9, 0), {"packages": NEWEST}, {"head_dim": 32}, "flash"),
        ((9, 0), {"packages": NEWEST}, {"head_dim": 64}, "flash_4"),
        ((10, 0), {}, {}, "flash"),
        ((10, 0), ALL, {}, "flash_4"),
        ((10, 0), ALL, {"head_dim": 256}, "flash"),
        ((10, 0), {"packages": {"flash-attn-4": "4.0.0b9"}}, {}, "flash"),
        ((12, 0), ALL, {}, "flash"),
        ((9, 0), {"built_in": False}, {}, "reference"),
    ],
)
def test_auto_takes_what_is_preferred_for_the_capability_and_installed(gpu, capability, installed, options, chosen):
    gpu(capability, **installed)
    assert select_attention_backend("cuda", bf16, **{"head_dim": 128, **options}) == chosen


def test_a_gpu_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, backend in BACKENDS.items():
        if backend.device == "cuda":
            assert ": finds no CUDA device; available" in refusal("cuda", bf16, requested=name)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_auto_never_takes_cudnn(gpu, capability):
    gpu(capability, **ALL, built_in=False)
    assert select_attention_backend("cuda", bf16) != "cudnn"


@pytest.mark.parametrize("name", [name for name, backend in BACKENDS.items() if backend.device == "cuda"])
def test_what_is_installed_and_fits_is_served_on_request(gpu, name):
    gpu((9, 0), **ALL)
    assert select_attention_backend("cuda", bf16, requested=name, head_dim=64) == name


@pytest.mark.parametrize(
    ("requested", "device", "dtype", "window", "why"),
    [
        ("flash", "cpu", bf16, None, "runs on CUDA, not on cpu"),
        ("flash", "cuda", fp32, None, "computes in bfloat16 or float16, not in float32"),
        ("flash_3", "cuda", torch.float64, None, "computes in bfloat16 or float16, not in float64"),
        ("cpu_flash", "cpu", fp32, 8, "has no sliding window"),
        ("cudnn", "cuda", bf16, 8, "has no sliding window"),
        ("cpu_flash", "cuda", bf16, None, "runs on the CPU, not on cuda"),
        ("flash_attn_9", "cpu", fp32, None, "there is no such backend"),
    ],
)
def test_a_backend_that_cannot_serve_is_one_clear_line(requested, device, dtype, window, why):
    message = refusal(device, dtype, requested=requested, window=window)
    assert message.startswith(f"attention backend {requested!r}: {why}; available here: auto, ")


@pytest.mark.parametrize(
    ("requested", "capability", "installed", "why"),
    [
        ("flash", (7, 5), {}, "needs compute capability 8.0 or newer, and Some GPU has 7.5"),
        ("flash_3", (10, 0), ALL, "needs compute capability 9.0 to below 10.0, and Some GPU has 10.0"),
        ("flash_4", (12, 0), ALL, "needs compute capability 9.0 to below 11.0, and Some GPU has 12.0"),
        ("cudnn", (8, 0), ALL, "needs compute capability 9.0 to below 11.0, and Some GPU has 8.0"),
        (
            "flash",
            (9, 0),
            {"built_in": False},
            "needs a PyTorch with flash attention, here is none: install the CUDA build of PyTorch",
        ),
        (
            "flash_3",
            (9, 0),
            {},
            "needs FlashAttention 3 (the module flash_attn_interface), here is none: build it from the folder hopper "
            "of https://github.com/Dao-AILab/flash-attention",
        ),
        (
            "flash_4",
            (9, 0),
            {},
            "needs the package flash-attn-4 4.0.0b36 or newer, here is none: pip install flash-attn-4==4.0.0b36",
        ),
        (
            "flash_4",
            (9, 0),
            {"packages": {"flash-attn-4": "4.0.0b35"}},
            "needs the package flash-attn-4 4.0.0b36 or newer, here is 4.0.0b35: pip install flash-attn-4==4.0.0b36",
        ),
        (
            "flash_4",
            (9, 0),
            {"packages": {"flash-attn-4": "4.0.0b40"}},
            "needs the package flash-attn-4 4.0.0b36 or older, here is 4.0.0b40: pip install flash-attn-4==4.0.0b36",
        ),
        ("cudnn", (9, 0), ALL | {"pytorch": "2.13.0+cu130"}, "needs PyTorch 2.14 or newer, here is 2.13.0+cu130"),
        (
            "flash_attn",
            (9, 0),
            {"packages": {"flash-attn": "2.7.4.post1"}},
            "needs the package flash-attn 2.8 or newer, here is 2.7.4.post1: "
            "pip install -U flash-attn --no-build-isolation",
        ),
        ("cudnn", (9, 0), {"pytorch": "2.11.0"}, "needs PyTorch 2.14 or newer, here is 2.11.0: pip install -U torch"),
        ("cudnn", (9, 0), {"cudnn": 92400}, "needs cuDNN 9.25 or newer, here is 9.24.0"),
        ("cudnn", (9, 0), {"cudnn": None}, "needs cuDNN 9.25 or newer, here is none"),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(gpu, requested, capability, installed, why):
    gpu(capability, **installed)
    message = refusal("cuda", bf16, requested=requested)
    assert message.startswith(f"attention backend {requested!r}: {why}")
    assert "; available here: auto, " in message
    assert message.endswith("reference")


@pytest.mark.parametrize(("requested", "head_dim"), [("flash", 264), ("flash", 68), ("cudnn", 136), ("flash_4", 136)])
def test_a_head_dim_out_of_bounds_is_named(gpu, requested, head_dim):
    gpu((9, 0), **ALL)
    largest = BACKENDS[requested].max_head_dim
    why = f"serves head dims that are multiples of 8 up to {largest}, not {head_dim}"
    assert why in refusal("cuda", bf16, requested=requested, head_dim=head_dim)


@pytest.mark.parametrize("requested", ["auto", "flash", "flash_3", "flash_4", "flash_attn"])
def test_a_deterministic_run_needs_the_switch(gpu, switch, requested):
    gpu((9, 0), **ALL)
    name = "flash_4" if requested == "auto" else requested
    for on, warn_only in [(False, False), (True, True)]:
        switch(on, warn_only)
        with pytest.raises(ValueError, match=f"'{name}': .* only under torch.use_deterministic_algorithms.*set that"):
            select_attention_backend("cuda", bf16, requested=requested, head_dim=128, deterministic=True)
    switch(True)
    assert select_attention_backend("cuda", bf16, requested=requested, head_dim=128, deterministic=True) == name


def test_a_deterministic_run_gets_no_backend_that_cannot_repeat(gpu, switch):
    gpu((9, 0), **ALL)
    switch(True)
    message = refusal("cuda", bf16, requested="cudnn", deterministic=True)
    assert "has no deterministic backward; available here: auto, flash_3" in message
    wide = {"head_dim": 256, "deterministic": True}
    assert "up to 192, not for 256" in refusal("cuda", bf16, requested="flash_3", **wide)
    assert select_attention_backend("cuda", bf16, **wide) == "flash"
    assert select_attention_backend("cuda", bf16, requested="flash_3", head_dim=256) == "flash_3"


def test_looking_for_packages_imports_none_of_them(gpu, monkeypatch):
    gpu((9, 0), **ALL)
    for name in ("flash_attn_interface", "flash_attn", "flash_attn_2_cuda"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    for name in ("flash_3", "flash_4", "flash_attn"):
        assert select_attention_backend("cuda", bf16, requested=name) == name
