import sys
import weakref

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llama_pro_kernels import linear_cross_entropy_forward, linear_cross_entropy_kl, linear_cross_entropy_kl_forward
from llama_pro_kernels.library import implementation
from llama_pro_kernels.linear_cross_entropy_kl import linear_cross_entropy_kl_outputs

fp64 = torch.float64
T, H, V, KL_WEIGHT = 11, 6, 17, 0.7
NAN, INF = float("nan"), float("inf")


def problem(dtype=fp64, tokens=T, hidden=H, vocab=V):
    x, x_base, weight = (torch.randn(n, hidden).to(dtype) for n in (tokens, tokens, vocab))
    labels = torch.randint(vocab, (tokens,))
    labels[1::4] = -100
    return x, x_base, weight, labels, torch.tensor(0.37)


def naive(x, x_base, weight, labels):
    """Cross entropy and KL(base ‖ now) of each valid token by their definitions."""
    valid = labels != -100
    p, base = ((states[valid] @ weight.t()).softmax(-1) for states in (x, x_base))
    return -p.gather(1, labels[valid, None]).log().squeeze(1), (base * (base / p).log()).sum(-1)


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 64])
def test_losses_and_gradient_are_autograd_of_the_formula(chunk_size):
    x, x_base, weight, labels, scale = problem()
    leaf, valid = x.clone().requires_grad_(), labels != -100
    losses, divergence = naive(leaf, x_base, weight, labels)
    expected = scale.double() * losses.sum(), scale.double() * divergence.sum()
    loss = expected[0] + KL_WEIGHT * expected[1]
    output = linear_cross_entropy_kl_forward(
        x, x_base, weight, labels, scale, KL_WEIGHT, need_dx=True, chunk_size=chunk_size, per_token=True
    )
    close = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(output[:3], (loss.detach(), *(part.detach() for part in expected)), **close)
    torch.testing.assert_close(output.dx, torch.autograd.grad(loss, leaf)[0], **close)
    for found, wanted in ((output.token_losses, losses), (output.token_divergence, divergence)):
        torch.testing.assert_close(found[valid], wanted.detach(), **close)
        assert (found[~valid] == 0).all()


def test_gradcheck():
    x, *rest = problem(tokens=5, hidden=3, vocab=4)
    assert torch.autograd.gradcheck(
        lambda x: linear_cross_entropy_kl(x, *rest, KL_WEIGHT, chunk_size=2)[0], x.requires_grad_()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [V, 5003])
def test_at_bit_equal_states_it_is_the_cross_entropy_bit_for_bit(dtype, vocab):
    """As at the first step of a run, whatever the weight: what pulls to the base is exactly nothing there."""
    x, _, weight, labels, scale = problem(dtype, vocab=vocab)
    options = {"need_dx": True, "chunk_size": 4, "per_token": True}
    ours = linear_cross_entropy_kl_forward(x, x.clone(), weight, labels, scale, 3.0, **options)
    alone = linear_cross_entropy_forward(x, weight, labels, scale, need_dweight=False, **options)
    assert torch.equal(ours.dx, alone.dx)
    assert torch.equal(ours.loss, alone.loss)
    assert torch.equal(ours.token_losses, alone.token_losses)
    assert (ours.token_divergence == 0).all()


def test_a_weight_of_zero_is_the_cross_entropy_with_a_meter_beside_it():
    x, x_base, weight, labels, scale = problem()
    ours = linear_cross_entropy_kl_forward(x, x_base, weight, labels, scale, 0, need_dx=True)
    alone = linear_cross_entropy_forward(x, weight, labels, scale, need_dx=True, need_dweight=False)
    assert torch.equal(ours.dx, alone.dx)
    assert torch.equal(ours.loss, alone.loss)
    assert ours.divergence > 0


@pytest.mark.parametrize("scale", [0.5, INF])
def test_without_a_valid_label_all_is_exactly_zero(scale):
    x, x_base, weight, labels, _ = problem(torch.float32)
    nothing, scale = torch.full_like(labels, -100), torch.tensor(scale)
    for tensor in linear_cross_entropy_kl_forward(
        x, x_base, weight, nothing, scale, KL_WEIGHT, need_dx=True, per_token=True
    ):
        assert (tensor == 0).all()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("which", ["now", "base"])
def test_what_is_not_finite_shows(which, bad):
    """In the losses of its token, and in the gradient even where the label is ignored."""
    x, x_base, weight, labels, scale = problem(torch.float32)
    (x if which == "now" else x_base)[:2, 0] = bad  # token 1 has no label
    output = linear_cross_entropy_kl_forward(
        x, x_base, weight, labels, scale, KL_WEIGHT, need_dx=True, per_token=True
    )  # fmt: skip
    assert output.loss.isnan()
    assert output.divergence.isnan()
    assert output.token_divergence.isnan().nonzero().tolist() == [[0]]
    assert output.dx.isnan().any(-1).nonzero().tolist() == [[0], [1]]


@pytest.mark.parametrize("padding", [1, 5000])
def test_words_that_cannot_come(padding):
    """Masked for both, they change nothing; masked now alone, the divergence is infinite, and masked in the base 0·∞
    is 0. More than one block of them, and at the row's begin, where there is no maximum yet."""
    body = implementation(torch.ones(1))
    masked = torch.full((3, padding), -INF)
    now, base = torch.randn(2, 3, 5)
    labels, one = torch.arange(3), torch.tensor(1.0)

    def run(now, base, labels):
        now = now.clone()
        return *body.cross_entropy_kl_(now, base, labels, one, KL_WEIGHT, ignore_index=-100, need_dlogits=True), now

    losses, divergence, dlogits = run(now, base, labels)
    found = run(*(torch.cat([masked, logits], 1) for logits in (now, base)), labels + padding)
    torch.testing.assert_close(found, (losses, divergence, torch.cat([torch.zeros_like(masked), dlogits], 1)))
    _, divergence, dlogits = run(now.index_fill(1, torch.tensor([4]), -INF), base, labels)
    assert (divergence == INF).all()
    assert (dlogits[:, 4] < 0).all()
    _, divergence, dlogits = run(now, base.index_fill(1, torch.tensor([4]), -INF), labels)
    assert divergence.isfinite().all()
    assert dlogits.isfinite().all()


def test_huge_logits_do_not_overflow():
    x, x_base, weight, labels, scale = problem(torch.float32)
    x, x_base = 1e4 * x, 1e4 * x_base
    output = linear_cross_entropy_kl_forward(x, x_base, weight, labels, scale, KL_WEIGHT, need_dx=True)
    valid = labels != -100
    logp, base = ((states.double() @ weight.double().t()).log_softmax(-1)[valid] for states in (x, x_base))
    expected = -logp.gather(1, labels[valid, None]).sum(), (base.exp() * (base - logp)).sum()
    torch.testing.assert_close(output[1:3], tuple((scale * sum_).float() for sum_ in expected), rtol=1e-5, atol=0)
    assert output.divergence > 1e3
    assert output.dx.isfinite().all()


@pytest.mark.parametrize(("need_dx", "products"), [(False, 2), (True, 3)])
def test_the_products_counted_are_the_products_made(need_dx, products):
    """The registered op by its formula, its body from within."""
    x, x_base, weight, labels, scale = problem(torch.float32)
    with FlopCounterMode(display=False) as counted:
        linear_cross_entropy_kl_forward(x, x_base, weight, labels, scale, KL_WEIGHT, need_dx=need_dx, chunk_size=4)
    with FlopCounterMode(display=False) as made:
        linear_cross_entropy_kl_outputs(x, x_base, weight, labels, scale, KL_WEIGHT, need_dx, -100, 4, False)
    assert counted.get_total_flops() == made.get_total_flops() == products * 2 * T * H * V


def test_logits_exist_for_one_chunk_at_a_time(monkeypatch):
    module = sys.modules[linear_cross_entropy_kl_outputs.__module__]
    made, linear = [], module.linear

    def watched(*arguments):
        alive = sum(reference() is not None for reference in made)
        assert alive == len(made) % 2, "the last chunk's logits are still there"
        logits = linear(*arguments)
        made.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(module, "linear", watched)
    linear_cross_entropy_kl_forward(*problem(torch.float32), KL_WEIGHT, need_dx=True, chunk_size=4)
    assert len(made) == 6


def test_autograd_keeps_dx_only_and_hands_it_out_once(kept):
    x, *rest = problem(torch.float32)
    explicit = linear_cross_entropy_kl_forward(x, *rest, KL_WEIGHT, need_dx=True)
    x.requires_grad_()
    with kept() as tensors:
        loss, cross_entropy, divergence = linear_cross_entropy_kl(x, *rest, KL_WEIGHT, consume=True)
    assert all(map(torch.equal, (loss, cross_entropy, divergence), explicit[:3]))
    assert not cross_entropy.requires_grad
    assert not divergence.requires_grad
    (dx,) = tensors
    with FlopCounterMode(display=False) as flops:
        (2.5 * loss).backward(retain_graph=True)
    assert flops.get_total_flops() == 0
    assert torch.equal(x.grad, 2.5 * explicit.dx)
    assert torch.equal(dx, x.grad)
    with pytest.raises(RuntimeError, match="linear_cross_entropy_kl: backward ran a second time"):
        loss.backward()
    loss, *_ = linear_cross_entropy_kl(x, *rest, KL_WEIGHT)
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(loss, x, retain_graph=True)[0], explicit.dx)


def test_no_gradient_is_made_under_no_grad():
    x, *rest = problem(torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        linear_cross_entropy_kl(x.requires_grad_(), *rest, KL_WEIGHT)
    assert flops.get_total_flops() == 2 * 2 * T * H * V


@pytest.mark.parametrize("name", ["x_base", "weight"])
def test_who_would_get_no_gradient_may_not_ask_for_one(name):
    x, x_base, weight, labels, scale = problem(torch.float32)
    (x_base if name == "x_base" else weight).requires_grad_()
    with pytest.raises(ValueError, match=f"{name} requires a gradient"):
        linear_cross_entropy_kl(x, x_base, weight, labels, scale, KL_WEIGHT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl_weight": -0.5}, "kl_weight is -0.5"),
        ({"kl_weight": NAN}, "kl_weight is nan"),
        ({"kl_weight": INF}, "kl_weight is inf"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"x_base": torch.ones(T - 1, H, device="cpu")}, r"x_base has shape \[10, 6\]"),
        ({"labels": torch.zeros(5, dtype=torch.int64, device="cpu")}, r"labels \[5\]"),
        ({"scale": torch.ones(1, device="cpu")}, r"scale \[1\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    names = "x", "x_base", "weight", "labels", "scale", "kl_weight"
    arguments = dict(zip(names, (*problem(torch.float32), KL_WEIGHT), strict=True)) | {"need_dx": True}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy_kl_forward(**arguments | change)
