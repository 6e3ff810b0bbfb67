"""The block's backward is autograd's, of the block written plainly: every class, every attention, every tensor."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections import defaultdict

import pytest
import torch
from block_cases import LENGTHS, SPECS, hf_weights, make_block, make_context, make_rows, plain_block, unpack

from llama_pro_fast.model.policy import BlockClass, Recompute

fp32, fp64, bf16 = torch.float32, torch.float64, torch.bfloat16
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES, autouse=True)
def device(request):
    with torch.device(request.param):
        yield request.param


def run_ours(spec, block_class, dtype, *, need_dx=True, attention=None, seed=0, recompute=Recompute.NONE):
    """``(y, dx or None, {Hugging Face's name: gradient})``; None for a tensor without one."""
    block = make_block(spec, block_class, dtype, seed, recompute)
    x = make_rows(spec, dtype, seed=seed + 1).requires_grad_(need_dx)
    y = block(x, make_context(spec, dtype, attention=attention))
    y.backward(make_rows(spec, dtype, seed=seed + 2))
    gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
    if block_class is BlockClass.FROZEN:
        assert set(gradients.values()) == {None}
        return y.detach(), x.grad, {}
    assert None not in gradients.values(), [name for name, gradient in gradients.items() if gradient is None]
    return y.detach(), x.grad, dict(unpack(spec, gradients))


def run_plain(spec, dtype, seed=0):
    """The same by autograd, in ``dtype`` throughout."""
    weights = hf_weights(spec, make_block(spec, BlockClass.TRAINED, fp64, seed), dtype)
    x, context = (
        make_rows(spec, dtype, seed=seed + 1).requires_grad_(),
        make_context(spec, dtype, attention="reference"),
    )
    y = plain_block(x, weights, spec, LENGTHS, context.cos, context.sin)
    y.backward(make_rows(spec, dtype, seed=seed + 2))
    return y.detach(), x.grad, {name: weight.grad for name, weight in weights.items()}


def relative(ours, exact):
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


def pairs(ours, theirs):
    """(name, ours, theirs) of the output, dx, and whatever weights got a gradient."""
    yield "y", ours[0], theirs[0]
    if ours[1] is not None:
        yield "dx", ours[1], theirs[1]
    for name, gradient in ours[2].items():
        yield name, gradient, theirs[2][name]


@pytest.mark.parametrize("need_dx", [True, False], ids=["above", "lowest"])
@pytest.mark.parametrize("name", SPECS)
def test_a_trained_block_equals_autograd_in_fp64(name, need_dx):
    ours = run_ours(SPECS[name], BlockClass.TRAINED, fp64, need_dx=need_dx)
    assert (ours[1] is not None) == need_dx
    for tensor, got, expected in pairs(ours, run_plain(SPECS[name], fp64)):
        assert relative(got, expected) < 1e-10, tensor


@pytest.mark.parametrize("name", SPECS)
def test_a_frozen_block_equals_autograd_in_fp64(name):
    ours = run_ours(SPECS[name], BlockClass.FROZEN, fp64)
    for tensor, got, expected in pairs(ours, run_plain(SPECS[name], fp64)):
        assert relative(got, expected) < 1e-10, tensor


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.window is None])
def test_the_reference_backend_serves_where_another_is_preferred(name):
    ours = run_ours(SPECS[name], BlockClass.TRAINED, fp64, attention="reference")
    for tensor, got, expected in pairs(ours, run_plain(SPECS[name], fp64)):
        assert relative(got, expected) < 1e-10, tensor


@pytest.mark.parametrize("block_class", [BlockClass.TRAINED, BlockClass.FROZEN])
@pytest.mark.parametrize("name", SPECS)
def test_fp32_is_exact_to_1e_5(name, block_class):
    for tensor, got, expected in pairs(run_ours(SPECS[name], block_class, fp32), run_plain(SPECS[name], fp64)):
        assert got.dtype == fp32
        assert relative(got, expected) < 1e-5, tensor


@pytest.mark.slow
@pytest.mark.parametrize("block_class", [BlockClass.TRAINED, BlockClass.FROZEN])
@pytest.mark.parametrize("name", SPECS)
def test_bf16_holds_the_2x_rule(name, block_class):
    """Error against fp64 at most twice that of autograd in bf16; and a weight's gradient has more digits than bf16.

    Errors of eight draws together: a tensor of a few elements is rounded with luck, or without.
    """
    by_hand, by_autograd = defaultdict(float), defaultdict(float)
    for seed in range(0, 80, 10):
        ours, exact = run_ours(SPECS[name], block_class, bf16, seed=seed), run_plain(SPECS[name], fp64, seed)
        for tensor, got, expected in pairs(ours, exact):
            by_hand[tensor] += relative(got, expected) ** 2
            if tensor in ours[2]:
                assert got.dtype == fp32
                assert not torch.equal(got, got.bfloat16().float()), f"{tensor} was rounded to bf16"
        for tensor, got, expected in pairs(run_plain(SPECS[name], bf16, seed), exact):
            by_autograd[tensor] += relative(got, expected) ** 2
    for tensor, squares in by_hand.items():
        assert squares**0.5 <= 2 * by_autograd[tensor] ** 0.5, tensor


@pytest.mark.parametrize("recompute", [policy for policy in Recompute if policy is not Recompute.NONE])
@pytest.mark.parametrize("which", ["trained", "lowest", "frozen"])
@pytest.mark.parametrize("dtype", [fp32, fp64, bf16])
@pytest.mark.parametrize("name", SPECS)
def test_recomputing_changes_no_bit(name, dtype, which, recompute):
    """What is recomputed is computed by the code of forward, of the same numbers; so all of the above holds for it.

    On a GPU flash attention's backward sums in any order, so there the backend is one that repeats.
    """
    how = {"need_dx": which != "lowest", "attention": None if torch.get_default_device().type == "cpu" else "reference"}
    block_class = BlockClass.FROZEN if which == "frozen" else BlockClass.TRAINED
    kept = run_ours(SPECS[name], block_class, dtype, **how)
    recomputed = run_ours(SPECS[name], block_class, dtype, **how, recompute=recompute)
    assert (kept[1] is None) == (recomputed[1] is None) == (which == "lowest")
    compared = list(pairs(recomputed, kept))
    assert len(compared) >= (2 if which == "frozen" else 13 if name == "all" else 9)
    for tensor, got, expected in compared:
        assert torch.equal(got, expected), tensor


@pytest.mark.parametrize("recompute", Recompute)
@pytest.mark.parametrize("name", ["gqa", "all"])
def test_every_policy_equals_autograd_in_fp64(name, recompute):
    for tensor, got, expected in pairs(
        run_ours(SPECS[name], BlockClass.TRAINED, fp64, recompute=recompute), run_plain(SPECS[name], fp64)
    ):
        assert relative(got, expected) < 1e-10, tensor


@pytest.mark.parametrize("name", ["gqa", "all"])
def test_products_are_made_of_the_low_precision_copy(name):
    """In forward and backward: with another copy the block is another block, whatever its master weight says."""
    spec, dy = SPECS[name], make_rows(SPECS[name], bf16, seed=2)
    context, results = make_context(spec, bf16, attention="reference"), []  # which repeats bit for bit on a GPU as well
    for keep_master in (True, False):
        block, x = make_block(spec, BlockClass.TRAINED, bf16), make_rows(spec, bf16).requires_grad_()
        for projection in (block.qkv_proj, block.o_proj, block.gate_up_proj, block.down_proj):
            with torch.no_grad():
                projection.low_precision.mul_(-1.5)
                if not keep_master:
                    projection.weight.copy_(projection.low_precision)
        y = block(x, context)
        y.backward(dy)
        results.append([y, x.grad, *(parameter.grad for parameter in block.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["gqa", "all"])
def test_without_a_low_precision_copy_the_master_weight_is_cast(name):
    """As where it is sharded: nothing else changes."""
    spec, dy, results = SPECS[name], make_rows(SPECS[name], bf16, seed=2), []
    context = make_context(spec, bf16, attention="reference")
    for copies in (True, False):
        block, x = make_block(spec, BlockClass.TRAINED, bf16), make_rows(spec, bf16).requires_grad_()
        for module in () if copies else block.modules():
            if getattr(module, "low_precision", None) is not None:
                module.low_precision = None
        y = block(x, context)
        y.backward(dy)
        results.append([y, x.grad, *(parameter.grad for parameter in block.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("name", SPECS)
def test_no_token_is_no_error(name):
    spec = SPECS[name]
    block = make_block(spec, BlockClass.TRAINED, fp32)
    x = make_rows(spec, fp32, lengths=(0, 0)).requires_grad_()
    context = make_context(spec, fp32, lengths=(0, 0), attention="reference")
    block(x, context).sum().backward()
    assert x.grad.shape == (0, spec.hidden_size)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in block.parameters())


def test_a_window_one_shorter_than_the_longest_document_counts():
    spec = dataclasses.replace(SPECS["gqa"], window=max(LENGTHS) - 1)
    x, context = make_rows(spec, fp64), make_context(spec, fp64)
    y = make_block(spec, BlockClass.FROZEN, fp64)(x, context)
    weights = hf_weights(spec, make_block(spec, BlockClass.TRAINED, fp64))
    expected = plain_block(x, weights, spec, LENGTHS, context.cos, context.sin)
    assert relative(y, expected) < 1e-12
    assert relative(y, make_block(SPECS["gqa"], BlockClass.FROZEN, fp64)(x, context)) > 1e-6


def test_float16_does_not_train():
    with pytest.raises(AssertionError, match="does not compute in float16"):
        make_block(SPECS["gqa"], BlockClass.TRAINED, torch.float16)


@pytest.mark.parametrize("name", ["gqa", "all"])
@pytest.mark.parametrize("dtype", [fp64, bf16])
def test_micro_batches_add_up(name, dtype):
    spec = SPECS[name]
    context = make_context(spec, dtype, attention="reference")
    parts = [(make_rows(spec, dtype, seed=seed), make_rows(spec, dtype, seed=seed + 10)) for seed in (1, 2, 3)]

    def gradients(parts):
        block = make_block(spec, BlockClass.TRAINED, dtype)
        for x, dy in parts:
            block(x, context).backward(dy)
        return {name: parameter.grad for name, parameter in block.named_parameters()}

    whole, alone = gradients(parts), [gradients([part]) for part in parts]
    for tensor, gradient in whole.items():
        total = sum(one[tensor] for one in alone)
        assert gradient.dtype == torch.promote_types(dtype, fp32)
        torch.testing.assert_close(gradient, total, rtol=1e-6, atol=1e-6 * float(total.abs().max()), msg=tensor)


def test_a_prefix_block_builds_no_graph_and_is_the_same_function():
    spec = SPECS["all"]
    x, context = make_rows(spec, fp64), make_context(spec, fp64)
    y = make_block(spec, BlockClass.PREFIX, fp64)(x.requires_grad_(), context)
    assert y.grad_fn is None
    assert not y.requires_grad
    assert torch.equal(y, make_block(spec, BlockClass.TRAINED, fp64)(x, context).detach())


@pytest.mark.parametrize("recompute", Recompute)
@pytest.mark.parametrize("name", ["gqa", "qk norm"])
@pytest.mark.parametrize("block_class", [BlockClass.TRAINED, BlockClass.FROZEN])
def test_a_second_backward_is_refused_before_anything_is_computed(name, block_class, recompute):
    spec = SPECS[name]
    block, x = make_block(spec, block_class, fp32, recompute=recompute), make_rows(spec, fp32).requires_grad_()
    # Behind hooks the saved tensors carry no version: the flag must not need them.
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor):
        y = block(x, make_context(spec, fp32))
    y.sum().backward(retain_graph=True)
    before = x.grad.clone()
    with pytest.raises(RuntimeError, match="decoder block: backward ran a second time"):
        y.sum().backward()
    assert torch.equal(x.grad, before)


@pytest.mark.parametrize("recompute", Recompute)
def test_the_input_and_the_incoming_gradient_are_left_alone(recompute):
    """Buffers are reused, but only the block's own."""
    spec = SPECS["all"]
    block, x, dy = (
        make_block(spec, BlockClass.TRAINED, fp32, recompute=recompute),
        make_rows(spec, fp32),
        make_rows(spec, fp32, seed=2),
    )
    kept = x.clone(), dy.clone(), {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    block(x.requires_grad_(), make_context(spec, fp32)).backward(dy)
    assert torch.equal(x.detach(), kept[0])
    assert torch.equal(dy, kept[1])
    assert all(torch.equal(parameter, kept[2][name]) for name, parameter in block.named_parameters())


def test_a_gradient_of_any_strides_is_taken():
    """A sum's gradient is one number, expanded."""
    spec = SPECS["gqa"]
    dx = []
    for backward in (lambda y: y.sum().backward(), lambda y: y.backward(torch.ones_like(y))):
        x = make_rows(spec, fp64).requires_grad_()
        backward(make_block(spec, BlockClass.TRAINED, fp64)(x, make_context(spec, fp64)))
        dx.append(x.grad)
    torch.testing.assert_close(*dx, rtol=0, atol=1e-12)


def test_a_window_longer_than_every_document_is_none(device):
    """So a run with short sequences is not bound to a backend that has windows."""
    if device != "cpu":
        pytest.skip("cpu_flash has no window")
    spec = dataclasses.replace(SPECS["gqa"], window=max(LENGTHS))
    x = make_rows(spec, fp32)
    y = make_block(spec, BlockClass.FROZEN, fp32)(x, make_context(spec, fp32, attention="cpu_flash"))
    full = make_block(SPECS["gqa"], BlockClass.FROZEN, fp32)(x, make_context(SPECS["gqa"], fp32, attention="cpu_flash"))
    assert torch.equal(y, full)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the child")
def test_the_triton_path_is_the_same_code(device):
    """The fp32 test once more in a child process, where every op is its kernel in Triton's interpreter."""
    if device != "cpu":
        pytest.skip("the child has no GPU: once is enough")
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "(fp32 or float32 or no_token) and (gqa or all) or left_alone",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
