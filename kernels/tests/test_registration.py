"""The ops as PyTorch sees them: registered without a lie, compiled without a break, backward once where buffers go."""

import contextlib

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from llama_pro_kernels import (
    adamw_,
    add_rms_norm,
    attention,
    linear_cross_entropy,
    linear_cross_entropy_kl,
    linear_dscale,
    rms_norm,
    rotary,
    select_attention_backend,
    swiglu,
    swiglu_forward,
    trainable_linear,
)

T, H, N, K, D = 6, 24, 3, 1, 8


def tables():
    return torch.rand(9, D // 2), torch.rand(9, D // 2), torch.arange(T)


def inputs():
    """Arguments of every registered op, some with a choice."""
    x, weight, rstd = torch.randn(T, H), torch.randn(H), torch.rand(T)
    gate_up, dy = torch.randn(T, 2 * H), torch.randn(T, H)
    q, k, v = torch.randn(T, N, D), torch.randn(T, K, D), torch.randn(T, K, D)
    labels, scale, head = torch.randint(9, (T,)), torch.tensor(0.5), torch.randn(9, H)
    cu_seqlens = torch.tensor([0, 2, 2, T, T], dtype=torch.int32)
    backend = select_attention_backend(x.device, x.dtype)
    o, lse = torch.ops.llama_pro_kernels.attention_forward(q, k, v, cu_seqlens, T, 0.3, None, backend)
    yield "rms_norm_forward", (x, weight, 1e-5)
    yield "rms_norm_forward", (torch.randn(2, 3, H).transpose(0, 1), weight, 1e-5)
    yield "add_rms_norm_forward", (x, dy, weight, 1e-5)
    yield "rms_norm_backward", (dy, x, weight, rstd, None, False)
    yield "rms_norm_backward", (dy, x, weight, rstd, dy, True)
    yield "linear_dscale", (head, torch.randn(9, H), weight)
    yield "linear_dscale", (head.bfloat16(), torch.randn(H, 9).t(), weight)
    yield "swiglu_forward", (gate_up,)
    yield "swiglu_forward", (gate_up.t().contiguous().t(),)
    yield "swiglu_backward", (dy, gate_up, False)
    yield "swiglu_backward", (dy, gate_up, True)
    yield "rotary_forward", (torch.randn(T, (N + 2 * K) * D), *tables(), N, K, D)
    yield "rotary_backward", (q, k, v, *tables())
    packed, norm = torch.randn(T, (N + 2 * K) * D), torch.rand(D)
    yield "qk_norm_rotary_forward", (packed, norm, norm, 1e-5, *tables(), N, K, D)
    for need_dweight in (False, True):
        yield "qk_norm_rotary_backward", (q, k, v, packed, norm, norm, 1e-5, *tables(), need_dweight)
    yield "quantize_e4m3", (x,)
    yield "rms_norm_backward_e4m3", (dy, x, weight, rstd, None)
    yield "rms_norm_backward_e4m3", (dy, x.bfloat16(), weight, rstd, dy)
    yield "swiglu_backward_e4m3", (dy, gate_up)
    yield "rotary_backward_e4m3", (q, k, v, *tables())
    yield "qk_norm_rotary_backward_e4m3", (q, k, v, packed, norm, norm, 1e-5, *tables())
    for wanted in ((False, False), (True, False), (False, True), (True, True)):
        yield "linear_cross_entropy_forward", (x, head, labels, scale, *wanted, -100, None, *wanted)
    for need_dx in (False, True):
        yield "linear_cross_entropy_kl_forward", (x, dy, head, labels, scale, 0.7, need_dx, -100, 2, not need_dx)
    yield "linear_kl", (x, dy, head, None, None, -100, None)
    yield "linear_kl", (x, torch.randn(T, 5), torch.randn(9, 5), head, labels, -100, 2)
    yield "attention_forward", (q, k, v, cu_seqlens, T, 0.3, None, backend)
    yield "attention_backward", (q, q, k, v, o, lse, cu_seqlens, T, 0.3, None, backend)


@pytest.mark.slow
def test_every_registered_op_passes_opcheck():
    seen = set()
    for name, arguments in inputs():
        torch.library.opcheck(getattr(torch.ops.llama_pro_kernels, name).default, arguments)
        seen.add(name)
    registered = {op for op in torch._C._dispatch_get_all_op_names() if op.startswith("llama_pro_kernels::")}
    assert {f"llama_pro_kernels::{name}" for name in seen} == registered


def decoder(x, weights, norm, head, labels, scale, angles, cu_seqlens, backend):
    normed = rms_norm(x, norm, 1e-5)
    q, k, v = rotary(trainable_linear(normed, weights["qkv"]), *angles, N, K, D)
    o = attention(q, k, v, cu_seqlens, T, scale=0.3, backend=backend)
    normed, s = add_rms_norm(trainable_linear(o.flatten(1), weights["o"]), x, norm, 1e-5)
    x = s + trainable_linear(swiglu(trainable_linear(normed, weights["gate_up"])), weights["down"])
    return linear_cross_entropy(rms_norm(x, norm, 1e-5), head, labels, scale, consume=True)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
def test_a_decoder_compiles_without_a_break_and_computes_the_same(trained):
    shapes = {"qkv": ((N + 2 * K) * D, H), "o": (H, N * D), "gate_up": (4 * H, H), "down": (H, 2 * H)}
    weights = {name: (0.2 * torch.randn(shape)).requires_grad_(trained) for name, shape in shapes.items()}
    norm, head = torch.rand(H).requires_grad_(trained), torch.randn(9, H)
    x = torch.randn(T, H, requires_grad=True)
    cu_seqlens = torch.tensor([0, 2, 2, T, T], dtype=torch.int32)
    backend = select_attention_backend(x.device, x.dtype)
    rest = (head, torch.randint(9, (T,)), torch.tensor(0.5), tables(), cu_seqlens, backend)
    leaves = [x, *([norm, *weights.values()] if trained else [])]

    torch._dynamo.reset()
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    expected, got = (function(x, weights, norm, *rest) for function in (decoder, compiled))
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad(loss, leaves) for loss in (expected, got)]
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_scale_compiles_without_a_break_and_computes_the_same(dtype):
    def gradient(weight, dweight, scale):
        return linear_dscale(2 * weight, dweight, scale.abs() + 1)

    arguments = torch.randn(9, H, dtype=dtype), torch.randn(9, H), torch.randn(H)
    torch._dynamo.reset()
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), gradient(*arguments))


def test_the_losses_beside_a_teacher_compile_without_a_break_and_compute_the_same():
    def losses(x, *rest):
        return linear_cross_entropy_kl(2 * x, *rest, 0.7, consume=True)

    x, rest = torch.randn(T, H, requires_grad=True), (torch.randn(T, H), torch.randn(9, H), torch.randint(9, (T,)))
    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    expected, got = (function(x, *rest, torch.tensor(0.5)) for function in (losses, compiled))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x) for loss, *_ in (got, expected)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_never_waits_for_the_device(device):
    if device != "cuda":
        pytest.skip("a CPU waits for nobody")
    bf16 = torch.bfloat16
    shapes = {"qkv": ((N + 2 * K) * D, H), "o": (H, N * D), "gate_up": (4 * H, H), "down": (H, 2 * H)}
    weights = {name: torch.randn(shape, dtype=bf16).requires_grad_() for name, shape in shapes.items()}
    x, norm, head = torch.randn(T, H, dtype=bf16, requires_grad=True), torch.rand(H), torch.randn(9, H, dtype=bf16)
    cu_seqlens = torch.tensor([0, 2, 2, T, T], dtype=torch.int32)
    backend = select_attention_backend("cuda", bf16, head_dim=D)
    rest = (head, torch.randint(9, (T,)), torch.tensor(0.5), tables(), cu_seqlens, backend)

    def step():
        decoder(x, weights, norm, *rest).backward()
        linear_cross_entropy_kl(x, x.detach(), *rest[:3], 0.7)[0].backward()
        adamw_(
            [norm], [norm], [norm.clone()], [norm.clone()], [torch.zeros(())], [None], divisor=norm.sum(),
            left_out=norm.sum() * 0, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
        )  # fmt: skip

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def loss_of():
    """The loss, whose backward may write over the gradient that forward kept: ``(x, consume) -> loss``."""
    head, labels, scale = torch.randn(9, H), torch.randint(9, (T,)), torch.tensor(0.5)
    return lambda x, consume: linear_cross_entropy(x, head, labels, scale, consume=consume)


@pytest.mark.parametrize("hooks", [False, True])
def test_a_second_backward_through_consumed_buffers_raises_and_never_lies(loss_of, hooks):
    x = torch.randn(T, H, requires_grad=True)
    expected = torch.autograd.grad(loss_of(x, False), x)[0]
    watched = torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone) if hooks else contextlib.nullcontext()
    with watched:
        loss = loss_of(x, True)
    got = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(got, expected)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: backward ran a second time"):
        torch.autograd.grad(loss, x, retain_graph=True)


def test_without_consume_backward_runs_as_often_as_one_likes(loss_of):
    x = torch.randn(T, H, requires_grad=True)
    loss = loss_of(x, False)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_consume_writes_the_gradient_over_the_buffer(loss_of, kept):
    x = torch.randn(T, H, requires_grad=True)
    with kept() as tensors:
        loss = loss_of(x, True)
    (dx,) = (tensor for tensor in tensors if tensor.shape == x.shape)
    before = dx.clone()
    (3 * loss).backward()
    assert torch.equal(dx, 3 * before)
    assert torch.equal(dx, x.grad)


def names_seen(call):
    """The registered ops that go through PyTorch's dispatcher."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        call()
    return [event.key for event in profiled.key_averages() if event.key.startswith("llama_pro_kernels::")]


def test_where_nobody_looks_the_dispatcher_is_left_out():
    x, gate_up = torch.randn(T, H, requires_grad=True), torch.randn(T, 2 * H)
    with torch.no_grad():
        assert not names_seen(lambda: swiglu_forward(gate_up))
    assert not names_seen(lambda: rms_norm(x, torch.rand(H), 1e-5).sum().backward())


def test_who_looks_sees_the_op_and_its_result():
    gate_up = torch.randn(T, 2 * H)
    assert names_seen(lambda: swiglu_forward(gate_up)) == ["llama_pro_kernels::swiglu_forward"]
    with torch.no_grad(), FlopCounterMode(display=False):
        assert names_seen(lambda: swiglu_forward(gate_up)) == ["llama_pro_kernels::swiglu_forward"]
    with torch.no_grad(), FakeTensorMode() as mode:
        fake = mode.from_tensor(gate_up)
        assert isinstance(swiglu_forward(fake), FakeTensor)
    with torch.no_grad():  # also where the mode itself is over
        assert isinstance(swiglu_forward(fake), FakeTensor)


def test_an_explicit_op_is_not_silently_cut_from_the_graph():
    x = torch.randn(T, 2 * H, requires_grad=True)
    for op in (torch.ops.llama_pro_kernels.swiglu_forward, swiglu_forward):
        with pytest.raises(RuntimeError, match="no autograd formula"):
            op(x).sum().backward()
