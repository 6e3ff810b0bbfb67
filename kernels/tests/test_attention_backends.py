"""How the GPU backends' kernels are called, shown on a CPU: stand-ins take their place and compute the reference.

PyTorch's ops get a stand-in for the CPU from its own dispatcher, so the arguments pass through the real signatures.
"""

import importlib
import inspect
import sys
import types

import pytest
import torch
from torch.nn.attention import _registry, activate_flash_attention_impl, register_flash_attention_impl

from llama_pro_kernels import attention_backward, attention_forward

N, K, D, SCALE = 4, 2, 8, 0.3
LENGTHS = [3, 0, 5, 1, 0]
GPU_BACKENDS = ["flash", "flash_3", "flash_4", "flash_attn", "cudnn"]


@pytest.fixture(autouse=True)
def only_on_the_cpu(device):
    if device != "cpu":
        pytest.skip("stand-ins are for the CPU")


@pytest.fixture
def calls():
    """Names of the stand-ins called, with what stood behind PyTorch's flash ops."""
    return []


@pytest.fixture
def activations(monkeypatch):
    """What was activated (+) and removed (-) behind PyTorch's flash ops, with stand-ins for the packages."""
    log = []
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_IMPLS", dict(_registry._FLASH_ATTENTION_IMPLS))
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_ACTIVE", None)

    def stand_in(name):
        def activate():
            log.append(f"+{name}")
            return types.SimpleNamespace(remove=lambda: log.append(f"-{name}"))

        register_flash_attention_impl(name, register_fn=activate)

    stand_in("FA3")
    stand_in("another")
    return log


def reference(max_seqlen, scale, window):
    return {"scale": scale, "window": window, "backend": "reference"}


def check(cu_q, cu_k, max_q, max_k, dropout_p, *tensors):
    assert cu_q is cu_k or torch.equal(cu_q, cu_k)
    assert cu_q.dtype == torch.int32
    assert max_q == max_k == max(LENGTHS)
    assert dropout_p == 0.0
    assert all(tensor.stride(-1) == 1 for tensor in tensors)


def window_of(is_causal, left, right):
    """What flash attention hides: causal means a right window of 0, and with one to the left causal is not said."""
    if is_causal:
        assert (left, right) == (None, None)
        return None
    assert right == 0
    return left + 1


@pytest.fixture
def kernels(activations, calls, monkeypatch):
    """Stand-ins for all GPU kernels."""

    def flash_forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask,
                      *, scale, window_size_left=None, window_size_right=None):  # fmt: skip
        calls.append(("flash_forward", _registry.current_flash_attention_impl()))
        check(cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, query, key, value)
        assert not return_debug_mask
        window = window_of(is_causal, window_size_left, window_size_right)
        o, lse = attention_forward(query, key, value, cum_seq_q, max_q, **reference(max_q, scale, window))
        # A kernel may lay its results out as it likes.
        o, lse = o.transpose(0, 1).contiguous().transpose(0, 1), lse.t().contiguous().t()
        return o, lse, torch.zeros(2, dtype=torch.uint64), torch.zeros(()), torch.zeros(0)

    def flash_backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p,
                       is_causal, rng_state, unused, *, scale, window_size_left=None,
                       window_size_right=None):  # fmt: skip
        calls.append(("flash_backward", _registry.current_flash_attention_impl()))
        check(cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, grad_out, query, key, value, out)
        assert (rng_state.dtype, rng_state.shape, unused.numel()) == (torch.uint64, (2,), 0)
        window = window_of(is_causal, window_size_left, window_size_right)
        gradients = attention_backward(
            grad_out, query, key, value, out, logsumexp, cum_seq_q, max_q, **reference(max_q, scale, window)
        )
        return tuple(gradient.transpose(0, 1).contiguous().transpose(0, 1) for gradient in gradients)

    def cudnn_forward(query, key, value, attn_bias, cum_seq_q, cum_seq_k, max_q, max_k, compute_log_sumexp,
                      dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale):  # fmt: skip
        calls.append(("cudnn_forward", None))
        check(cum_seq_q, cum_seq_k, max_q, max_k, dropout_p)
        assert all(tensor.is_contiguous() for tensor in (query, key, value))
        assert (attn_bias, compute_log_sumexp, is_causal, return_debug_mask) == (None, True, True, False)
        o, lse = attention_forward(query, key, value, cum_seq_q, max_q, **reference(max_q, scale, None))
        nothing = torch.zeros(0)
        return o, lse, nothing, nothing, max_q, max_k, nothing, nothing, nothing

    def cudnn_backward(grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q,
                       cum_seq_k, max_q, max_k, dropout_p, is_causal, *, scale):  # fmt: skip
        calls.append(("cudnn_backward", None))
        check(cum_seq_q, cum_seq_k, max_q, max_k, dropout_p)
        assert all(tensor.is_contiguous() for tensor in (grad_out, query, key, value, out))
        assert attn_bias is None
        assert is_causal
        assert philox_seed.dtype == philox_offset.dtype == torch.int64
        return attention_backward(
            grad_out, query, key, value, out, logsumexp, cum_seq_q, max_q, **reference(max_q, scale, None)
        )

    # The signatures of flash-attn 2.8; the later ones add arguments with defaults at their ends.
    def package_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
                        causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
                        return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None,
                        zero_tensors=False):  # fmt: skip
        calls.append(("package_forward", None))
        check(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, q, k, v)
        assert (softcap, alibi_slopes, return_softmax) == (0.0, None, False)
        window = window_of(causal, None if window_size_left < 0 else window_size_left, None if causal else 0)
        assert window_size_right == 0
        options = reference(max_seqlen_q, softmax_scale, window)
        o, lse = attention_forward(q, k, v, cu_seqlens_q, max_seqlen_q, **options)
        return o, lse, None, torch.zeros(2)

    def package_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                         max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
                         alibi_slopes, deterministic, rng_state=None, zero_tensors=False):  # fmt: skip
        calls.append(("package_backward", deterministic))
        check(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, dout, q, k, v, out)
        assert (softcap, alibi_slopes) == (0.0, None)
        window = window_of(causal, None if window_size_left < 0 else window_size_left, None if causal else 0)
        options = reference(max_seqlen_q, softmax_scale, window)
        gradients = attention_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, max_seqlen_q, **options)
        for buffer, gradient in zip((dq, dk, dv), gradients, strict=True):
            buffer.copy_(gradient)
        return torch.zeros(N, 1)

    # Of flash-attn-4 what is given; the rest has defaults.
    def fourth_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
                       window_size_left=None, window_size_right=None, return_lse=False):  # fmt: skip
        calls.append(("fourth_forward", None))
        check(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, q, k, v)
        assert return_lse
        window = window_of(causal, window_size_left, window_size_right)
        o, lse = attention_forward(
            q, k, v, cu_seqlens_q, max_seqlen_q, **reference(max_seqlen_q, softmax_scale, window)
        )
        return o, lse, None, None, None

    def fourth_backward(q, k, v, out, dout, lse, softmax_scale, causal, window_size_left=None, window_size_right=None,
                        *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic):  # fmt: skip
        calls.append(("fourth_backward", deterministic))
        check(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, dout, q, k, v, out)
        window = window_of(causal, window_size_left, window_size_right)
        options = reference(max_seqlen_q, softmax_scale, window)
        return attention_backward(dout, q, k, v, out, lse, cu_seqlens_q, max_seqlen_q, **options)

    fourth = types.ModuleType("flash_attn.cute.interface")
    fourth._flash_attn_fwd = fourth_forward
    fourth._flash_attn_bwd = fourth_backward
    monkeypatch.setitem(sys.modules, "flash_attn.cute", types.ModuleType("flash_attn.cute"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", fourth)
    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward = package_forward
    interface._flash_attn_varlen_backward = package_backward
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", flash_forward, "CPU")
    library.impl("_flash_attention_backward", flash_backward, "CPU")
    library.impl("_cudnn_attention_forward", cudnn_forward, "CPU")
    library.impl("_cudnn_attention_backward", cudnn_backward, "CPU")
    yield
    library._destroy()


def packed():
    return torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)


def views():
    """q, k, v as views of one packed product, and do with its heads outermost."""
    qkv = torch.randn(sum(LENGTHS), N + 2 * K, D, dtype=torch.float64)
    do = torch.randn(N, sum(LENGTHS), D, dtype=torch.float64).transpose(0, 1)
    return *qkv.split([N, K, K], 1), do


def run(q, k, v, do, backend, window=None):
    options = {"scale": SCALE, "window": window, "backend": backend}
    o, lse = attention_forward(q, k, v, packed(), max(LENGTHS), **options)
    return o, lse, *attention_backward(do, q, k, v, o, lse, packed(), max(LENGTHS), **options)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("window", [None, 1, 3])
def test_a_kernel_is_asked_for_what_the_reference_computes(kernels, calls, backend, window):
    if backend == "cudnn" and window is not None:
        with pytest.raises(AssertionError, match="no sliding window"):
            run(*views(), backend, window)
        return
    tensors = views()
    got = run(*tensors, backend, window)
    assert len(calls) == 2
    for ours, wanted in zip(got, run(*tensors, "reference", window), strict=True):
        assert ours.is_contiguous()
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("window", [None, 3])
def test_the_last_dimension_is_made_dense_for_the_kernels(kernels, window):
    by_token = [t.permute(1, 2, 0).contiguous().permute(2, 0, 1) for t in views()]
    for backend in ["flash", "flash_attn"]:
        run(*by_token, backend, window)


def test_one_token_at_most_is_not_taken_for_decoding(monkeypatch, activations):
    """At a longest document of 1 FlashAttention 2 leaves causality and packed documents for a layout of its own."""
    asked = []
    library = torch.library.Library("aten", "IMPL")

    def forward(q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, *_, **__):
        asked.append((max_q, max_k))
        return q.clone(), torch.zeros(N, len(q)), torch.zeros(2), torch.zeros(0), q[:0]

    def backward(do, q, k, v, o, lse, cum_seq_q, cum_seq_k, max_q, max_k, *_, **__):
        asked.append((max_q, max_k))
        return q.clone(), k.clone(), v.clone()

    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        q, k, v, do = (t[:2].float() for t in views())
        cu_seqlens, options = torch.tensor([0, 1, 1, 2], dtype=torch.int32), {"scale": SCALE, "backend": "flash"}
        o, lse = attention_forward(q, k, v, cu_seqlens, 1, **options)
        attention_backward(do, q, k, v, o, lse, cu_seqlens, 1, **options)
    finally:
        library._destroy()
    assert asked == [(2, 2), (2, 2)]


def test_an_implementation_is_activated_once_and_not_per_call(kernels, calls, activations):
    for _ in range(3):
        run(*views(), "flash_3")
    assert activations == ["+FA3"]
    assert calls == [("flash_forward", "FA3"), ("flash_backward", "FA3")] * 3


def test_each_call_finds_its_own_implementation(kernels, calls, activations):
    activate_flash_attention_impl("another")  # by somebody else
    for backend in ["flash", "flash_3", "flash_3", "flash", "flash", "flash_3"]:
        run(*views(), backend)
    assert [name for _, name in calls[::2]] == [None, "FA3", "FA3", None, None, "FA3"]
    assert [name for _, name in calls[1::2]] == [name for _, name in calls[::2]]
    assert activations == ["+another", "-another", "+FA3", "-FA3", "+FA3"]


def test_backward_activates_for_itself(kernels, calls, activations):
    q, k, v, do = views()
    options = {"scale": SCALE, "backend": "flash_3"}
    o, lse = attention_forward(q, k, v, packed(), max(LENGTHS), **options)
    run(q, k, v, do, "flash")
    attention_backward(do, q, k, v, o, lse, packed(), max(LENGTHS), **options)
    assert calls[-1] == ("flash_backward", "FA3")


def test_other_backends_leave_the_activation_alone(kernels, activations):
    run(*views(), "flash_3")
    for backend in ["flash_4", "flash_attn", "cudnn", "cpu_flash", "reference"]:
        run(*views(), backend)
    assert activations == ["+FA3"]


@pytest.mark.parametrize(("on", "warn_only"), [(False, False), (True, True), (True, False)])
def test_the_packages_are_deterministic_under_pytorchs_switch(kernels, calls, on, warn_only):
    torch.use_deterministic_algorithms(on, warn_only=warn_only)
    try:
        run(*views(), "flash_attn")
        run(*views(), "flash_4")
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls[1::2] == [(name, on and not warn_only) for name in ("package_backward", "fourth_backward")]


def test_the_installed_package_has_the_signature_of_the_stand_in(kernels, monkeypatch):
    stand_in = sys.modules["flash_attn.flash_attn_interface"]
    for name in ("flash_attn", "flash_attn.flash_attn_interface"):
        monkeypatch.delitem(sys.modules, name)
    try:
        real = importlib.import_module("flash_attn.flash_attn_interface")
    except ImportError as error:
        pytest.skip(str(error))
    for name in ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"):
        ours = list(inspect.signature(getattr(stand_in, name)).parameters)
        op = getattr(real, name)
        assert list(inspect.signature(getattr(op, "_init_fn", op)).parameters)[: len(ours)] == ours
