"""Gradients that a block adds up itself are those that autograd adds up."""

from __future__ import annotations

import pytest
import torch
from block_cases import SPECS, make_block, make_context, make_rows

from llama_pro_fast.model.policy import BlockClass, Recompute

MICRO_BATCHES = 3


def gradients(spec, dtype, *, accumulates, recompute=Recompute.NONE):
    """Of every weight over several micro-batches, of x for the last; and where the weights' gradients lay each time."""
    block, context = make_block(spec, BlockClass.TRAINED, dtype, recompute=recompute), make_context(spec, dtype)
    block.accumulates = accumulates
    places = []
    for seed in range(MICRO_BATCHES):
        x = make_rows(spec, dtype, seed=seed).requires_grad_()
        block(x, context).backward(make_rows(spec, dtype, seed=seed + 10))
        places.append({name: p.grad.data_ptr() for name, p in block.named_parameters()})
    assert all(place == places[0] for place in places)
    return {name: p.grad for name, p in block.named_parameters()} | {"x": x.grad}


@pytest.mark.parametrize("name", SPECS)
def test_they_are_autograds_in_fp64(name):
    ours, theirs = (gradients(SPECS[name], torch.float64, accumulates=each) for each in (True, False))
    for key, exact in theirs.items():
        torch.testing.assert_close(ours[key], exact, rtol=1e-10, atol=1e-10 * exact.abs().max().item(), msg=key)


@pytest.mark.parametrize("recompute", Recompute)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_autograds_within_rounding(dtype, recompute):
    """In float32 whatever the activations are, and a zero norm's too."""
    ours, theirs = (gradients(SPECS["all"], dtype, accumulates=each, recompute=recompute) for each in (True, False))
    for key, other in theirs.items():
        assert ours[key].dtype == other.dtype
        torch.testing.assert_close(ours[key], other, rtol=1e-4, atol=1e-5 * other.abs().max().item(), msg=key)


def test_the_new_gradient_is_never_a_tensor_of_its_own(monkeypatch):
    """Each product is told where to add; the first micro-batch has nowhere."""
    from llama_pro_fast.model import block as module

    outs, product = [], module.linear_dw
    monkeypatch.setattr(module, "linear_dw", lambda dy, x, out=None: outs.append(out) or product(dy, x, out=out))
    gradients(SPECS["gqa"], torch.float32, accumulates=True)
    assert [out is None for out in outs] == [True] * 4 + [False] * 4 * (MICRO_BATCHES - 1)
