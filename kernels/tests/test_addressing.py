"""Where a kernel reads and writes: strides of every kind, rows far apart or over each other, what autograd is told."""

import pytest
import torch

from llama_pro_kernels import (
    add_rms_norm_forward,
    rms_norm_backward,
    rms_norm_forward,
    rotary_backward,
    rotary_forward,
    rotary_forward_,
    swiglu_backward,
    swiglu_backward_,
    swiglu_forward,
)
from llama_pro_kernels.library import implementation

EPS = 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strides_change_nothing(dtype):
    """Transposed, sliced, expanded: whatever the kernel cannot address is copied, never read wrongly."""

    def variants(tensor):
        yield tensor.t().contiguous().t()
        wide = torch.full((len(tensor), 2 * tensor.shape[1]), float("nan"), dtype=dtype)
        wide[:, ::2] = tensor
        yield wide[:, ::2]
        padded = torch.full((len(tensor), tensor.shape[1] + 3), float("nan"), dtype=dtype)
        padded[:, 1:-2] = tensor
        yield padded[:, 1:-2]
        yield tensor[:1].expand_as(tensor)

    heads, kv_heads, head_dim = 3, 1, 8
    x = torch.randn(6, 40).to(dtype)
    weight, cos = torch.randn(40).to(dtype), torch.rand(9, 4)
    position_ids = torch.arange(6)

    def run(x):
        y, s, rstd = add_rms_norm_forward(x, x, weight, EPS)
        dx, dweight = rms_norm_backward(x, x, weight, rstd, dresidual=x, need_dweight=True)
        three = x.unflatten(1, (5, 8))
        dqkv = rotary_backward(three[:, :3], three[:, 3:4], three[:, 4:], cos, cos, position_ids)
        turned = rotary_forward(x, cos, cos, position_ids, heads, kv_heads, head_dim)
        dgate_up, product = swiglu_backward(x[:, :20], x, need_product=True)
        return [y, s, rstd, dx, dweight, dqkv, *turned, swiglu_forward(x), dgate_up, product]

    for variant in variants(x):
        expected = run(variant.contiguous())
        # Close and not equal, because PyTorch sums a transposed row in another order.
        torch.testing.assert_close(run(variant), expected)
    # In place, through strides that the kernel cannot address.
    expected = swiglu_backward(x[:, :20], x)[0]
    torch.testing.assert_close(swiglu_backward_(x[:, :20], x.t().contiguous().t())[0], expected)
    turned = rotary_forward_(x.t().contiguous().t(), cos, cos, position_ids, heads, kv_heads, head_dim)
    expected = rotary_forward(x, cos, cos, position_ids, heads, kv_heads, head_dim)
    torch.testing.assert_close(turned, expected)


def test_a_write_over_an_input_is_seen_by_autograd():
    """Whoever else saved the buffer gets an error and not the new numbers."""
    gate_up, qkv = torch.randn(3, 8), torch.randn(3, 24)
    tables = torch.rand(9, 2), torch.rand(9, 2), torch.arange(3)
    for buffer, write in (
        (gate_up, lambda: swiglu_backward_(torch.randn(3, 4), gate_up)),
        (qkv, lambda: rotary_forward_(qkv, *tables, 4, 1, 4)),
    ):
        leaf = torch.ones_like(buffer).requires_grad_()
        loss = (leaf * buffer).sum()
        write()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_rows_that_share_memory_are_not_written_over():
    shared = torch.randn(1, 24).expand(3, 24)
    tables = torch.rand(9, 2), torch.rand(9, 2), torch.arange(3)
    with pytest.raises(RuntimeError, match="single memory location"):
        swiglu_backward_(torch.randn(3, 12), shared)
    with pytest.raises(RuntimeError, match="single memory location"):
        rotary_forward_(shared, *tables, 4, 1, 4)


def padded(tensor, pad):
    """The same numbers in rows ``pad`` further apart; what lies between is NaN."""
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + pad), float("nan"))
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def heads_last(tensor):
    """``[T, heads, D]`` with the same numbers, whose heads lie a whole sequence apart."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def test_every_stream_has_its_own_strides():
    x, residual, dy, ds = torch.randn(4, 6, 40)
    weight = torch.rand(40)
    y, s, rstd = add_rms_norm_forward(x, residual, weight, EPS)
    got = add_rms_norm_forward(padded(x, 1), padded(residual, 2), weight, EPS)
    assert all(map(torch.equal, got, (y, s, rstd)))
    wanted = rms_norm_backward(dy, s, weight, rstd, dresidual=ds, need_dweight=True)
    got = rms_norm_backward(
        padded(dy, 1), padded(s, 2), weight, rstd, dresidual=padded(ds, 3), need_dweight=True
    )  # fmt: skip
    assert all(map(torch.equal, got, wanted))
    # By head, where one of the three has no single stride of a row.
    x, dy, ds = torch.randn(3, 5, 4, 16)
    weight = torch.rand(16)
    y, rstd = rms_norm_forward(x, weight, EPS)
    wanted = rms_norm_backward(dy, x, weight, rstd, dresidual=ds, need_dweight=True)
    for which in range(3):
        streams = [padded(heads_last(t), 4) if i == which else t for i, t in enumerate((dy, x, ds))]
        got = rms_norm_backward(*streams[:2], weight, rstd, dresidual=streams[2], need_dweight=True)
        torch.testing.assert_close(got, wanted)
    got = rms_norm_backward(
        padded(heads_last(dy), 1), padded(x, 2), weight, rstd, dresidual=heads_last(ds), need_dweight=True
    )  # fmt: skip
    torch.testing.assert_close(got, wanted)

    dq, dk, dv = torch.randn(6, 5, 8), torch.randn(6, 2, 8), torch.randn(6, 2, 8)
    tables, position_ids = (torch.rand(12, 4), torch.rand(12, 4)), torch.arange(12)[::2]
    wanted = rotary_backward(dq, dk, dv, *tables, position_ids.contiguous())
    for layout in (
        (heads_last(dq), dk, dv),
        (dq, heads_last(dk), dv),
        (dq, dk, heads_last(dv)),
        (dq, dk, padded(dv, 3)),
    ):
        assert torch.equal(rotary_backward(*layout, *tables, position_ids), wanted)

    gate_up, dy = torch.randn(6, 40), torch.randn(6, 20)
    wanted = swiglu_backward(dy, gate_up, need_product=True)
    assert all(map(torch.equal, swiglu_backward(padded(dy, 1), padded(gate_up, 2), need_product=True), wanted))
    assert torch.equal(swiglu_backward_(padded(dy, 1), padded(gate_up, 2))[0], wanted[0])

    body = implementation(gate_up)
    base, now = torch.randn(2, 6, 40)
    wanted = body.kl_divergence(base, now)
    torch.testing.assert_close(body.kl_divergence(padded(base, 1), padded(now, 2)), wanted)
    rest, options = (torch.arange(6), torch.tensor(1.0), 0.7), {"ignore_index": -100, "need_dlogits": True}
    written = padded(now, 2)
    got = body.cross_entropy_kl_(written, padded(base, 1), *rest, **options)
    torch.testing.assert_close(got, body.cross_entropy_kl_(now, base.t().contiguous().t(), *rest, **options))
    torch.testing.assert_close(written, now)


def test_logits_written_over_are_seen_by_autograd():
    body, labels, scale = implementation(torch.ones(1)), torch.arange(3), torch.tensor(1.0)
    options = {"ignore_index": -100, "need_dlogits": True}
    for write in (
        lambda logits: body.cross_entropy_(logits, labels, scale, **options),
        lambda logits: body.cross_entropy_kl_(logits, torch.randn(3, 8), labels, scale, 0.7, **options),
    ):
        leaf, logits = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
        loss = (leaf * logits).sum()
        write(logits)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


FAR = 2**30 + 64
"""Elements between one row and the next: the third begins beyond what 32 bits count. The gaps are never touched."""


def far_apart(tensor, strides):
    """The same numbers at such strides."""
    size = 1 + sum(stride * (length - 1) for stride, length in zip(strides, tensor.shape, strict=True))
    return torch.empty(size, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


def far_rows(tensor):
    return far_apart(tensor, (FAR, 1))


def test_norms_over_more_than_2_to_the_31_elements():
    near, weight = torch.randn(4, 64).half(), torch.randn(64).half()
    y, s, rstd = add_rms_norm_forward(near, near, weight, EPS)
    assert torch.equal(rms_norm_forward(far_rows(near), weight, EPS)[0], rms_norm_forward(near, weight, EPS)[0])
    for x, residual in ((far_rows(near), near), (near, far_rows(near))):
        assert all(map(torch.equal, add_rms_norm_forward(x, residual, weight, EPS), (y, s, rstd)))
    wanted = rms_norm_backward(near, s, weight, rstd, dresidual=near, need_dweight=True)
    for dy, x, ds in ((far_rows(near), s, near), (near, far_rows(s), near), (near, s, far_rows(near))):
        got = rms_norm_backward(dy, x, weight, rstd, dresidual=ds, need_dweight=True)
        assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("strides", [(FAR, 32, 1), (32, FAR, 1)])
def test_norms_per_head_over_more_than_2_to_the_31_elements(strides):
    near, weight = torch.randn(4, 4, 32).half(), torch.randn(32).half()
    y, rstd = rms_norm_forward(near, weight, EPS)
    assert torch.equal(rms_norm_forward(far_apart(near, strides), weight, EPS)[0], y)
    wanted = rms_norm_backward(near, near, weight, rstd, need_dweight=False)[0]
    assert torch.equal(rms_norm_backward(far_apart(near, strides), near, weight, rstd, need_dweight=False)[0], wanted)


def test_rotations_over_more_than_2_to_the_31_elements():
    near, cos, position_ids = torch.randn(4, 64).half(), torch.rand(9, 4), torch.arange(4)
    wanted = rotary_forward(near, cos, cos, position_ids, 6, 1, 8)
    got = rotary_forward(far_rows(near), cos, cos, position_ids, 6, 1, 8)
    assert all(map(torch.equal, got, wanted))
    gradients = [torch.randn(4, 4, 8).half() for _ in range(3)]
    wanted = rotary_backward(*gradients, cos, cos, position_ids)
    for which in range(3):
        for strides in ((FAR, 8, 1), (8, FAR, 1)):
            far = [far_apart(t, strides) if i == which else t for i, t in enumerate(gradients)]
            assert torch.equal(rotary_backward(*far, cos, cos, position_ids), wanted)


def test_swiglu_over_more_than_2_to_the_31_elements():
    near, dy = torch.randn(4, 64).half(), torch.randn(4, 32).half()
    far = far_rows(near)
    assert torch.equal(swiglu_forward(far), swiglu_forward(near))
    wanted = swiglu_backward(dy, near)[0]
    assert torch.equal(swiglu_backward(far_rows(dy), near)[0], wanted)
    assert torch.equal(swiglu_backward_(dy, far)[0], wanted)


def test_losses_over_more_than_2_to_the_31_elements():
    body = implementation(torch.ones(1))
    near, other = torch.randn(2, 4, 64).half()
    wanted = body.kl_divergence(near, other)
    torch.testing.assert_close(body.kl_divergence(far_rows(near), other), wanted)
    torch.testing.assert_close(body.kl_divergence(near, far_rows(other)), wanted)
    far, labels, scale = far_rows(near), torch.arange(4), torch.tensor(1.0)
    options = {"ignore_index": -100, "need_dlogits": True, "need_correct": True}
    got, wanted = (body.cross_entropy_(logits, labels, scale, **options) for logits in (far, near))
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(far, near)
    options.pop("need_correct")
    for far_now, far_base in ((True, False), (False, True)):
        now = far_rows(other) if far_now else other.clone()
        expected = other.clone()
        got = body.cross_entropy_kl_(now, far_rows(near) if far_base else near, labels, scale, 0.7, **options)
        torch.testing.assert_close(got, body.cross_entropy_kl_(expected, near, labels, scale, 0.7, **options))
        torch.testing.assert_close(now, expected)
