"""Rows in eight bits: scales, codes, what a bad number does, and the products made of them.

A code's error has a bound (half a step of e4m3), so the ops that write codes are held to the exact gradient by it, in
whatever dtype the inputs come.
"""

import importlib

import pytest
import torch

from llama_pro_kernels import (
    E4M3,
    linear_dx_e4m3,
    qk_norm_rotary_backward,
    qk_norm_rotary_backward_e4m3,
    quantize_e4m3,
    rms_norm_backward,
    rms_norm_backward_e4m3,
    rms_norm_forward,
    rotary_backward,
    rotary_backward_e4m3,
    swiglu_backward,
    swiglu_backward_e4m3,
)

fp32, fp64, bf16 = torch.float32, torch.float64, torch.bfloat16
DTYPES = [fp64, fp32, torch.float16, bf16]
linear_module = importlib.import_module("llama_pro_kernels.linear")
NAN, INF = float("nan"), float("inf")


def decoded(rows):
    return rows.codes.double() * rows.scales.double()[:, None]


def assert_codes_of(rows, exact):
    """``rows`` are the codes of what is ``exact`` but for float32's rounding before them."""
    exact = exact.double()
    assert rows.codes.dtype == torch.float8_e4m3fn
    assert rows.codes.shape == exact.shape
    assert rows.codes.is_contiguous()
    assert (rows.scales.dtype, rows.scales.shape) == (fp32, exact.shape[:1])
    if not exact.numel():
        return
    scales, largest = rows.scales.double()[:, None], exact.abs().amax(-1, keepdim=True)
    assert torch.equal(scales.log2(), scales.log2().round()), "not a power of two"
    slack = 1 + 2**-18
    assert (largest <= 448 * scales * slack).all(), "too small"
    assert ((448 * scales <= 2 * largest * slack) | (scales == 2**-100)).all(), "larger than it must be"
    # Half a step of e4m3 where the number lies: four significant bits, steps of 2⁻⁹ below 2⁻⁶. Rounded to bf16 before,
    # some of any hundred numbers would be further off.
    exponent = (torch.frexp(exact / scales).exponent - 1).clamp(min=-6)
    half_step = scales * 2.0 ** (exponent - 4).double()
    error = (decoded(rows) - exact).abs()
    assert (error <= half_step + 2**-20 * largest).all(), (error - half_step).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width"), [(0, 16), (1, 1), (5, 123), (3, 4096), (2, 9000)])
def test_codes_are_the_nearest_and_scales_the_least(count, width, dtype):
    x = torch.randn(count, width, dtype=fp64) * torch.logspace(-9, 3, count, dtype=fp64)[:, None]
    x = x.to(dtype)
    rows = quantize_e4m3(x)
    assert_codes_of(rows, x)
    assert torch.equal(rows.codes.double(), (x.double() / rows.scales.double()[:, None]).to(rows.codes.dtype).double())


def test_a_scale_is_the_least_power_of_two_to_the_last_bit():
    largest = torch.tensor([448.0, 448.0 * (1 + 2**-23), 449.0, 224.0, 1.0, 1.75, 1.7500001])
    scales = quantize_e4m3(largest[:, None]).scales
    assert scales.tolist() == [1.0, 2.0, 2.0, 0.5, 2**-8, 2**-8, 2**-7]


def test_a_row_of_zeros_stays_one():
    rows = quantize_e4m3(torch.zeros(2, 32))
    assert rows.scales.tolist() == [2**-100] * 2
    assert not decoded(rows).any()


def test_the_smallest_and_the_largest_numbers_are_no_nan():
    x = torch.tensor([[1e-45, 0.0], [1e-38, -1e-39], [3.4e38, 1e30], [-3.4e38, 3.4e38]])
    rows = quantize_e4m3(x)
    assert rows.scales.isfinite().all()
    assert_codes_of(E4M3(rows.codes[2:], rows.scales[2:]), x[2:])
    assert not decoded(rows)[:2].any()  # beneath the bound


@pytest.mark.parametrize("bad", [NAN, -NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 41, 8999])
def test_a_bad_number_is_in_its_rows_scale(bad, dtype, place):
    x = torch.randn(3, 9000).to(dtype)
    x[1, place] = bad
    scales = quantize_e4m3(x).scales
    assert scales.isnan().tolist() == [False, True, False]
    assert torch.equal(scales[[0, 2]], quantize_e4m3(x[[0, 2]]).scales)


@pytest.mark.parametrize("bad", [NAN, -NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_number_in_a_transposed_weight_is_in_its_columns_scale(bad, dtype):
    """Over rows that do not lie dense PyTorch's maximum may give a NaN with its sign set."""
    weight = torch.randn(32, 64).to(dtype)
    weight[20, 1] = bad
    assert quantize_e4m3(weight.t()).scales.isnan().nonzero().tolist() == [[1]]


def test_strides_do_not_matter():
    x = torch.randn(40, 6)
    for view in (x.t(), x[:, ::2], torch.randn(5, 64)[:, 3:35]):
        assert_codes_of(quantize_e4m3(view), view)
        for got, expected in zip(quantize_e4m3(view), quantize_e4m3(view.contiguous()), strict=True):
            assert torch.equal(got.float(), expected.float())


# The gradients that are written as codes


def tables(head_dim, rotated):
    frequency = 10000.0 ** (-torch.arange(0, rotated, 2, dtype=fp64) / rotated)
    angles = torch.arange(32, dtype=fp64)[:, None] * frequency
    return angles.cos().float(), angles.sin().float(), torch.tensor([0, 1, 2, 3, 0, 1, 0, 30, 31])


def swiglu_case(dtype):
    inputs = torch.randn(9, 700).to(dtype), torch.randn(9, 1400).to(dtype)
    return swiglu_backward_e4m3, lambda *x: swiglu_backward(*x)[0], inputs, ()


def rotary_case(dtype, rotated=8):
    inputs = tuple(torch.randn(9, heads, 8).to(dtype) for heads in (20, 3, 3))
    return rotary_backward_e4m3, rotary_backward, inputs, tables(8, rotated)


def part_rotary_case(dtype):
    return rotary_case(dtype, rotated=6)


def qk_norm_rotary_case(dtype):
    gradients = tuple(torch.randn(9, heads, 8).to(dtype) for heads in (20, 3, 3))
    weights = (1 + 0.3 * torch.randn(8)).to(dtype), (1 + 0.3 * torch.randn(8)).to(dtype)
    inputs = *gradients, torch.randn(9, 26 * 8).to(dtype), *weights

    def exact(*inputs):
        return qk_norm_rotary_backward(*inputs, need_dweight=False)[0]

    return qk_norm_rotary_backward_e4m3, exact, inputs, (1e-6, *tables(8, 8))


CASES = [swiglu_case, rotary_case, part_rotary_case, qk_norm_rotary_case]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_a_gradient_in_codes_is_rounded_once(case, dtype):
    in_codes, gradient, inputs, rest = case(dtype)
    inputs = (inputs[0] * torch.logspace(-6, 0, 9).to(dtype).view(9, *[1] * (inputs[0].ndim - 1)), *inputs[1:])
    assert_codes_of(in_codes(*inputs, *rest), gradient(*(x.double() for x in inputs), *rest))


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("case", CASES)
def test_a_bad_gradient_spoils_its_token_and_no_other(case, bad):
    in_codes, _, inputs, rest = case(fp32)
    for changed, tensor in enumerate(inputs[: 3 if len(inputs) > 2 else 1]):
        spoiled = tensor.clone()
        spoiled[4].view(-1)[-1] = bad
        rows = in_codes(*inputs[:changed], spoiled, *inputs[changed + 1 :], *rest)
        assert rows.scales.isnan().tolist() == [token == 4 for token in range(9)]


def norm_inputs(dtype, count=9, width=700):
    dy, x, dresidual = (torch.randn(count, width).to(dtype) for _ in range(3))
    weight = torch.rand(width).to(dtype)
    return dy, x, weight, rms_norm_forward(x, weight, 1e-5)[1], dresidual


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 700, 4096])
def test_a_norms_gradient_comes_with_its_codes(width, dtype, residual):
    *inputs, dresidual = norm_inputs(dtype, width=width)
    dresidual = dresidual if residual else None
    dx, rows = rms_norm_backward_e4m3(*inputs, dresidual=dresidual)
    assert torch.equal(dx, rms_norm_backward(*inputs, dresidual=dresidual, need_dweight=False)[0])
    in_fp64 = {"dresidual": dresidual.double() if residual else None}
    assert_codes_of(rows, rms_norm_backward(*(x.double() for x in inputs), **in_fp64, need_dweight=False)[0])


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("changed", [0, 4])
def test_a_bad_number_in_a_norms_gradient_is_in_its_codes(bad, changed):
    inputs = list(norm_inputs(fp32))
    inputs[changed][4, 7] = bad
    dx, rows = rms_norm_backward_e4m3(*inputs[:4], dresidual=inputs[4])
    assert not dx[4].isfinite().all()
    assert rows.scales.isnan().tolist() == [token == 4 for token in range(9)]


# Products


def test_a_gpus_product_is_that_of_the_reference(device):
    """PyTorch's own, by the very call; on a CPU it takes the same layouts and scales. Sides differ, so that none can be
    taken for another."""
    dy = quantize_e4m3(torch.randn(33, 96) * torch.logspace(-3, 3, 33)[:, None])
    weight = quantize_e4m3(torch.randn(64, 96) * torch.logspace(-2, 2, 64)[:, None])
    exact = decoded(dy) @ decoded(weight).t()
    if device == "cpu" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        return  # not known to have such a product on a CPU
    got = linear_module.scaled_product(dy, weight)
    assert (got.shape, got.dtype) == (exact.shape, bf16)
    terms = decoded(dy).abs() @ decoded(weight).t().abs()
    assert ((got.double() - exact).abs() <= 2**-8 * exact.abs() + 2**-12 * terms).all()
    dy.scales[5] = NAN
    assert linear_module.scaled_product(dy, weight).isnan().any(1).nonzero().tolist() == [[5]]


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_a_card_whose_product_fails_is_told_so(error, monkeypatch):
    def refuses(*arguments):
        raise error("not on this card\nfile.cpp:17")

    assert linear_module.missing_e4m3(torch.device("cpu")) == ""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(linear_module, "linear_dx_e4m3", refuses)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda size, device: zeros(size, device="cpu"))
    said = linear_module.missing_e4m3(torch.device("cuda"))
    assert said == f"PyTorch {torch.__version__} cannot make such a product on Card (not on this card)"


@pytest.mark.parametrize("dtype", [fp32, bf16])
def test_a_product_is_that_of_the_decoded_rows(dtype, assert_twice_as_good):
    dy, weight = quantize_e4m3(torch.randn(33, 96)), quantize_e4m3(0.02 * torch.randn(64, 96))
    got, exact = linear_dx_e4m3(dy, weight, dtype), decoded(dy) @ decoded(weight).t()
    assert_twice_as_good(got, exact.to(dtype), exact, atol=2**-20 * exact.abs().max())


def test_a_bad_token_spoils_its_own_product():
    dy = torch.randn(4, 32)
    dy[2, 5] = NAN
    product = linear_dx_e4m3(quantize_e4m3(dy), quantize_e4m3(torch.randn(16, 32)), bf16)
    assert product[2].isnan().all()
    assert product[[0, 1, 3]].isfinite().all()


def test_what_a_gpu_would_refuse_is_refused_everywhere():
    dy, weight = quantize_e4m3(torch.randn(4, 32)), quantize_e4m3(torch.randn(16, 32))
    with pytest.raises(ValueError, match="contiguous rows of one width"):
        linear_dx_e4m3(dy._replace(codes=dy.codes.t().contiguous().t()), weight, bf16)
    with pytest.raises(ValueError, match="contiguous rows of one width"):
        linear_dx_e4m3(dy, quantize_e4m3(torch.randn(16, 48)), bf16)
    for shape in ((24, 32), (16, 24)):
        with pytest.raises(ValueError, match="multiples of 16"):
            linear_dx_e4m3(quantize_e4m3(torch.randn(4, shape[1])), quantize_e4m3(torch.randn(shape)), bf16)
