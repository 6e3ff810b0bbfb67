"""Every op, forward and backward, in every dtype at many shapes, against the same formula in fp64.

The tolerance is a rule and not a number: at most twice the error that plain PyTorch makes in the same dtype. A weight's
gradient is a sum over the rows in fp32 and is held to 5e-6·√rows, in units of its terms.
"""

import itertools
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from llama_pro_kernels import (
    add_rms_norm_forward,
    linear_cross_entropy_forward,
    linear_cross_entropy_kl_forward,
    linear_kl,
    rms_norm_backward,
    rms_norm_forward,
    rotary_backward,
    rotary_forward,
    rotary_forward_,
    swiglu_backward,
    swiglu_backward_,
    swiglu_forward,
)

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = [123, 760, 1128, 4096]
ROWS = [0, 1, 5]
derandomized = settings(
    max_examples=10 if os.environ.get("TRITON_INTERPRET") == "1" else 25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def check(rule, ours, plain, exact):
    """``plain`` and ``exact`` are one function of the inputs, as they are and in fp64."""
    for index, (o, p, e) in enumerate(zip(ours, plain, exact, strict=True)):
        try:
            rule(o, p, e)
        except AssertionError as error:
            raise AssertionError(f"result {index}: {error}") from None


def both(function, *tensors):
    """The function's results on the tensors as they are, and in fp64."""
    in_fp64 = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]
    return function(*tensors), function(*in_fp64)


def assert_sum_over_rows(dweight, dy, x):
    """Against Σ dy·x̂ over all rows; 5e-6·√rows in units of the terms, which is 5e-6 times their root of squares."""
    dy, x = (tensor.double().flatten(0, -2) for tensor in (dy, x))
    terms = dy * x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    assert dweight.dtype == torch.float32
    error = (dweight.double() - terms.sum(0)).abs().max()
    assert error <= 5e-6 * terms.square().sum(0).sqrt().max()


# RMSNorm


def plain_rms_norm(x, residual, weight, dy, ds):
    x, residual, weight = (tensor.detach().requires_grad_() for tensor in (x, residual, weight))
    s = x + residual
    y = F.rms_norm(s, s.shape[-1:], weight, EPS)
    dx, dweight = torch.autograd.grad((y, s), (x, weight), (dy, ds))
    return y.detach(), s.detach(), dx, dweight


def rms_norm_inputs(rows, width, dtype):
    x, residual, dy, ds = (torch.randn(rows, width).to(dtype) for _ in range(4))
    return x, residual, (1 + 0.1 * torch.randn(width)).to(dtype), dy, ds


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [*itertools.product(ROWS, WIDTHS), (5, 16384)])
@pytest.mark.parametrize("trained", [False, True])
def test_add_rms_norm(rows, width, dtype, trained, assert_twice_as_good):
    x, residual, weight, dy, ds = rms_norm_inputs(rows, width, dtype)
    y, s, rstd = add_rms_norm_forward(x, residual, weight, EPS)
    dx, dweight = rms_norm_backward(dy, s, weight, rstd, dresidual=ds, need_dweight=trained)
    plain, exact = both(plain_rms_norm, x, residual, weight, dy, ds)
    check(assert_twice_as_good, (y, s, dx), plain[:3], exact[:3])
    assert rstd.shape == (rows,)
    assert rstd.dtype == torch.float32
    if trained:
        assert_sum_over_rows(dweight, dy, s)  # of the sum as it was stored: its rounding is not the norm's error
    else:
        assert dweight is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 128, 123])
def test_rms_norm_per_head_of_a_packed_buffer(width, dtype, assert_twice_as_good):
    """The norm of q and k lies between the projection and the rotation, and reads the projection's buffer in place."""
    tokens, heads = 7, 6
    packed, weight = torch.randn(tokens, (heads + 3) * width).to(dtype), torch.rand(width).to(dtype)
    x = packed.view(tokens, heads + 3, width)[:, 1 : heads + 1]
    dy = torch.randn(tokens, heads, width).to(dtype)
    nothing = torch.zeros_like(dy)
    y, rstd = rms_norm_forward(x, weight, EPS)
    dx, dweight = rms_norm_backward(dy, x, weight, rstd, need_dweight=True)
    plain, exact = both(plain_rms_norm, x, nothing, weight, dy, nothing)
    assert y.is_contiguous()
    assert rstd.shape == (tokens, heads)
    check(assert_twice_as_good, (y, dx), (plain[0], plain[2]), (exact[0], exact[2]))
    assert_sum_over_rows(dweight, dy, x)
    same = rms_norm_backward(dy, x.contiguous(), weight, rstd, need_dweight=True)
    assert torch.equal(dx, same[0])


@pytest.mark.parametrize("programs", [1, 70])
def test_a_weight_gradient_over_many_tiles_and_many_sums(programs, monkeypatch):
    """As on a GPU: programs walk over several tiles each, and what they leave is more than one block of the sum."""
    rows_module = pytest.importorskip("llama_pro_kernels.triton_kernels.rms_norm")
    monkeypatch.setattr(rows_module, "summing_programs", lambda *_: programs)
    width, tiles = 512, 2 * programs + 20
    rows = tiles * rows_module.CONFIG.cut(width)["ROWS"] - 5
    x, dy, weight = torch.randn(rows, width), torch.randn(rows, width), torch.rand(width)
    _, rstd = rms_norm_forward(x, weight, EPS)
    dx, dweight = rms_norm_backward(dy, x, weight, rstd, need_dweight=True)
    assert_sum_over_rows(dweight, dy, x)
    assert torch.equal(dweight, rms_norm_backward(dy, x, weight, rstd, need_dweight=True)[1])
    torch.testing.assert_close(dx, rms_norm_backward(dy, x, weight, rstd, need_dweight=False)[0])


def test_a_weight_gradient_over_more_rows_than_a_gpu_has_programs(device):
    rows = 20_000 if device == "cuda" else 100
    x, dy, weight = torch.randn(rows, 4096), torch.randn(rows, 4096), torch.rand(4096)
    _, rstd = rms_norm_forward(x, weight, EPS)
    first, second = (rms_norm_backward(dy, x, weight, rstd, need_dweight=True)[1] for _ in range(2))
    assert_sum_over_rows(first, dy, x)
    assert torch.equal(first, second)


@derandomized
@given(
    rows=st.integers(0, 70), width=st.integers(1, 300), trained=st.booleans(), residual=st.booleans(),
    dtype=st.sampled_from(DTYPES), wide_weight=st.booleans(),
)  # fmt: skip
def test_rms_norm_of_any_shape(rows, width, trained, residual, dtype, wide_weight, assert_twice_as_good):
    x, _, weight, dy, ds = rms_norm_inputs(rows, width, dtype)
    nothing = torch.zeros_like(x)
    y, rstd = rms_norm_forward(x, weight.float() if wide_weight else weight, EPS)
    dresidual = ds if residual else None
    dx, dweight = rms_norm_backward(
        dy, x, weight.float() if wide_weight else weight, rstd, dresidual=dresidual, need_dweight=trained
    )
    plain, exact = both(plain_rms_norm, x, nothing, weight, dy, ds if residual else nothing)
    check(assert_twice_as_good, (y, dx), (plain[0], plain[2]), (exact[0], exact[2]))
    assert (dweight is not None) == trained
    if trained:
        assert_sum_over_rows(dweight, dy, x)


# SwiGLU


def plain_swiglu(gate_up, dy):
    gate_up = gate_up.detach().requires_grad_()
    gate, up = gate_up.chunk(2, -1)
    y = F.silu(gate) * up
    return y.detach(), torch.autograd.grad(y, gate_up, dy)[0]


@derandomized
@given(rows=st.integers(0, 9), width=st.integers(1, 300), dtype=st.sampled_from(DTYPES), product=st.booleans())
def test_swiglu_of_any_shape(rows, width, dtype, product, assert_twice_as_good):
    check_swiglu(rows, width, dtype, product, assert_twice_as_good)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_swiglu(rows, width, dtype, assert_twice_as_good):
    check_swiglu(rows, width, dtype, True, assert_twice_as_good)


def check_swiglu(rows, width, dtype, need_product, rule):
    gate_up, dy = torch.randn(rows, 2 * width).to(dtype), torch.randn(rows, width).to(dtype)
    plain, exact = both(plain_swiglu, gate_up, dy)
    y = swiglu_forward(gate_up)
    dgate_up, product = swiglu_backward(dy, gate_up, need_product=need_product)
    check(rule, (y, dgate_up), plain, exact)
    in_place, again = swiglu_backward_(dy, gate_up, need_product=need_product)
    assert in_place is gate_up
    assert torch.equal(in_place, dgate_up)
    assert (product is not None) == (again is not None) == need_product
    if need_product:
        assert torch.equal(product, y)
        assert torch.equal(again, y)


# Rotary


def plain_rotary(qkv, cos, sin, position_ids, dq, dk, dv, heads, kv_heads, head_dim):
    qkv = qkv.detach().requires_grad_()
    q, k, v = qkv.view(len(qkv), heads + 2 * kv_heads, head_dim).split([heads, kv_heads, kv_heads], 1)
    rotary_dim = 2 * cos.shape[-1]
    cos, sin = (torch.cat([t, t], -1)[position_ids][:, None].to(qkv.dtype) for t in (cos, sin))

    def turn(x):
        turning, rest = x.split([rotary_dim, head_dim - rotary_dim], -1)
        first, second = turning.chunk(2, -1)
        return torch.cat([turning * cos + torch.cat([-second, first], -1) * sin, rest], -1)

    q, k = turn(q), turn(k)
    return q.detach(), k.detach(), v.detach(), torch.autograd.grad((q, k, v), qkv, (dq, dk, dv))[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim"),
    [(4, 4, 128, 128), (12, 3, 64, 64), (7, 1, 80, 80), (6, 2, 96, 24), (2, 1, 20, 10), (20, 20, 16, 16)],
)
@pytest.mark.parametrize("tokens", ROWS)
def test_rotary(tokens, heads, kv_heads, head_dim, rotary_dim, dtype, assert_twice_as_good):
    check_rotary(tokens, heads, kv_heads, head_dim, rotary_dim, dtype, assert_twice_as_good)


@derandomized
@given(
    tokens=st.integers(0, 5), kv_heads=st.integers(1, 4), group=st.integers(1, 5), head_dim=st.integers(2, 70),
    part=st.floats(0, 1), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_rotary_of_any_shape(tokens, kv_heads, group, head_dim, part, dtype, assert_twice_as_good):
    rotary_dim = 2 * max(1, int(part * (head_dim // 2)))
    check_rotary(tokens, kv_heads * group, kv_heads, head_dim, rotary_dim, dtype, assert_twice_as_good)


def check_rotary(tokens, heads, kv_heads, head_dim, rotary_dim, dtype, rule):
    shape = (heads, kv_heads, head_dim)
    angles = torch.rand(32, rotary_dim // 2) * 6
    position_ids = torch.randint(32, (tokens,))
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
    gradients = [torch.randn(tokens, n, head_dim).to(dtype) for n in (heads, kv_heads, kv_heads)]
    tables = angles.cos(), angles.sin(), position_ids
    plain, exact = both(lambda *tensors: plain_rotary(*tensors, *shape), qkv, *tables, *gradients)
    q, k, v = rotary_forward(qkv, *tables, *shape)
    dqkv = rotary_backward(*gradients, *tables)
    check(rule, (q, k, v, dqkv), plain, exact)
    assert torch.equal(v, plain[2])
    # dv is copied, not computed, and so are the dimensions that do not turn.
    packed = tokens, heads + 2 * kv_heads, head_dim
    assert torch.equal(dqkv.view(packed)[:, heads + kv_heads :], gradients[2])
    assert torch.equal(q[..., rotary_dim:], qkv.view(packed)[:, :heads, rotary_dim:])
    assert all(map(torch.equal, rotary_forward_(qkv.clone(), *tables, *shape), (q, k, v)))


# Losses


def plain_head(x, weight, labels, scale):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    logits = (x @ weight.t()).to(torch.promote_types(x.dtype, torch.float32))
    losses = F.cross_entropy(logits, labels, reduction="none")
    loss = losses.sum() * scale
    return loss.detach(), *torch.autograd.grad(loss, (x, weight)), losses.detach()


def roundings_of_logits(x, weight):
    """A softmax carries the roundings of its logits, in fp32 at least, as relative errors."""
    return (x @ weight.t()).abs().max().item() * 2**-23 if len(x) else 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [17, 1128, 5003])
@pytest.mark.parametrize("tokens", ROWS)
@pytest.mark.parametrize(("need_dx", "need_dweight"), [(True, False), (True, True)])
def test_linear_cross_entropy(tokens, vocab, dtype, need_dx, need_dweight, assert_twice_as_good):
    x, weight = torch.randn(tokens, 24).to(dtype), torch.randn(vocab, 24).to(dtype)
    labels = torch.randint(vocab, (tokens,))
    labels[1::3] = -100
    scale = torch.tensor(0.25)
    output = linear_cross_entropy_forward(
        x,
        weight,
        labels,
        scale,
        need_dx=need_dx,
        need_dweight=need_dweight,
        chunk_size=2,
        per_token=True,
        need_correct=True,
    )
    plain, exact = both(plain_head, x, weight, labels, scale)
    atol = roundings_of_logits(x, weight)
    assert_twice_as_good(output.loss, plain[0], exact[0], atol=atol)
    assert_twice_as_good(output.dx, plain[1], exact[1], atol=atol)
    assert_twice_as_good(output.token_losses, plain[3], exact[3], atol=atol)
    if need_dweight:
        assert_twice_as_good(output.dweight.to(dtype), plain[2], exact[2], atol=atol)
    predicted = (x @ weight.t()).argmax(-1) if tokens else labels
    assert torch.equal(output.token_correct, (predicted == labels) & (labels != -100))


def test_a_vocabulary_of_256k(assert_twice_as_good):
    x, weight, labels = torch.randn(2, 4), torch.randn(262_144, 4), torch.tensor([262_143, 7])
    output = linear_cross_entropy_forward(x, weight, labels, torch.tensor(0.5), need_dx=True, need_dweight=True)
    plain, exact = both(plain_head, x, weight, labels, torch.tensor(0.5))
    for ours, theirs, exactly in zip(output[:3], plain, exact, strict=False):
        assert_twice_as_good(ours, theirs, exactly, atol=roundings_of_logits(x, weight))


@derandomized
@given(vocab=st.integers(1, 9000), tokens=st.integers(1, 4), size=st.sampled_from([1e-3, 1.0, 1e3]))
def test_loss_of_any_vocabulary_and_any_size_of_logits(vocab, tokens, size, assert_twice_as_good):
    x, weight = torch.randn(tokens, 8) * size, torch.randn(vocab, 8)
    labels, scale = torch.randint(vocab, (tokens,)), torch.tensor(1.0)
    output = linear_cross_entropy_forward(x, weight, labels, scale, need_dx=True, need_dweight=False)
    plain, exact = both(plain_head, x, weight, labels, scale)
    atol = roundings_of_logits(x, weight)
    assert_twice_as_good(output.loss, plain[0], exact[0], atol=tokens * atol)
    assert_twice_as_good(output.dx, plain[1], exact[1], atol=weight.abs().max() * atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [17, 5003])
@pytest.mark.parametrize("tokens", ROWS)
@pytest.mark.parametrize("drift", [1e-3, 1e-1])
def test_linear_kl(tokens, vocab, dtype, drift, assert_twice_as_good):
    base, weight = torch.randn(tokens, 24).to(dtype), torch.randn(vocab, 24).to(dtype)
    now = base + drift * torch.randn(tokens, 24).to(dtype)

    def plain(base, now, weight):
        dtype = torch.promote_types(base.dtype, torch.float32)
        base, now = ((x @ weight.t()).to(dtype).log_softmax(-1) for x in (base, now))
        return F.kl_div(now, base, reduction="none", log_target=True).sum(-1)

    # The terms are differences of log-probabilities of about 10, each rounded.
    assert_twice_as_good(linear_kl(base, now, weight), *both(plain, base, now, weight), atol=10 * 2**-24)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [17, 5003])
@pytest.mark.parametrize("tokens", ROWS)
@pytest.mark.parametrize("drift", [1e-3, 1e-1])
def test_linear_cross_entropy_kl(tokens, vocab, dtype, drift, assert_twice_as_good):
    base, weight = torch.randn(tokens, 24).to(dtype), torch.randn(vocab, 24).to(dtype)
    now = base + drift * torch.randn(tokens, 24).to(dtype)
    labels, scale = torch.randint(vocab, (tokens,)), torch.tensor(0.25)
    labels[1::3] = -100

    def plain(now, base, weight, labels, scale):
        now = now.detach().requires_grad_()
        dtype = torch.promote_types(now.dtype, torch.float32)
        logits, base = ((x @ weight.t()).to(dtype) for x in (now, base))
        losses = F.cross_entropy(logits, labels, reduction="none")
        kl = F.kl_div(logits.log_softmax(-1), base.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        kl = torch.where(labels != -100, kl, 0)
        loss = (losses + 3 * kl).sum() * scale
        return loss.detach(), torch.autograd.grad(loss, now)[0], losses.detach(), kl.detach()

    output = linear_cross_entropy_kl_forward(
        now, base, weight, labels, scale, 3.0, need_dx=True, chunk_size=2, per_token=True
    )
    # A gradient is 1 + 3 softmaxes; the divergence's terms are as in the meter.
    roundings = roundings_of_logits(now, weight)
    atols = 4 * roundings, 4 * roundings, roundings, 10 * 2**-24
    found = output.loss, output.dx, output.token_losses, output.token_divergence
    for *results, atol in zip(found, *both(plain, now, base, weight, labels, scale), atols, strict=True):
        assert_twice_as_good(*results, atol=atol)


@pytest.mark.parametrize("padding", [1, 5000])
def test_logits_of_minus_infinity_are_words_that_cannot_come(padding):
    """A masked vocabulary; more than one block of it, and at the row's begin, where there is no maximum yet."""
    x, labels = torch.ones(2, 1), torch.tensor([padding, padding + 1])
    weight = torch.cat([torch.full((padding, 1), float("-inf")), torch.tensor([[1.0], [2.0]])])
    options = {"need_dx": False, "need_dweight": True, "per_token": True, "need_correct": True}
    output = linear_cross_entropy_forward(x, weight, labels, torch.tensor(1.0), **options)
    expected = F.cross_entropy(torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([0, 1]), reduction="none")
    torch.testing.assert_close(output.token_losses, expected)
    assert output.token_correct.tolist() == [False, True]
    assert (output.dweight[:padding] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nothing_is_predicted_where_logits_are_not_finite(bad):
    weight = torch.full((3, 1), bad)
    output = linear_cross_entropy_forward(
        torch.ones(3, 1), weight, torch.arange(3), torch.tensor(1.0), need_dx=False, need_dweight=False,
        need_correct=True,
    )  # fmt: skip
    assert not output.token_correct.any()


def test_the_first_of_equal_logits_is_the_prediction():
    weight = torch.tensor([[1.0], [3.0], [3.0], [2.0]])
    labels = torch.tensor([1, 2, 3, -100])
    options = {"need_dx": False, "need_dweight": False, "need_correct": True}
    output = linear_cross_entropy_forward(torch.ones(4, 1), weight, labels, torch.tensor(1.0), **options)
    assert output.token_correct.tolist() == [True, False, False, False]


# What holds for all of them


def test_twice_is_bit_equal():
    """Natively, too: no kernel leaves the order of a sum to chance."""
    rows, width = 40, 760
    x, residual, weight, dy, ds = rms_norm_inputs(rows, width, torch.float16)
    head, labels, scale = torch.randn(1128, width).half(), torch.randint(1128, (rows,)), torch.tensor(0.1)

    everything = {"need_dx": True, "need_dweight": True, "per_token": True, "need_correct": True}

    def run():
        y, s, rstd = add_rms_norm_forward(x, residual, weight, EPS)
        dx, dweight = rms_norm_backward(dy, s, weight, rstd, dresidual=ds, need_dweight=True)
        output = linear_cross_entropy_forward(y, head, labels, scale, **everything)
        divergence = linear_kl(y, dx, head)
        both_losses = linear_cross_entropy_kl_forward(y, dx, head, labels, scale, 0.7, need_dx=True)[:4]
        return [
            y,
            s,
            rstd,
            dx,
            dweight,
            *output,
            divergence,
            *both_losses,
            swiglu_forward(y),
            *swiglu_backward(y[:, :380], y)[:1],
        ]

    assert all(map(torch.equal, run(), run()))
