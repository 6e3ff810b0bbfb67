import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llama_pro_kernels import linear, linear_dbias, linear_dscale, linear_dw, linear_dx, trainable_linear

fp64 = torch.float64


def operands(dtype=fp64, tokens=6, n_in=5, n_out=4):
    return [torch.randn(shape).to(dtype) for shape in ((tokens, n_in), (n_out, n_in), (n_out,), (tokens, n_out))]


def test_products_are_autograd_of_the_formula():
    x, weight, bias, dy = operands()
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = torch.einsum("ti,oi->to", x, weight) + bias
    dx, dweight, dbias = torch.autograd.grad(y, leaves, dy)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias), y, rtol=0, atol=1e-12)
        torch.testing.assert_close(linear_dx(dy, weight), dx, rtol=0, atol=1e-10)
        torch.testing.assert_close(linear_dw(dy, x), dweight, rtol=0, atol=1e-10)
        torch.testing.assert_close(linear_dbias(dy), dbias, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weight_gradients_are_summed_in_fp32(dtype):
    x, _, _, dy = operands(dtype, tokens=64)
    exact = dy.double().t() @ x.double()
    got = linear_dw(dy, x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=5e-6 * 64**0.5)
    assert linear_dbias(dy).dtype == torch.float32
    torch.testing.assert_close(linear_dbias(dy).double(), dy.double().sum(0), rtol=0, atol=5e-6 * 64**0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, fp64])
def test_out_is_accumulated_into(dtype):
    x, _, _, dy = operands(dtype)
    once = linear_dw(dy, x)
    out = torch.ones_like(once)
    assert linear_dw(dy, x, out=out) is out
    torch.testing.assert_close(out, once + 1, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n_out", [4, 512, 1100])
def test_a_scale_of_the_input_gets_its_gradient_from_the_weights(n_out):
    x, weight, _, dy = operands(n_out=n_out)
    scale = torch.randn(5, dtype=fp64, requires_grad=True)
    expected = torch.autograd.grad((x * scale) @ weight.t(), scale, dy)[0]
    with torch.no_grad():
        got = linear_dscale(weight, linear_dw(dy, x * scale), scale)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n_out", "n_in"), [(1, 1), (4, 5), (40, 256), (1100, 300), (70, 1025)])
def test_the_scales_gradient_of_any_shape(n_out, n_in, dtype):
    weight, dweight, scale = torch.randn(n_out, n_in).to(dtype), torch.randn(n_out, n_in), 1 + torch.rand(n_in)
    got = linear_dscale(weight, dweight, scale)
    assert got.dtype == torch.float32
    exact = (weight.double() * dweight.double()).sum(0) / scale.double()
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-6 * n_out**0.5)
    # Every row counts, and none twice.
    assert torch.equal(linear_dscale(torch.ones_like(weight), torch.ones_like(dweight), torch.ones(n_in)),
                       torch.full((n_in,), float(n_out)))  # fmt: skip
    by_column, wider = weight.t().contiguous().t(), torch.randn(n_out, 2 * n_in)
    wider[:, :n_in] = dweight
    torch.testing.assert_close(linear_dscale(by_column, wider[:, :n_in], scale), got, rtol=1e-5, atol=1e-5)


def test_the_scales_gradient_is_as_exact_as_the_usual_sum_in_bf16():
    """The usual way rounds dz W to bf16 and sums over tokens; this one rounds x̂ · scale and sums over outputs."""
    x, weight, _, dy = operands(torch.bfloat16, 512, 96, 160)
    scale = 1 + 0.1 * torch.randn(96)
    exact = ((dy.double() @ weight.double()) * x.double()).sum(0)
    got = linear_dscale(weight, linear_dw(dy, (x * scale).bfloat16()), scale)
    usual = (linear_dx(dy, weight).float() * x.float()).sum(0)
    assert got.dtype == torch.float32
    assert (got.double() - exact).norm() <= 2 * (usual.double() - exact).norm()
    # And the sum itself is one of fp32 numbers.
    dweight = linear_dw(dy, (x * scale).bfloat16())
    of_dweight = (weight.double() * dweight.double()).sum(0) / scale.double()
    assert (got.double() - of_dweight).norm() <= 1e-6 * of_dweight.norm()


def test_gradcheck():
    x, weight, bias, _ = (t.requires_grad_() for t in operands())
    assert torch.autograd.gradcheck(trainable_linear, (x, weight, bias))
    assert torch.autograd.gradcheck(lambda x, w: trainable_linear(x, w), (x, weight))
    assert torch.autograd.gradcheck(lambda w: trainable_linear(x.detach(), w), (weight,))


@pytest.mark.parametrize("with_copy", [False, True])
def test_master_gets_a_gradient_that_was_never_bf16(with_copy):
    x, _, _, dy = operands(torch.bfloat16, tokens=64)
    master, bias = torch.randn(4, 5, requires_grad=True), torch.randn(4, requires_grad=True)
    copy = master.detach().bfloat16() if with_copy else None
    x.requires_grad_()
    y = trainable_linear(x, master, bias, low_precision_weight=copy)
    assert y.dtype == torch.bfloat16
    y.backward(dy)
    assert torch.equal(master.grad, linear_dw(dy, x.detach()))
    assert torch.equal(bias.grad, linear_dbias(dy))
    assert torch.equal(x.grad, linear_dx(dy, master.detach().bfloat16()))
    for gradient in (master.grad, bias.grad):
        assert not torch.equal(gradient, gradient.bfloat16().float())


def test_the_low_precision_copy_makes_the_products():
    x, weight, _, _ = operands(torch.float32)
    x.requires_grad_()
    y = trainable_linear(x, weight.requires_grad_(), low_precision_weight=torch.zeros_like(weight))
    assert not y.any()
    y.sum().backward()
    assert not x.grad.any()
    assert weight.grad.any()


def test_keeps_only_what_backward_needs(kept, same_storage):
    x, weight, _, _ = operands(torch.float32)
    for x_needs, weight_needs in ((True, False), (False, True), (True, True)):
        x, weight = x.detach().requires_grad_(x_needs), weight.detach().requires_grad_(weight_needs)
        with kept() as tensors, FlopCounterMode(display=False) as flops:
            y = trainable_linear(x, weight)
            y.sum().backward()
        assert any(same_storage(t, x) for t in tensors) == weight_needs
        assert any(same_storage(t, weight) for t in tensors) == x_needs
        assert flops.get_total_flops() == (1 + x_needs + weight_needs) * 2 * 6 * 5 * 4
        assert (x.grad is not None, weight.grad is not None) == (x_needs, weight_needs)


def test_bf16_is_twice_as_good_as_plain_bf16(assert_twice_as_good):
    x, weight, _, dy = operands(torch.bfloat16, 64, 96, 80)
    assert_twice_as_good(linear(x, weight), x @ weight.t(), x.double() @ weight.double().t())
    assert_twice_as_good(linear_dx(dy, weight), dy @ weight, dy.double() @ weight.double())
    assert_twice_as_good(linear_dw(dy, x).bfloat16(), dy.t() @ x, dy.double().t() @ x.double())


def test_strides_do_not_matter():
    x, dy = torch.randn(5, 6, dtype=fp64).t(), torch.randn(6, 8, dtype=fp64)[:, ::2]
    expected = linear_dw(dy.contiguous(), x.contiguous())
    torch.testing.assert_close(linear_dw(dy, x), expected, rtol=0, atol=1e-12)
    out = torch.zeros(5, 4, dtype=fp64).t()
    torch.testing.assert_close(linear_dw(dy, x, out=out), expected, rtol=0, atol=1e-12)


def test_nan_propagates():
    x, weight, _, dy = operands(torch.float32)
    x[2, 1] = float("nan")
    assert linear(x, weight).isnan().all(-1).tolist() == [False, False, True, False, False, False]
    assert linear_dw(dy, x)[:, 1].isnan().all()
