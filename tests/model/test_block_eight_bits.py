"""Backward of a frozen block in eight bits: the rounding that is stated, in the products of dX and nowhere else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from block_cases import LENGTHS, autograd_block, make_block, make_context, make_rows
from torch.nn import functional as F

from llama_pro_fast.model import block as module
from llama_pro_fast.model.policy import BlockClass, Recompute
from llama_pro_fast.model.spec import BlockSpec

fp32, fp64, bf16 = torch.float32, torch.float64, torch.bfloat16
BASE = BlockSpec(hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8, norm_eps=1e-5)
SPECS = {
    "gqa": BASE,
    "qk norm": dataclasses.replace(BASE, qk_norm=True),
    "window": dataclasses.replace(BASE, window=5),
    "biases, qk norm": dataclasses.replace(BASE, qk_norm=True, qkv_bias=True, o_bias=True, mlp_bias=True),
}
ODD = {
    "hidden": dataclasses.replace(BASE, hidden_size=24),
    "inner": dataclasses.replace(BASE, intermediate_size=40),
    "heads": dataclasses.replace(BASE, head_dim=10),
}
"""Some matrices, or all, have a side that is no multiple of 16."""
A_PRODUCT = 0.0375
"""Relative error of a product of two roundings: each is 2⁻⁴ at most and 0.0265 in the root of squares, for numbers that
are evenly spread over the mantissa."""
IN_A_ROW = A_PRODUCT * 4**0.5
"""Of four, one behind the other, where nothing goes past them."""
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES, autouse=True)
def device(request):
    with torch.device(request.param):
        yield request.param


def nearest(x: torch.Tensor) -> torch.Tensor:
    """The e4m3 number next to each, even where two are: four significant bits, steps of 2⁻⁹ below 2⁻⁶."""
    exponent = torch.frexp(x).exponent - 1
    step = torch.ldexp(torch.ones_like(x), exponent.clamp(min=-6) - 3)
    return (x / step).round() * step


def rounded(rows: torch.Tensor) -> torch.Tensor:
    """Each row in eight bits with a power-of-two scale."""
    largest = rows.abs().amax(-1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, 2.0 ** (largest / 448).log2().ceil())
    return nearest(rows / scale) * scale


class Rounded(torch.autograd.Function):
    """A linear layer whose dX is of the rounded gradient and the rounded weight."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        fits = all(side % 16 == 0 for side in weight.shape)
        return (rounded(dy) @ rounded(weight.t()).t() if fits else dy @ weight), None, None


def run(spec, dtype, *, eight_bits=True, recompute=Recompute.NONE, dy=None, block_class=BlockClass.FROZEN):
    block = make_block(spec, block_class, dtype, recompute=recompute, eight_bits=eight_bits)
    x = make_rows(spec, dtype).requires_grad_()
    attention = None if torch.get_default_device().type == "cpu" else "reference"  # one that repeats
    y = block(x, make_context(spec, dtype, attention=attention))
    y.backward(make_rows(spec, dtype, seed=2) if dy is None else dy)
    return y.detach(), x.grad


def relative(got, exact):
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("name", [*SPECS, *ODD])
def test_it_is_autograds_of_products_that_round_in_fp64(name):
    spec = (SPECS | ODD)[name]
    block, x = make_block(spec, BlockClass.FROZEN, fp64), make_rows(spec, fp64).requires_grad_()

    def linear(x, projection):
        return Rounded.apply(x, projection.weight, projection.bias)

    y = autograd_block(block, x, make_context(spec, fp64), linear)
    y.backward(make_rows(spec, fp64, seed=2))
    got, dx = run(spec, fp64)
    assert relative(got, y.detach()) < 1e-12
    assert relative(dx, x.grad) < 1e-10
    assert (relative(dx, run(spec, fp64, eight_bits=False)[1]) > 1e-3) == (name != "hidden"), "nothing was rounded"


@pytest.mark.parametrize("dtype", [fp64, fp32, bf16])
@pytest.mark.parametrize("name", SPECS)
def test_forward_is_the_same_to_the_bit_and_backward_nearly(name, dtype):
    (y, dx), (plain, exact) = run(SPECS[name], dtype), run(SPECS[name], dtype, eight_bits=False)
    assert torch.equal(y, plain)
    assert 1e-3 < relative(dx, exact) < IN_A_ROW


@pytest.mark.parametrize("name", SPECS)
def test_of_bf16_it_is_as_near_to_fp64s_as_the_rounding_of_products_says(name):
    exact = run(SPECS[name], fp64, eight_bits=False)[1]
    assert relative(run(SPECS[name], bf16)[1], exact) < IN_A_ROW


@pytest.mark.parametrize("recompute", [policy for policy in Recompute if policy is not Recompute.NONE])
@pytest.mark.parametrize("dtype", [fp32, bf16])
@pytest.mark.parametrize("name", SPECS)
def test_recomputing_changes_no_bit(name, dtype, recompute):
    kept, again = run(SPECS[name], dtype), run(SPECS[name], dtype, recompute=recompute)
    assert torch.equal(kept[1], again[1])


def test_a_trained_block_and_one_without_codes_know_nothing_of_it():
    for spec, block_class in ((BASE, BlockClass.TRAINED), (ODD["hidden"], BlockClass.FROZEN)):
        plain, got = (run(spec, fp32, eight_bits=wanted, block_class=block_class) for wanted in (False, True))
        assert torch.equal(got[1], plain[1])


@pytest.mark.parametrize("block_class", [BlockClass.PREFIX, BlockClass.TRAINED])
def test_only_a_frozen_block_keeps_transposes(block_class):
    held = [name for name, _ in make_block(BASE, block_class, bf16, eight_bits=True).named_buffers()]
    assert not [name for name in held if name.endswith(("codes", "scales"))]


def test_a_gradient_is_cast_apart_only_where_it_comes_from_outside(monkeypatch):
    """Of two blocks each has one, of its dy; the other three of a block come in codes from where they are made."""
    seen, quantize = [], module.quantize_e4m3
    monkeypatch.setattr(module, "quantize_e4m3", lambda x: seen.append(x.shape) or quantize(x))
    below, above = (make_block(BASE, BlockClass.FROZEN, fp32, seed, eight_bits=True) for seed in (0, 5))
    x, context = make_rows(BASE, fp32).requires_grad_(), make_context(BASE, fp32, attention="reference")
    above(below(x, context), context).backward(make_rows(BASE, fp32, seed=2))
    assert seen == [x.shape] * 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [fp32, bf16])
def test_a_bad_gradient_comes_out_bad(dtype, bad):
    dy = make_rows(BASE, dtype, seed=2)
    dy[LENGTHS[0] - 1, 3] = bad
    _, dx = run(BASE, dtype, dy=dy)
    assert dx[LENGTHS[0] - 1].isnan().all()
    assert dx[LENGTHS[0] :].isfinite().all()


def test_a_gradient_of_zeros_stays_one():
    dy = make_rows(BASE, fp32, seed=2)
    dy[LENGTHS[0] :] = 0
    _, dx = run(BASE, fp32, dy=dy)
    assert dx.isfinite().all()
    assert not dx[LENGTHS[0] :].any()
