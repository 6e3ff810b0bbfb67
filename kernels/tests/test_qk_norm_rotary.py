import pytest
import torch
from torch.nn import functional as F

from llama_pro_kernels import qk_norm_rotary_backward, qk_norm_rotary_forward, reference
from llama_pro_kernels.library import implementation

EPS = 1e-6
N, K, T = 4, 2, 9
fp64 = torch.float64


def tables(head_dim):
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=fp64) / head_dim)
    angles = torch.arange(32, dtype=fp64)[:, None] * frequency
    return angles.cos().float(), angles.sin().float(), torch.tensor([0, 1, 2, 3, 0, 1, 0, 30, 31])


def inputs(dtype, head_dim):
    qkv = torch.randn(T, (N + 2 * K) * head_dim).to(dtype)
    weights = [(1 + 0.3 * torch.randn(head_dim)).to(dtype) for _ in range(2)]
    gradients = [torch.randn(T, heads, head_dim).to(dtype) for heads in (N, K, K)]
    return qkv, *weights, *gradients


def plain(qkv, q_weight, k_weight, dq, dk, dv):
    """The formula in plain PyTorch in the inputs' dtype, and autograd of it."""
    head_dim = len(q_weight)
    leaves = [tensor.detach().requires_grad_() for tensor in (qkv, q_weight, k_weight)]
    q, k, v = leaves[0].view(T, -1, head_dim).split([N, K, K], dim=1)
    cos, sin, position_ids = tables(head_dim)
    cos, sin = (torch.cat([table, table], -1)[position_ids][:, None].to(qkv.dtype) for table in (cos, sin))

    def norm_and_turn(x, weight):
        x = F.rms_norm(x, (head_dim,), weight, EPS)
        return x * cos + torch.cat([-x[..., head_dim // 2 :], x[..., : head_dim // 2]], -1) * sin

    outputs = norm_and_turn(q, leaves[1]), norm_and_turn(k, leaves[2]), v
    return *(t.detach() for t in outputs), *torch.autograd.grad(outputs, leaves, (dq, dk, dv))


def ours(qkv, q_weight, k_weight, dq, dk, dv):
    head_dim = len(q_weight)
    q, k, v = qk_norm_rotary_forward(qkv, q_weight, k_weight, EPS, *tables(head_dim), N, K, head_dim)
    gradients = qk_norm_rotary_backward(dq, dk, dv, qkv, q_weight, k_weight, EPS, *tables(head_dim), need_dweight=True)
    return q, k, v, *gradients


def test_is_norm_then_rotation_and_its_autograd_in_fp64():
    arguments = inputs(fp64, 8)
    before = arguments[0].clone()
    torch.testing.assert_close(ours(*arguments), plain(*arguments), rtol=0, atol=1e-10)
    assert torch.equal(arguments[0], before), "the kept input was written over"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_holds_the_2x_rule(dtype, head_dim, assert_twice_as_good):
    arguments = inputs(dtype, head_dim)
    exact = plain(*(tensor.double() for tensor in arguments))
    for index, (got, theirs, exactly) in enumerate(zip(ours(*arguments), plain(*arguments), exact, strict=True)):
        if index >= 4:  # the weights' gradients, which are never rounded
            assert got.dtype == torch.float32
            theirs = theirs.float()
        assert_twice_as_good(got, theirs, exactly)


def test_frozen_weights_get_no_gradient():
    qkv, q_weight, k_weight, *gradients = inputs(torch.float32, 8)
    _, dq_weight, dk_weight = qk_norm_rotary_backward(
        *gradients, qkv, q_weight, k_weight, EPS, *tables(8), need_dweight=False
    )
    assert dq_weight is None
    assert dk_weight is None


def test_strides_do_not_matter():
    qkv, *weights, dq, dk, dv = inputs(torch.float32, 8)
    expected = ours(qkv, *weights, dq, dk, dv)
    wide = torch.randn(T, 2 * qkv.shape[1])
    wide[:, : qkv.shape[1]] = qkv
    heads_first = [gradient.transpose(0, 1).contiguous().transpose(0, 1) for gradient in (dq, dk, dv)]
    columns_first = [gradient.transpose(1, 2).contiguous().transpose(1, 2) for gradient in (dq, dk, dv)]
    for gradients in (heads_first, columns_first):
        for got, exactly in zip(ours(wide[:, : qkv.shape[1]], *weights, *gradients), expected, strict=True):
            torch.testing.assert_close(got, exactly, rtol=0, atol=1e-6)


def test_more_tokens_than_programs_that_sum(device):
    """The last turn of the programs has fewer tokens than there are programs; heads of 6 do not fill a block."""
    tokens = 700 if device == "cuda" else 21
    qkv, q_weight, k_weight = torch.randn(tokens, (N + 2 * K) * 6), torch.rand(6), torch.rand(6)
    gradients = [torch.randn(tokens, heads, 6) for heads in (N, K, K)]
    cos, sin, _ = tables(6)
    rest = qkv, q_weight, k_weight, EPS, cos, sin, torch.arange(tokens) % 32
    got = qk_norm_rotary_backward(*gradients, *rest, need_dweight=True)
    exact = qk_norm_rotary_backward(
        *(x.double() for x in gradients),
        *(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in rest),
        need_dweight=True,
    )
    for ours_, exactly in zip(got, exact, strict=True):
        torch.testing.assert_close(ours_.double(), exactly, rtol=1e-5, atol=1e-5 * exactly.abs().max().item())


def test_without_an_eps_nothing_but_heads_of_zeros_is_nan():
    """Heads that do not fill a block are no heads of zeros."""
    qkv, q_weight, k_weight = torch.randn(T, (5 + 2 * 2) * 6), torch.rand(6), torch.rand(6)
    gradients = [torch.randn(T, heads, 6) for heads in (5, 2, 2)]
    for got in qk_norm_rotary_backward(*gradients, qkv, q_weight, k_weight, 0.0, *tables(6), need_dweight=True):
        assert got.isfinite().all()


def test_a_position_beyond_the_tables_is_nan_in_its_token_alone():
    qkv, *weights, dq, dk, dv = inputs(torch.float32, 8)
    cos, sin, position_ids = tables(8)
    position_ids[3] = 32
    if implementation(qkv) is reference:
        with pytest.raises(IndexError):
            qk_norm_rotary_forward(qkv, *weights, EPS, cos, sin, position_ids, N, K, 8)
        return
    q, k, _ = qk_norm_rotary_forward(qkv, *weights, EPS, cos, sin, position_ids, N, K, 8)
    rest = qkv, *weights, EPS, cos, sin, position_ids
    dqkv, *_ = qk_norm_rotary_backward(dq, dk, dv, *rest, need_dweight=False)
    for rows in (q, k, dqkv[:, : (N + K) * 8]):
        assert rows[3].isnan().all()
        assert rows[[0, 1, 2, 4, 5, 6, 7, 8]].isfinite().all()


def test_heads_that_are_turned_in_part_are_refused():
    qkv, *weights, _, _, _ = inputs(torch.float32, 8)
    with pytest.raises(ValueError, match="cos turns 4 dimensions, a head has 8"):
        qk_norm_rotary_forward(qkv, *weights, EPS, *tables(4), N, K, 8)
