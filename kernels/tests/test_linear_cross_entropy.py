import sys
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from llama_pro_kernels import (
    linear_cross_entropy,
    linear_cross_entropy_backward,
    linear_cross_entropy_backward_,
    linear_cross_entropy_forward,
    reference,
)
from llama_pro_kernels.library import implementation
from llama_pro_kernels.linear_cross_entropy import linear_cross_entropy_outputs, rows_per_chunk

fp64 = torch.float64
T, H, V = 11, 6, 17


def problem(dtype=fp64, tokens=T, hidden=H, vocab=V):
    x, weight = torch.randn(tokens, hidden).to(dtype), torch.randn(vocab, hidden).to(dtype)
    labels = torch.randint(vocab, (tokens,))
    labels[1::4] = -100
    return x, weight, labels, torch.tensor(0.37)


def naive(x, weight, labels, scale):
    """The log-probability of each valid label, picked by hand."""
    logp = torch.log_softmax(x @ weight.t(), -1)
    valid = labels != -100
    return -scale.double() * logp[valid, labels[valid]].sum()


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 11, 64])
def test_loss_and_gradients_are_autograd_of_the_formula(chunk_size):
    x, weight, labels, scale = problem()
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = naive(*leaves, labels, scale)
    gradients = torch.autograd.grad(expected, leaves)
    output = linear_cross_entropy_forward(
        x, weight, labels, scale, need_dx=True, need_dweight=True, chunk_size=chunk_size
    )
    torch.testing.assert_close(output.loss, expected.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close((output.dx, output.dweight), gradients, rtol=0, atol=1e-10)
    assert output.token_losses is None
    dloss = torch.tensor(2.5)
    dx, dweight = linear_cross_entropy_backward(dloss, output.dx, output.dweight)
    torch.testing.assert_close((dx, dweight), tuple(2.5 * g for g in gradients), rtol=0, atol=1e-10)
    in_place = linear_cross_entropy_backward_(dloss, output.dx, output.dweight)
    assert in_place[0] is output.dx
    assert in_place[1] is output.dweight
    assert all(map(torch.equal, in_place, (dx, dweight)))


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(labels=st.lists(st.integers(-1, V - 1), min_size=1, max_size=20), chunk_size=st.integers(1, 24))
def test_any_labels_and_any_chunks_agree_with_pytorch(labels, chunk_size):
    labels = torch.tensor(labels)
    x, weight = torch.randn(len(labels), H, dtype=fp64), torch.randn(V, H, dtype=fp64)
    output = linear_cross_entropy_forward(
        x,
        weight,
        labels,
        torch.tensor(1.0),
        need_dx=False,
        need_dweight=False,
        ignore_index=-1,
        chunk_size=chunk_size,
        per_token=True,
    )
    logits = x @ weight.t()
    expected = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
    torch.testing.assert_close(output.token_losses, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(output.loss, expected.sum(), rtol=0, atol=1e-10)
    assert (output.token_losses[labels == -1] == 0).all()


def test_gradcheck():
    x, weight, labels, scale = problem(tokens=5, hidden=3, vocab=4)
    x.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, w: linear_cross_entropy(a, w, labels, scale, chunk_size=2), (x, weight))


@pytest.mark.parametrize(("need_dx", "need_dweight", "products"), [(0, 0, 1), (1, 0, 2), (0, 1, 2), (1, 1, 3)])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_a_frozen_head_costs_two_products(need_dx, need_dweight, products, chunk_size):
    x, weight, labels, scale = problem(torch.float32)
    with FlopCounterMode(display=False) as flops:
        output = linear_cross_entropy_forward(
            x, weight, labels, scale, need_dx=bool(need_dx), need_dweight=bool(need_dweight), chunk_size=chunk_size
        )
    assert flops.get_total_flops() == products * 2 * T * H * V
    assert (output.dx is not None, output.dweight is not None) == (need_dx, need_dweight)


@pytest.mark.parametrize(("need_dx", "need_dweight", "products"), [(0, 0, 1), (1, 0, 2), (0, 1, 2), (1, 1, 3)])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_the_products_counted_are_the_products_made(need_dx, need_dweight, products, chunk_size):
    """The registered op is counted by its formula; here its body is counted from within."""
    x, weight, labels, scale = problem(torch.float32)
    with FlopCounterMode(display=False) as flops:
        linear_cross_entropy_outputs(
            x, weight, labels, scale, bool(need_dx), bool(need_dweight), -100, chunk_size, False, False
        )
    assert flops.get_total_flops() == products * 2 * T * H * V


def test_autograd_op_keeps_dx_only_and_backward_makes_no_product(kept):
    x, weight, labels, scale = problem(torch.float32)
    x.requires_grad_()
    with kept() as tensors:
        loss = linear_cross_entropy(x, weight, labels, scale)
    assert [t.shape for t in tensors] == [x.shape]
    assert tensors[0] is not x
    with FlopCounterMode(display=False) as flops:
        loss.backward()
    assert flops.get_total_flops() == 0


def test_no_gradient_is_made_under_no_grad():
    x, weight, labels, scale = problem(torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), labels, scale)
    assert flops.get_total_flops() == 2 * T * H * V


@pytest.mark.parametrize("with_copy", [False, True])
def test_master_gets_a_gradient_that_was_never_bf16(with_copy):
    x, weight, labels, scale = problem(torch.bfloat16)
    master = (weight.float() + 1e-4).requires_grad_()
    copy = weight if with_copy else None
    linear_cross_entropy(x, master, labels, scale, low_precision_weight=copy).backward()
    used = weight if with_copy else master.detach().bfloat16()
    explicit = linear_cross_entropy_forward(x, used, labels, scale, need_dx=False, need_dweight=True)
    assert explicit.dweight.dtype == torch.float32
    assert torch.equal(master.grad, explicit.dweight)
    assert not torch.equal(master.grad, master.grad.bfloat16().float())


@pytest.mark.parametrize("scale", [0.5, float("inf")])
def test_without_a_valid_label_all_is_exactly_zero(scale):
    x, weight, labels, _ = problem(torch.float32)
    output = linear_cross_entropy_forward(
        x,
        weight,
        torch.full_like(labels, -100),
        torch.tensor(scale),
        need_dx=True,
        need_dweight=True,
        per_token=True,
        need_correct=True,
    )
    for tensor in output:
        assert (tensor == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad):
    x, weight, labels, scale = problem(torch.float32)
    x[0, 0] = bad
    output = linear_cross_entropy_forward(x, weight, labels, scale, need_dx=True, need_dweight=True)
    assert output.loss.isnan()
    assert output.dx.isnan().any(-1).tolist() == [True] + [False] * (T - 1)
    assert output.dweight.isnan().all()


@pytest.mark.parametrize("label", [V, 2**40, -1, -(2**40)])
def test_a_label_outside_the_vocabulary_shows(label):
    """As an error, or in Triton, which cannot raise one, as NaN; never as somebody else's memory."""
    x, weight, labels, scale = problem(torch.float32)
    labels[2] = label
    options = {"need_dx": True, "need_dweight": False, "chunk_size": 4, "per_token": True, "need_correct": True}
    if implementation(x) is reference:
        with pytest.raises((IndexError, RuntimeError)):
            linear_cross_entropy_forward(x, weight, labels, scale, **options)
        return
    output = linear_cross_entropy_forward(x, weight, labels, scale, **options)
    assert output.loss.isnan()
    assert output.token_losses.isnan().nonzero().tolist() == [[2]]
    assert output.dx.isnan().any(-1).nonzero().tolist() == [[2]]
    assert not output.token_correct[2]


def test_huge_logits_do_not_overflow():
    x, weight, labels, scale = problem(torch.float32)
    output = linear_cross_entropy_forward(1e4 * x, weight, labels, scale, need_dx=True, need_dweight=True)
    expected = naive(1e4 * x.double(), weight.double(), labels, scale)
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=0)
    assert output.dx.isfinite().all()


def test_bf16_is_twice_as_good_as_plain_bf16(assert_twice_as_good):
    x, weight, labels, scale = problem(torch.bfloat16, 64, 48, 300)

    def plain(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight)]
        loss = F.cross_entropy((leaves[0] @ leaves[1].t()).to(torch.promote_types(dtype, torch.float32)), labels)
        loss = loss * (labels != -100).sum() * scale
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    output = linear_cross_entropy_forward(x, weight, labels, scale, need_dx=True, need_dweight=True, chunk_size=16)
    exact, in_bf16 = plain(fp64), plain(torch.bfloat16)
    assert_twice_as_good(output.loss, in_bf16[0], exact[0])
    assert_twice_as_good(output.dx, in_bf16[1], exact[1])
    assert_twice_as_good(output.dweight.bfloat16(), in_bf16[2], exact[2])


def test_strides_do_not_matter():
    x, weight = torch.randn(H, T, dtype=fp64).t(), torch.randn(H, V, dtype=fp64).t()
    labels = torch.randint(V, (T, 2))[:, 0]
    scale = torch.tensor(1.0)
    options = {"need_dx": True, "need_dweight": True, "chunk_size": 4}
    got = linear_cross_entropy_forward(x, weight, labels, scale, **options)
    expected = linear_cross_entropy_forward(x.contiguous(), weight.contiguous(), labels, scale, **options)
    torch.testing.assert_close(got[:3], expected[:3], rtol=0, atol=1e-12)


def test_a_scale_on_the_host_serves():
    x, weight, labels, _ = problem(torch.float32)
    options = {"need_dx": True, "need_dweight": False}
    on_host = linear_cross_entropy_forward(x, weight, labels, torch.tensor(0.5, device="cpu"), **options)
    assert torch.equal(on_host.loss, linear_cross_entropy_forward(x, weight, labels, torch.tensor(0.5), **options).loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [256, 32_000, 128_256, 151_936, 262_144])
def test_chunk_rule_bounds_the_buffer_and_fills_a_gpu(vocab, dtype):
    rows, row = rows_per_chunk(vocab, dtype), vocab * dtype.itemsize
    assert rows % 256 == 0
    assert rows >= 1024
    assert rows == 1024 or rows * row <= 2**28 < (rows + 256) * row


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"chunk_size": -1}, "chunk_size is -1"),
        ({"labels": torch.zeros(5, dtype=torch.int64, device="cpu")}, r"labels have shape \[5\]"),
        ({"scale": torch.ones(1, device="cpu")}, r"scale \[1\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    x, weight, labels, scale = problem(torch.float32)
    arguments = {"x": x, "weight": weight, "labels": labels, "scale": scale, "need_dx": True, "need_dweight": False}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy_forward(**arguments | change)


@pytest.mark.parametrize("need_dweight", [False, True])
def test_logits_exist_for_one_chunk_at_a_time(need_dweight, monkeypatch):
    module = sys.modules[linear_cross_entropy_outputs.__module__]
    made, linear = [], module.linear

    def watched(*arguments):
        alive = [reference for reference in made if reference() is not None]
        assert not alive, "the last chunk's logits are still there"
        logits = linear(*arguments)
        made.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(module, "linear", watched)
    x, weight, labels, scale = problem(torch.float32)
    linear_cross_entropy_forward(x, weight, labels, scale, need_dx=True, need_dweight=need_dweight, chunk_size=4)
    assert len(made) == 3


def test_labels_may_lie_apart_and_the_logits_of_a_chunk_too():
    x, weight, labels, scale = problem(torch.float32)
    options = {"need_dx": True, "need_dweight": True, "chunk_size": 4}
    apart = torch.stack([labels, torch.full_like(labels, 3)], 1)[:, 0]
    assert not apart.is_contiguous()
    got = linear_cross_entropy_forward(x, weight, apart, scale, **options)
    wanted = linear_cross_entropy_forward(x, weight, labels, scale, **options)
    assert all(map(torch.equal, got[:3], wanted[:3]))
