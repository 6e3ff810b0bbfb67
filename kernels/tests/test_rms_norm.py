import pytest
import torch

from llama_pro_kernels import add_rms_norm, add_rms_norm_forward, rms_norm, rms_norm_backward, rms_norm_forward

EPS = 1e-5
fp64 = torch.float64


def naive(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight


@pytest.mark.parametrize("shape", [(7, 24), (5, 3, 24)])
def test_forward_is_the_formula(shape):
    x, weight = torch.randn(shape, dtype=fp64), torch.randn(24, dtype=fp64)
    y, rstd = rms_norm_forward(x, weight, EPS)
    torch.testing.assert_close(y, naive(x, weight), rtol=0, atol=1e-12)
    assert rstd.shape == shape[:-1]
    assert rstd.dtype == fp64


@pytest.mark.parametrize("shape", [(7, 24), (5, 3, 24)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_backward_is_autograd_of_the_formula(shape, with_residual):
    x = torch.randn(shape, dtype=fp64, requires_grad=True)
    weight = torch.randn(24, dtype=fp64, requires_grad=True)
    dy, dresidual = torch.randn(shape, dtype=fp64), torch.randn(shape, dtype=fp64)
    loss = (naive(x, weight) * dy).sum() + ((x * dresidual).sum() if with_residual else 0)
    expected = torch.autograd.grad(loss, (x, weight))
    with torch.no_grad():
        _, rstd = rms_norm_forward(x, weight, EPS)
        got = rms_norm_backward(dy, x, weight, rstd, dresidual=dresidual if with_residual else None, need_dweight=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_gradcheck():
    x, residual, weight = (torch.randn(s, dtype=fp64, requires_grad=True) for s in ((4, 6), (4, 6), (6,)))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, w, EPS), (x, residual, weight))


def test_add_norm_is_add_then_norm_and_one_output_alone_has_a_gradient():
    x, residual = (torch.randn(5, 8, dtype=fp64, requires_grad=True) for _ in range(2))
    weight = torch.randn(8, dtype=fp64)
    y, s = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(s, x + residual)
    assert torch.equal(y, rms_norm(x + residual, weight, EPS))
    y.sum().backward()
    expected = torch.autograd.grad(naive(x + residual, weight).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-10)
    assert torch.equal(x.grad, residual.grad)


def test_frozen_weight_costs_nothing(kept, same_storage):
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(8)
    _, rstd = rms_norm_forward(x, weight, EPS)
    assert rms_norm_backward(x, x, weight, rstd, need_dweight=False)[1] is None
    with kept() as tensors:
        rms_norm(x, weight, EPS)
    assert sum(t.nbytes for t in tensors) == x.nbytes + rstd.nbytes + weight.nbytes
    with kept() as tensors:
        y, s = add_rms_norm(x, x.detach(), weight, EPS)
    assert sum(same_storage(t, s) for t in tensors) == 1
    assert not any(same_storage(t, x) or same_storage(t, y) for t in tensors)


def test_bf16_is_twice_as_good_as_plain_bf16(assert_twice_as_good):
    x, residual, dy, ds = (torch.randn(64, 256).bfloat16() for _ in range(4))
    weight = (1 + 0.1 * torch.randn(256)).bfloat16()

    def plain(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, residual, weight)]
        s = leaves[0] + leaves[1]
        y = torch.nn.functional.rms_norm(s, (256,), leaves[2], EPS)
        return y.detach(), *torch.autograd.grad((y, s), leaves, (dy.to(dtype), ds.to(dtype)))

    y, s, rstd = add_rms_norm_forward(x, residual, weight, EPS)
    dx, dweight = rms_norm_backward(dy, s, weight, rstd, dresidual=ds, need_dweight=True)
    exact, in_bf16 = plain(fp64), plain(torch.bfloat16)
    assert_twice_as_good(y, in_bf16[0], exact[0])
    assert_twice_as_good(dx, in_bf16[1], exact[1])
    assert dweight.dtype == torch.float32
    assert_twice_as_good(dweight.bfloat16(), in_bf16[3], exact[3])


def test_weight_gradient_of_a_master_is_not_rounded():
    x, master = torch.randn(64, 32).bfloat16(), torch.randn(32, requires_grad=True)
    y = rms_norm(x, master, EPS)
    assert y.dtype == torch.bfloat16
    y.backward(torch.randn_like(y))
    assert master.grad.dtype == torch.float32
    assert not torch.equal(master.grad, master.grad.bfloat16().float())


def test_strides_do_not_matter():
    x, dy, weight = torch.randn(8, 6, dtype=fp64).t(), torch.randn(6, 16, dtype=fp64)[:, ::2], torch.randn(8).double()
    y, rstd = rms_norm_forward(x, weight, EPS)
    torch.testing.assert_close(y, rms_norm_forward(x.contiguous(), weight, EPS)[0], rtol=0, atol=1e-13)
    got = rms_norm_backward(dy, x, weight, rstd, dresidual=x, need_dweight=True)
    expected = rms_norm_backward(
        dy.contiguous(), x.contiguous(), weight, rstd, dresidual=x.contiguous(), need_dweight=True
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


def test_nan_stays_in_its_row_and_reaches_the_weight_gradient():
    x, weight = torch.randn(4, 8), torch.ones(8)
    x[2, 3] = float("nan")
    y, rstd = rms_norm_forward(x, weight, EPS)
    dx, dweight = rms_norm_backward(torch.ones(4, 8), x, weight, rstd, need_dweight=True)
    for rows in (y, dx):
        assert rows.isnan().all(-1).tolist() == [False, False, True, False]
    assert dweight.isnan().all()


@pytest.mark.parametrize("used", [0, 1])
def test_an_output_that_nobody_uses_costs_no_zeros(used):
    x, residual = (torch.randn(5, 8, requires_grad=True) for _ in range(2))
    weight, dy = torch.rand(8, requires_grad=True), torch.randn(5, 8)
    outputs = add_rms_norm(x, residual, weight, EPS)
    dx, dresidual, dweight = torch.autograd.grad(outputs[used], (x, residual, weight), dy, allow_unused=True)
    assert torch.equal(dx, dresidual)
    if used == 1:
        assert torch.equal(dx, dy)
        assert dweight is None
    else:
        expected = torch.autograd.grad(rms_norm(x + residual, weight, EPS), (x, weight), dy)
        torch.testing.assert_close((dx, dweight), expected)


def test_addends_of_two_dtypes_are_refused():
    with pytest.raises(ValueError, match="their sum must have one dtype"):
        add_rms_norm_forward(torch.randn(2, 8), torch.randn(2, 8).half(), torch.ones(8), EPS)
