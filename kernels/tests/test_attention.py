import contextlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from llama_pro_kernels import attention, attention_backward, attention_forward, select_attention_backend
from llama_pro_kernels.attention_selection import BACKENDS

fp64 = torch.float64
N, K, D = 4, 2, 8
SCALE = 0.3
LAYOUTS = [[7], [3, 4], [0, 3, 4], [3, 0, 0, 4], [3, 4, 0, 0], [1, 1, 5], [0, 1, 0]]
ON_THE_CPU = [("reference", fp64), ("cpu_flash", fp64), ("cpu_flash", torch.float32)]
EVERY_BACKEND = [name for name, backend in BACKENDS.items() if backend.device != "cuda" or torch.cuda.is_available()]
derandomized = settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def packed(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def problem(lengths, dtype=fp64, heads=(N, K), head_dim=D):
    shapes = [(sum(lengths), h, head_dim) for h in (heads[0], heads[1], heads[1], heads[0])]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def naive(q, k, v, lengths, window=None):
    """One softmax over all tokens under a mask of document, causality and window; key heads repeated."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(len(q))
    distance = position[:, None] - position
    visible = (document[:, None] == document) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1).transpose(0, 1) for t in (k, v))
    scores = (q.transpose(0, 1) @ k.mT * SCALE).masked_fill(~visible, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1), scores.logsumexp(-1)


def expected(q, k, v, do, lengths, window=None):
    leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
    o, lse = naive(*leaves, lengths, window)
    return o.detach(), lse.detach(), *torch.autograd.grad(o, leaves, do.double())


def pair(q, k, v, do, cu_seqlens, max_seqlen, backend, window=None):
    options = {"scale": SCALE, "window": window, "backend": backend}
    o, lse = attention_forward(q, k, v, cu_seqlens, max_seqlen, **options)
    return o, lse, *attention_backward(do, q, k, v, o, lse, cu_seqlens, max_seqlen, **options)


def run(q, k, v, do, lengths, backend, window=None):
    return pair(q, k, v, do, packed(lengths), max(lengths), backend, window)


def skip_unless_runnable(backend, device):
    if backend == "cpu_flash" and device != "cpu":
        pytest.skip("a kernel of the CPU")


def skip_unless_served(backend, device, window=None):
    """Skip with the reason a user would be told."""
    try:
        select_attention_backend(device, torch.bfloat16, requested=backend, window=window, head_dim=64)
    except ValueError as error:
        pytest.skip(str(error))


@contextlib.contextmanager
def deterministic_backward(backend):
    """What a backend needs to repeat. The filling of uninitialised memory, part of the switch, would hide holes."""
    if BACKENDS[backend].deterministic != "switch":
        yield
        return
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def assert_agree(got, wanted):
    dtype = got[0].dtype
    for ours, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-10 if dtype == fp64 else 2e-5)


@pytest.mark.parametrize(("backend", "dtype"), ON_THE_CPU)
@pytest.mark.parametrize("lengths", LAYOUTS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_forward_and_backward_are_the_formula(backend, dtype, lengths, heads, device):
    skip_unless_runnable(backend, device)
    tensors = problem(lengths, dtype, heads)
    got = run(*tensors, lengths, backend)
    assert [t.dtype for t in got] == [dtype] * 5
    assert_agree(got, expected(*tensors, lengths))


@pytest.mark.parametrize("lengths", [[9], [0, 4, 0, 5]])
@pytest.mark.parametrize("window", [1, 3, 100])
def test_window_counts_the_keys_a_query_sees_itself_included(lengths, window):
    tensors = problem(lengths)
    assert_agree(run(*tensors, lengths, "reference", window), expected(*tensors, lengths, window))
    if window == 1:
        o = run(*tensors, lengths, "reference", window)[0]
        torch.testing.assert_close(o, tensors[2].repeat_interleave(N // K, 1), rtol=0, atol=1e-12)


@derandomized
@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any), window=st.none() | st.integers(1, 14))
def test_any_layout_agrees_with_the_formula(lengths, window):
    tensors = problem(lengths)
    assert_agree(run(*tensors, lengths, "reference", window), expected(*tensors, lengths, window))
    if window is None and tensors[0].device.type == "cpu":
        assert_agree(run(*tensors, lengths, "cpu_flash"), expected(*tensors, lengths))


@derandomized
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any))
def test_packed_equals_one_document_at_a_time(lengths):
    tensors = problem(lengths, torch.float32)
    backend = "cpu_flash" if tensors[0].device.type == "cpu" else "reference"
    whole = run(*tensors, lengths, backend)
    for start, length in zip(packed(lengths).tolist(), lengths, strict=False):
        if length:
            rows = slice(start, start + length)
            alone = run(*(t[rows].contiguous() for t in tensors), [length], backend)
            for index, (a, w) in enumerate(zip(alone, whole, strict=True)):
                torch.testing.assert_close(w[:, rows] if index == 1 else w[rows], a, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu_flash"])
def test_gradcheck(backend, device):
    skip_unless_runnable(backend, device)
    q, k, v, _ = problem([2, 0, 2], heads=(2, 1), head_dim=4)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    cu_seqlens = packed([2, 0, 2])
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, cu_seqlens, 2, scale=SCALE, backend=backend), leaves)


def test_keeps_no_scores(kept):
    q, k, v, _ = problem([40])
    with kept() as tensors:
        attention(q.requires_grad_(), k, v, packed([40]), 40, scale=SCALE, backend="reference")
    assert sorted(t.numel() for t in tensors) == sorted([q.numel(), k.numel(), v.numel(), q.numel(), N * 40, 2])


@pytest.mark.parametrize("backend", ["reference", "cpu_flash"])
def test_strides_do_not_matter(backend, device):
    skip_unless_runnable(backend, device)
    lengths = [5, 0, 4]
    contiguous = problem(lengths)
    packed_qkv = torch.cat(contiguous[:3], 1)
    views = [*packed_qkv.split([N, K, K], 1), contiguous[3]]
    by_token = [t.permute(1, 2, 0).contiguous().permute(2, 0, 1) for t in contiguous]
    wanted = run(*contiguous, lengths, backend)
    assert_agree(run(*views, lengths, backend), wanted)
    assert_agree(run(*by_token, lengths, backend), wanted)
    o, lse = wanted[:2]
    strided = [t.permute(1, 2, 0).contiguous().permute(2, 0, 1) for t in (contiguous[3], *contiguous[:3], o)]
    lse = lse.t().contiguous().t()
    got = attention_backward(*strided, lse, packed(lengths), 5, scale=SCALE, backend=backend)
    assert_agree(got, wanted[2:])


@pytest.mark.parametrize("backend", ["reference", "cpu_flash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("lengths", [[5, 3], [40, 30]])
def test_what_is_not_finite_shows_in_its_document_and_in_no_other(backend, dtype, bad, which, lengths, device):
    skip_unless_runnable(backend, device)
    q, k, v, do = problem(lengths, dtype)
    q[2, 0, 3] = 1  # a key of +inf is a score of +inf; one of -inf would be a key without weight
    {"q": q, "k": k, "v": v}[which][2, 0, 3] = bad
    o, lse, *gradients = run(q, k, v, do, lengths, backend)
    assert not o[2, 0].isfinite().all()
    if which != "v":
        assert not lse[0, 2].isfinite()
    assert lse[:, lengths[0] :].isfinite().all()
    assert not all(g[: lengths[0]].isfinite().all() for g in gradients)
    for t in (o, *gradients):
        assert t[lengths[0] :].isfinite().all()


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("heads", [(4, 2), (4, 4)])
def test_bf16_is_twice_as_good_as_plain_bf16(backend, window, heads, device, assert_twice_as_good):
    skip_unless_served(backend, device, window)
    lengths = [33, 0, 64, 31, 0]
    q, k, v, do = problem(lengths, torch.bfloat16, heads, head_dim=64)
    exact = expected(q, k, v, do, lengths, window)
    got = run(q, k, v, do, lengths, backend, window)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    o, _ = naive(*leaves, lengths, window)
    plain = o.detach(), *torch.autograd.grad(o, leaves, do)
    for ours, theirs, exactly in zip((got[0], *got[2:]), plain, (exact[0], *exact[2:]), strict=True):
        assert ours.is_contiguous()
        assert_twice_as_good(ours, theirs, exactly, atol=1e-3)
    assert got[1].shape == (heads[0], sum(lengths))
    assert got[1].dtype == torch.float32
    torch.testing.assert_close(got[1].double(), exact[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("heads", [(4, 2), (4, 4)])
def test_boundaries_may_be_padded_and_the_longest_document_overestimated(backend, heads, device):
    skip_unless_served(backend, device)
    lengths = [33, 0, 64, 31]
    tensors = problem(lengths, torch.bfloat16, heads, head_dim=64)
    cu_seqlens = packed(lengths)
    padded = torch.cat([cu_seqlens, cu_seqlens[-1:].expand(11)])
    wanted = pair(*tensors, cu_seqlens, 64, backend)
    for boundaries, longest in [(padded, 64), (padded, 4096)]:
        for got, alike in zip(pair(*tensors, boundaries, longest, backend), wanted, strict=True):
            if BACKENDS[backend].deterministic == "always":
                assert torch.equal(got, alike)
            else:  # a GPU's division of the work, and so the order of its sums, may depend on both
                torch.testing.assert_close(got, alike, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("heads", [(4, 2), (4, 4)])
def test_documents_of_one_token_return_their_value(backend, heads, device):
    skip_unless_served(backend, device)
    q, k, v, do = problem([1, 0, 1], torch.bfloat16, heads, head_dim=64)
    o, _, _, _, dv = run(q, k, v, do, [1, 0, 1], backend)
    groups = heads[0] // heads[1]
    torch.testing.assert_close(o, v.repeat_interleave(groups, 1), rtol=2**-7, atol=0)
    torch.testing.assert_close(
        dv, do.unflatten(1, (heads[1], groups)).float().sum(2).bfloat16(), rtol=2**-6, atol=2**-7
    )


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("heads", [(4, 2), (4, 4)])
@pytest.mark.parametrize("window", [None, 50])
def test_a_deterministic_backend_repeats_bit_for_bit(backend, heads, window, device):
    if BACKENDS[backend].deterministic == "never":
        pytest.skip("has no deterministic backward")
    skip_unless_served(backend, device, window)
    lengths = [700, 0, 1, 323]
    tensors = problem(lengths, torch.bfloat16, heads, head_dim=64)
    with deterministic_backward(backend):
        once, twice = (run(*tensors, lengths, backend, window) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("backend", sorted(set(EVERY_BACKEND) - {"reference", "cpu_flash"}))
def test_a_gpu_backend_asks_the_device_nothing(backend, device):
    skip_unless_served(backend, device)
    lengths = [33, 0, 31]
    tensors = problem(lengths, torch.bfloat16, head_dim=64)
    cu_seqlens = packed(lengths)
    pair(*tensors, cu_seqlens, 64, backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pair(*tensors, cu_seqlens, 64, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_boundaries_that_do_not_cover_the_tokens_are_refused():
    q, k, v, _ = problem([5])
    with pytest.raises(AssertionError, match="ends at 4"):
        attention_forward(q, k, v, packed([4]), 4, scale=SCALE, backend="reference")


def test_default_scale_of_pytorch_agrees():
    q, k, v, _ = problem([6], heads=(2, 2))
    o, _ = attention_forward(q, k, v, packed([6]), 6, scale=D**-0.5, backend="reference")
    sdpa = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)), is_causal=True)
    torch.testing.assert_close(o, sdpa.transpose(0, 1), rtol=0, atol=1e-12)
