import pytest
import torch

from llama_pro_kernels import swiglu, swiglu_backward, swiglu_backward_, swiglu_forward

fp64 = torch.float64


def naive(gate_up):
    intermediate = gate_up.shape[-1] // 2
    gate, up = gate_up[:, :intermediate], gate_up[:, intermediate:]
    return gate / (1 + torch.exp(-gate)) * up


def test_forward_is_the_formula():
    gate_up = torch.randn(5, 12, dtype=fp64)
    torch.testing.assert_close(swiglu_forward(gate_up), naive(gate_up), rtol=0, atol=1e-12)


@pytest.mark.parametrize("need_product", [False, True])
def test_backward_is_autograd_of_the_formula_and_the_product_is_forward(need_product):
    gate_up, dy = torch.randn(5, 12, dtype=fp64, requires_grad=True), torch.randn(5, 6, dtype=fp64)
    expected = torch.autograd.grad(naive(gate_up), gate_up, dy)[0]
    with torch.no_grad():
        dgate_up, product = swiglu_backward(dy, gate_up, need_product=need_product)
    torch.testing.assert_close(dgate_up, expected, rtol=0, atol=1e-10)
    if need_product:
        torch.testing.assert_close(product, naive(gate_up).detach(), rtol=0, atol=1e-12)
    else:
        assert product is None


@pytest.mark.parametrize("dtype", [fp64, torch.float32, torch.bfloat16])
def test_in_place_equals_functional(dtype, same_storage):
    gate_up, dy = torch.randn(5, 12).to(dtype), torch.randn(5, 6).to(dtype)
    expected = swiglu_backward(dy, gate_up, need_product=True)
    buffer = gate_up.clone()
    dgate_up, product = swiglu_backward_(dy, buffer, need_product=True)
    assert same_storage(dgate_up, buffer)
    assert torch.equal(dgate_up, expected[0])
    assert torch.equal(product, expected[1])


def test_gradcheck():
    assert torch.autograd.gradcheck(swiglu, torch.randn(3, 8, dtype=fp64, requires_grad=True))


def test_keeps_gate_up_and_nothing_else(kept, same_storage):
    gate_up = torch.randn(3, 8, requires_grad=True)
    with kept() as tensors:
        swiglu(gate_up)
    assert len(tensors) == 1
    assert same_storage(tensors[0], gate_up)


def test_bf16_is_twice_as_good_as_plain_bf16(assert_twice_as_good):
    gate_up, dy = torch.randn(64, 256).bfloat16(), torch.randn(64, 128).bfloat16()

    def plain(dtype):
        leaf = gate_up.detach().to(dtype).requires_grad_()
        gate, up = leaf.chunk(2, -1)
        y = torch.nn.functional.silu(gate) * up
        return y.detach(), torch.autograd.grad(y, leaf, dy.to(dtype))[0]

    exact, in_bf16 = plain(fp64), plain(torch.bfloat16)
    dgate_up, product = swiglu_backward(dy, gate_up, need_product=True)
    assert_twice_as_good(swiglu_forward(gate_up), in_bf16[0], exact[0])
    assert_twice_as_good(product, in_bf16[0], exact[0])
    assert_twice_as_good(dgate_up, in_bf16[1], exact[1])


def test_strides_do_not_matter():
    gate_up, dy = torch.randn(12, 5, dtype=fp64).t(), torch.randn(5, 12, dtype=fp64)[:, ::2]
    expected = swiglu_backward(dy.contiguous(), gate_up.contiguous(), need_product=True)
    assert torch.equal(swiglu_forward(gate_up), swiglu_forward(gate_up.contiguous()))
    torch.testing.assert_close(swiglu_backward(dy, gate_up, need_product=True), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(swiglu_backward_(dy, gate_up.clone(), need_product=True), expected, rtol=0, atol=1e-14)


def test_large_gates_stay_finite_and_nan_shows():
    gate_up = torch.tensor([[-1e4, 1e4, 1.0, 1.0], [float("nan"), 1.0, 1.0, 1.0]])
    y = swiglu_forward(gate_up)
    dgate_up, product = swiglu_backward(torch.ones(2, 2), gate_up, need_product=True)
    for rows in (y, dgate_up, product):
        assert rows[0].isfinite().all()
        assert rows[1].isnan().any()
