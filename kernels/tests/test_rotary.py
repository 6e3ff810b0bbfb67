import pytest
import torch

from llama_pro_kernels import reference, rotary, rotary_backward, rotary_forward, rotary_forward_
from llama_pro_kernels.library import implementation

fp64 = torch.float64
N, K, D, T = 4, 2, 8, 9


def tables(rotary_dim, dtype=torch.float32, positions=32):
    frequency = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=fp64) / rotary_dim)
    angles = torch.arange(positions, dtype=fp64)[:, None] * frequency
    return angles.cos().to(dtype), angles.sin().to(dtype)


def positions():
    return torch.tensor([0, 1, 2, 3, 0, 1, 0, 30, 31])


def naive(qkv, cos, sin, position_ids):
    """Complex multiplication of x_i + j·x_{i+R/2} by e^{jθ}."""
    q, k, v = qkv.view(T, -1, D).split([N, K, K], dim=1)
    half = cos.shape[-1]
    turn = torch.complex(cos.double(), sin.double())[position_ids][:, None]

    def rotate(x):
        turned = torch.complex(x[..., :half].contiguous(), x[..., half : 2 * half].contiguous()) * turn
        return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], -1)

    return rotate(q), rotate(k), v


@pytest.mark.parametrize("rotary_dim", [D, 4])
@pytest.mark.parametrize("op", [rotary_forward, rotary_forward_, rotary])
def test_forward_is_complex_multiplication(rotary_dim, op):
    qkv, (cos, sin) = torch.randn(T, (N + 2 * K) * D, dtype=fp64), tables(rotary_dim)
    expected = naive(qkv.clone(), cos, sin, positions())
    got = op(qkv, cos, sin, positions(), N, K, D)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("op", [rotary_forward, rotary_forward_])
def test_heads_of_one_kind_turn_alone(op):
    """A norm per head stands between projection and rotation and leaves q and k in buffers of their own."""
    qkv, (cos, sin) = torch.randn(T, (N + 2 * K) * D), tables(D)
    q, _, _ = rotary_forward(qkv, cos, sin, positions(), N, K, D)
    alone, *nothing = op(qkv[:, : N * D].contiguous(), cos, sin, positions(), N, 0, D)
    assert torch.equal(alone, q)
    assert all(t.shape == (T, 0, D) for t in nothing)


@pytest.mark.parametrize("rotary_dim", [D, 4])
def test_backward_is_autograd_of_the_formula(rotary_dim):
    qkv, (cos, sin) = torch.randn(T, (N + 2 * K) * D, dtype=fp64, requires_grad=True), tables(rotary_dim)
    gradients = [torch.randn(T, heads, D, dtype=fp64) for heads in (N, K, K)]
    expected = torch.autograd.grad(naive(qkv, cos, sin, positions()), qkv, gradients)[0]
    got = rotary_backward(*gradients, cos, sin, positions())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_half_split_convention_is_hugging_faces():
    """dimension i pairs with i + R/2: rotate_half(x)·sin + x·cos with the tables doubled."""
    qkv, (cos, sin) = torch.randn(T, (N + 2 * K) * D), tables(D)
    q = qkv.view(T, -1, D)[:, :N]
    cos2, sin2 = (torch.cat([t, t], -1)[positions()][:, None] for t in (cos, sin))
    rotated_half = torch.cat([-q[..., D // 2 :], q[..., : D // 2]], -1)
    got = rotary_forward(qkv, cos, sin, positions(), N, K, D)[0]
    torch.testing.assert_close(got, q * cos2 + rotated_half * sin2, rtol=0, atol=1e-6)


def test_backward_undoes_forward():
    qkv, (cos, sin) = torch.randn(T, (N + 2 * K) * D, dtype=fp64), tables(D, fp64)
    back = rotary_backward(*rotary_forward(qkv, cos, sin, positions(), N, K, D), cos, sin, positions())
    torch.testing.assert_close(back, qkv, rtol=0, atol=1e-12)


def test_gradcheck():
    qkv, (cos, sin) = torch.randn(T, (N + 2 * K) * D, dtype=fp64, requires_grad=True), tables(4)
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin, positions(), N, K, D), qkv)


def test_views_and_copies(same_storage, kept):
    qkv, (cos, sin) = torch.randn(T, (N + 2 * K) * D), tables(D)
    before = qkv.clone()
    q, k, v = rotary_forward(qkv, cos, sin, positions(), N, K, D)
    assert torch.equal(qkv, before)
    assert [same_storage(t, qkv) for t in (q, k, v)] == [False, False, True]
    assert all(same_storage(t, qkv) for t in rotary_forward_(qkv, cos, sin, positions(), N, K, D))
    leaf = before.requires_grad_()
    with kept() as tensors:
        rotary(leaf, cos, sin, positions(), N, K, D)
    assert not any(t.shape[-1] >= D for t in tensors if t.is_floating_point())


def test_bf16_is_twice_as_good_as_plain_bf16(assert_twice_as_good):
    qkv, (cos, sin) = torch.randn(T, (N + 2 * K) * D).bfloat16(), tables(D)
    exact = naive(qkv.double(), cos, sin, positions())
    q = qkv.view(T, -1, D)[:, :N]
    cos2, sin2 = (torch.cat([t, t], -1)[positions()][:, None].bfloat16() for t in (cos, sin))
    plain = q * cos2 + torch.cat([-q[..., D // 2 :], q[..., : D // 2]], -1) * sin2
    assert_twice_as_good(rotary_forward(qkv, cos, sin, positions(), N, K, D)[0], plain, exact[0])


@pytest.mark.parametrize("op", [rotary_forward, rotary_forward_])
def test_strides_do_not_matter(op):
    base, (cos, sin) = torch.randn((N + 2 * K) * D, T, dtype=fp64), tables(D)
    expected = rotary_forward(base.t().contiguous(), cos, sin, positions(), N, K, D)
    assert all(map(torch.equal, op(base.clone().t(), cos, sin, positions(), N, K, D), expected))
    gradients = [torch.randn(heads, D, T, dtype=fp64).permute(2, 0, 1) for heads in (N, K, K)]
    contiguous = [gradient.contiguous() for gradient in gradients]
    assert torch.equal(
        rotary_backward(*gradients, cos, sin, positions()), rotary_backward(*contiguous, cos, sin, positions())
    )


def test_a_position_beyond_the_table_shows():
    """As an error, or in Triton, which cannot raise one, as NaN; never as somebody else's memory."""
    qkv, (cos, sin) = torch.randn(T, (N + 2 * K) * D), tables(D, positions=8)
    if implementation(qkv) is reference:
        with pytest.raises(IndexError):
            rotary_forward(qkv, cos, sin, positions(), N, K, D)
        return
    for beyond in (positions(), positions().neg() - 1):
        q, k, v = rotary_forward(qkv, cos, sin, beyond, N, K, D)
        outside = (beyond < 0) | (beyond >= 8)
        for turned in (q, k):
            assert torch.equal(turned.isnan().all((1, 2)), outside)
            assert torch.equal(turned.isnan().any((1, 2)), outside)
        assert v.isfinite().all()


def test_nan_stays_in_its_head():
    qkv, (cos, sin) = torch.randn(T, (N + 2 * K) * D), tables(D)
    qkv[3, 0] = float("nan")
    q, k, v = rotary_forward(qkv, cos, sin, positions(), N, K, D)
    assert q.isnan().any(-1).nonzero().tolist() == [[3, 0]]
    assert not k.isnan().any()
    assert not v.isnan().any()
