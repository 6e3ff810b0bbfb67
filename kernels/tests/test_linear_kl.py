import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from llama_pro_kernels import linear_cross_entropy_forward, linear_kl, linear_kl_with_losses

fp64 = torch.float64
T, H, V = 11, 6, 17


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 11])
def test_is_the_kl_divergence_of_the_two_predictions(chunk_size):
    base, now, weight = torch.randn(T, H, dtype=fp64), torch.randn(T, H, dtype=fp64), torch.randn(V, H, dtype=fp64)
    p, q = (F.softmax(x @ weight.t(), -1) for x in (base, now))
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(linear_kl(base, now, weight, chunk_size=chunk_size), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equal_states_have_exactly_no_divergence_and_different_ones_do(dtype):
    base, weight = torch.randn(T, H).to(dtype), torch.randn(V, H).to(dtype)
    now = base.clone()
    now[::2] += 0.5
    divergence = linear_kl(base, now, weight, chunk_size=4)
    assert divergence.dtype == torch.float32
    assert (divergence[1::2] == 0).all()
    assert (divergence[::2] > 0).all()


def test_is_not_negative_beyond_rounding():
    base, weight = torch.randn(200, H), torch.randn(500, H)
    assert (linear_kl(base, base + 1e-4 * torch.randn_like(base), weight) > -1e-5).all()


def test_nan_shows_and_nothing_is_differentiable():
    base, now, weight = torch.randn(T, H), torch.randn(T, H), torch.randn(V, H, requires_grad=True)
    now[3, 2] = float("nan")
    divergence = linear_kl(base, now.requires_grad_(), weight)
    assert divergence.isnan().nonzero().tolist() == [[3]]
    assert not divergence.requires_grad


def test_strides_do_not_matter():
    base, now, weight = (torch.randn(H, n, dtype=fp64).t() for n in (T, T, V))
    expected = linear_kl(base.contiguous(), now.contiguous(), weight.contiguous())
    torch.testing.assert_close(linear_kl(base, now, weight, chunk_size=4), expected, rtol=0, atol=1e-12)


def test_states_and_chunks_that_do_not_fit_are_refused():
    x, weight = torch.randn(T, H), torch.randn(V, H)
    with pytest.raises(ValueError, match="x_now"):
        linear_kl(x, x[:3], weight)
    with pytest.raises(ValueError, match="chunk_size is 0"):
        linear_kl(x, x, weight, chunk_size=0)


def test_the_base_may_have_its_own_head_and_width():
    base, now, weight = torch.randn(T, H, dtype=fp64), torch.randn(T, H, dtype=fp64), torch.randn(V, H, dtype=fp64)
    labels, own = torch.randint(V, (T,)), torch.randn(V, 4, dtype=fp64)
    p, q = (x @ head.t() for x, head in ((base[:, :4], own), (now, weight)))
    expected = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    with FlopCounterMode(display=False) as flops:
        divergence = linear_kl(base[:, :4], now, weight, weight_base=own, chunk_size=4)
    assert flops.get_total_flops() == 2 * T * (4 + H) * V
    torch.testing.assert_close(divergence, expected, rtol=0, atol=1e-10)
    found = linear_kl_with_losses(base[:, :4], now, weight, labels, weight_base=own)
    losses = (F.cross_entropy(logits, labels, reduction="none") for logits in (p, q))
    torch.testing.assert_close(tuple(found), (expected, *losses), rtol=0, atol=1e-10)
    same = linear_kl_with_losses(base, now, weight, labels, weight_base=weight.clone())
    assert all(map(torch.equal, same, linear_kl_with_losses(base, now, weight, labels)))
    with pytest.raises(ValueError, match=r"weight_base \[16, 4\]"):
        linear_kl(base[:, :4], now, weight, weight_base=own[1:])
    with pytest.raises(ValueError, match=r"x_base \[11, 6\]"):
        linear_kl(base, now, weight, weight_base=own)


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, fp64])
def test_with_losses_it_gives_what_the_two_give_alone(dtype, chunk_size):
    base, now, weight = (torch.randn(n, H, dtype=dtype) for n in (T, T, V))
    labels = torch.randint(V, (T,))
    labels[[2, 7]] = -100
    found = linear_kl_with_losses(base, now, weight, labels, chunk_size=chunk_size)
    assert torch.equal(found.divergence, linear_kl(base, now, weight, chunk_size=chunk_size))
    for x, losses in ((base, found.base_losses), (now, found.losses)):
        alone = linear_cross_entropy_forward(
            x, weight, labels, torch.ones(()), need_dx=False, need_dweight=False, per_token=True, chunk_size=chunk_size
        )
        assert torch.equal(losses, alone.token_losses)
        assert (losses[[2, 7]] == 0).all()
    with pytest.raises(ValueError, match="labels"):
        linear_kl_with_losses(base, now, weight, labels[:3])
