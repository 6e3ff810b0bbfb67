"""Attention as registered ops: what PyTorch sees of them, compiled and counted."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from llama_pro_kernels import attention, attention_backward, attention_forward, select_attention_backend

N, K, D, SCALE = 4, 2, 8, 0.3
LENGTHS = [3, 0, 5, 1, 0]
ops = torch.ops.llama_pro_kernels
derandomized = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def packed(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def problem(lengths, dtype=torch.float32):
    return [torch.randn(sum(lengths), heads, D).to(dtype) for heads in (N, K, K, N)]


def served(device, window):
    """A backend that serves fp32 on the device with such a window."""
    return select_attention_backend(device, torch.float32, window=window)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(window, dtype, device):
    q, k, v, do = problem(LENGTHS, dtype)
    backend = select_attention_backend(device, dtype, window=window)
    arguments = (packed(LENGTHS), max(LENGTHS), SCALE, window, backend)
    torch.library.opcheck(ops.attention_forward.default, (q, k, v, *arguments))
    o, lse = ops.attention_forward(q, k, v, *arguments)
    torch.library.opcheck(ops.attention_backward.default, (do, q, k, v, o, lse, *arguments))


def test_results_share_no_memory(same_storage):
    q, k, v, do = problem([4])
    options = {"scale": SCALE, "backend": "reference"}
    o, lse = attention_forward(q, k, v, packed([4]), 4, **options)
    tensors = [q, k, v, do, o, lse, *attention_backward(do, q, k, v, o, lse, packed([4]), 4, **options)]
    assert not any(same_storage(a, b) for i, a in enumerate(tensors) for b in tensors[:i])


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break_to_the_same_numbers(window, dynamic, device):
    q, k, v, do = problem(LENGTHS)
    cu_seqlens, backend = packed(LENGTHS), served(device, window)

    def step(q, k, v):
        o = attention(2 * q, k, v, cu_seqlens, 5, scale=SCALE, window=window, backend=backend)
        return o.sin()

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        y = function(*leaves)
        y.backward(do)
        results.append([y, *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def flops(lengths, window, device):
    """What is counted for forward and for backward."""
    q, k, v, do = problem(lengths)
    cu_seqlens, longest = packed(lengths), max(lengths)
    options = {"scale": SCALE, "window": window, "backend": served(device, window)}
    with FlopCounterMode(display=False) as forward:
        o, lse = attention_forward(q, k, v, cu_seqlens, longest, **options)
    with FlopCounterMode(display=False) as backward:
        attention_backward(do, q, k, v, o, lse, cu_seqlens, longest, **options)
    return forward.get_total_flops(), backward.get_total_flops()


@derandomized
@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any), window=st.none() | st.integers(1, 22))
def test_flops_are_those_of_the_pairs_that_are_seen(lengths, window, device):
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(sum(lengths))
    distance = position[:, None] - position
    seen = (document[:, None] == document) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    pairs = int(seen.sum())
    assert flops(lengths, window, device) == (2 * 2 * N * D * pairs, 5 * 2 * N * D * pairs)


def test_flops_of_the_autograd_op_are_those_of_both_halves(device):
    q, k, v, do = problem(LENGTHS)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with FlopCounterMode(display=False) as counter:
        backend = served(device, None)
        attention(*leaves, packed(LENGTHS), max(LENGTHS), scale=SCALE, backend=backend).backward(do)
    assert counter.get_total_flops() == sum(flops(LENGTHS, None, device))


def test_without_values_the_longest_documents_fill_the_tokens(device):
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q, k, v, _ = (torch.empty(11, heads, D) for heads in (N, K, K, N))
        cu_seqlens = torch.empty(9, dtype=torch.int32)
        o, lse = attention_forward(q, k, v, cu_seqlens, 4, scale=SCALE, backend="reference")
    assert (o.shape, lse.shape) == ((11, N, D), (N, 11))
    assert counter.get_total_flops() == flops([4, 4, 3], None, device)[0]
