"""Every op in plain PyTorch: the definition, the path for the CPU, and the oracle the tests hold the kernels to.

Precision: arithmetic happens in ``accumulation_dtype`` of the activations (fp32 for bf16 and fp16, fp64 for fp64); a
result is rounded once, at the end. Nothing here is chosen for speed on a GPU; temporaries are reused where that costs
no clarity. Results are contiguous whatever the strides of the inputs. What an op takes and returns is said where it is
public: rms_norm.py, swiglu.py, rotary.py, linear_cross_entropy*.py, attention.py.

Shapes: T tokens, H hidden, I intermediate, N heads, K key/value heads, D head dim, R rotary dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.adamw import adamw


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and statistics over activations of ``dtype`` are held in: at least fp32, and fp64 stays fp64."""
    return torch.promote_types(dtype, torch.float32)


# RMSNorm


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    upcast = x.to(accumulation_dtype(x.dtype))
    rstd = upcast.square().mean(-1).add_(eps).rsqrt_()
    y = (upcast * rstd[..., None]).mul_(weight).to(x.dtype)
    return y.contiguous(), rstd.contiguous()


def add_rms_norm_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    s = (x + residual).contiguous()
    y, rstd = rms_norm_forward(s, weight, eps)
    return y, s, rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, *, dresidual: Tensor | None = None, need_dweight: bool
) -> tuple[Tensor, Tensor | None]:
    dtype = accumulation_dtype(x.dtype)
    normed = x.to(dtype) * rstd[..., None]
    dy = dy.to(dtype)
    dweight = (dy * normed).flatten(0, -2).sum(0) if need_dweight else None
    g = dy * weight
    projection = (g * normed).mean(-1, keepdim=True)
    dx = g.sub_(normed.mul_(projection)).mul_(rstd[..., None])
    if dresidual is not None:
        dx.add_(dresidual)
    return dx.to(x.dtype).contiguous(), dweight


def rms_norm_backward_e4m3(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, *, dresidual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    upcast = x.to(accumulation_dtype(x.dtype))
    dx, _ = rms_norm_backward(dy, upcast, weight, rstd, dresidual=dresidual, need_dweight=False)
    return dx.to(x.dtype), *quantize_e4m3(dx)


# Rows in eight bits


def quantize_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    # The sign of a NaN may be set, whatever abs says (a maximum over columns that lie apart).
    bits = x.abs().amax(-1).float().view(torch.int32) & 0x7FFFFFFF
    exponent = ((bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000)).clamp(min=27)
    scales = torch.where(bits < 0x7F800000, exponent << 23, 0x7FC00000).view(torch.float32)
    inverse = ((254 - exponent) << 23).view(torch.float32)
    return (x * inverse[:, None]).to(torch.float8_e4m3fn).contiguous(), scales


# Linear

DSCALE_ROWS = 512
"""Rows of a weight that `linear_dscale` takes at a time: 8 MiB of scratch at H = 4,096, which a cache holds."""


def linear_dscale(weight: Tensor, dweight: Tensor, scale: Tensor) -> Tensor:
    total = torch.zeros(min(DSCALE_ROWS, len(weight)), weight.shape[1], dtype=dweight.dtype, device=dweight.device)
    for rows, drows in zip(weight.split(DSCALE_ROWS), dweight.split(DSCALE_ROWS), strict=True):
        total[: len(rows)].addcmul_(rows, drows)
    return total.sum(0).div_(scale)


# SwiGLU


def swiglu_forward(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate.to(accumulation_dtype(gate.dtype))).mul_(up).to(gate_up.dtype).contiguous()


def swiglu_backward(dy: Tensor, gate_up: Tensor, *, need_product: bool = False) -> tuple[Tensor, Tensor | None]:
    dgate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    return dgate_up, _swiglu_backward_into(dgate_up, dy, gate_up, need_product)


def swiglu_backward_e4m3(dy: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_e4m3(swiglu_backward(dy, gate_up.to(accumulation_dtype(gate_up.dtype)))[0])


def swiglu_backward_(dy: Tensor, gate_up: Tensor, *, need_product: bool = False) -> tuple[Tensor, Tensor | None]:
    return gate_up, _swiglu_backward_into(gate_up, dy, gate_up, need_product)


def _swiglu_backward_into(out: Tensor, dy: Tensor, gate_up: Tensor, need_product: bool) -> Tensor | None:
    dtype = accumulation_dtype(gate_up.dtype)
    gate, up = gate_up.to(dtype).chunk(2, dim=-1)
    dy = dy.to(dtype)
    sigmoid, silu = gate.sigmoid(), F.silu(gate)
    product = (silu * up).to(gate_up.dtype).contiguous() if need_product else None
    # SiLU'(g) = σ + SiLU·(1 − σ). Both gradients are complete before the first store: `out` may be `gate_up`.
    dgate = (1 - sigmoid).mul_(silu).add_(sigmoid).mul_(up).mul_(dy)
    dup = silu.mul_(dy)
    out_gate, out_up = out.chunk(2, dim=-1)
    out_gate.copy_(dgate)
    out_up.copy_(dup)
    return product


# Rotary position embedding


def rotary_forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, num_heads: int, num_kv_heads: int, head_dim: int
) -> Tensor:
    qk, _ = _split_packed(qkv, num_heads, num_kv_heads, head_dim)
    rotated = torch.empty(qk.shape, dtype=qk.dtype, device=qk.device)
    _rotate_into(rotated, qk, cos[position_ids], sin[position_ids])
    return rotated


def rotary_forward_(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    qk, _ = _split_packed(qkv, num_heads, num_kv_heads, head_dim)
    _rotate_into(qk, qk, cos[position_ids], sin[position_ids])


def rotary_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
    num_tokens, num_heads, head_dim = dq.shape
    num_kv_heads = dk.shape[1]
    dqkv = dq.new_empty(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    dqk, dv_packed = _split_packed(dqkv, num_heads, num_kv_heads, head_dim)
    cos, minus_sin = cos[position_ids], -sin[position_ids]
    _rotate_into(dqk[:, :num_heads], dq, cos, minus_sin)
    _rotate_into(dqk[:, num_heads:], dk, cos, minus_sin)
    dv_packed.copy_(dv)
    return dqkv


def rotary_backward_e4m3(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor
) -> tuple[Tensor, Tensor]:
    dq, dk, dv = (gradient.to(accumulation_dtype(gradient.dtype)) for gradient in (dq, dk, dv))
    return quantize_e4m3(rotary_backward(dq, dk, dv, cos, sin, position_ids))


# The same with an RMSNorm on each head of q and k before it


def qk_norm_rotary_forward(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor, position_ids: Tensor,
    num_heads: int, num_kv_heads: int, head_dim: int,
) -> Tensor:  # fmt: skip
    qk, _ = _split_packed(qkv, num_heads, num_kv_heads, head_dim)
    out = torch.empty(qk.shape, dtype=qk.dtype, device=qk.device)
    angles = cos[position_ids], sin[position_ids]
    for heads, weight in ((slice(num_heads), q_weight), (slice(num_heads, None), k_weight)):
        normed, _ = rms_norm_forward(qk[:, heads].to(accumulation_dtype(qk.dtype)), weight, eps)
        _rotate_into(out[:, heads], normed, *angles)
    return out


def qk_norm_rotary_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float,
    cos: Tensor, sin: Tensor, position_ids: Tensor, *, need_dweight: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    _, num_heads, head_dim = dq.shape
    qk, _ = _split_packed(qkv, num_heads, dk.shape[1], head_dim)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dqk, dv_packed = _split_packed(dqkv, num_heads, dk.shape[1], head_dim)
    dv_packed.copy_(dv)
    cos, minus_sin = cos[position_ids], -sin[position_ids]
    dtype, dweights = accumulation_dtype(qkv.dtype), []
    for d, heads, weight in ((dq, slice(num_heads), q_weight), (dk, slice(num_heads, None), k_weight)):
        turned = torch.empty(d.shape, dtype=dtype, device=d.device)
        _rotate_into(turned, d, cos, minus_sin)
        raw = qk[:, heads]
        rstd = rms_norm_forward(raw, weight, eps)[1]
        dqk[:, heads], dweight = rms_norm_backward(turned, raw, weight, rstd, need_dweight=need_dweight)
        dweights.append(dweight)
    return dqkv, torch.stack(dweights) if need_dweight else None


def qk_norm_rotary_backward_e4m3(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float,
    cos: Tensor, sin: Tensor, position_ids: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    qkv = qkv.to(accumulation_dtype(qkv.dtype))
    return quantize_e4m3(
        qk_norm_rotary_backward(
            dq, dk, dv, qkv, q_weight, k_weight, eps, cos, sin, position_ids, need_dweight=False
        )[0]
    )  # fmt: skip


def _split_packed(qkv: Tensor, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Views ``[T, N + K, D]`` of q and k together, and ``[T, K, D]`` of v."""
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, head_dim))
    return heads.split([num_heads + num_kv_heads, num_kv_heads], dim=1)


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate ``x`` ``[T, heads, D]`` by its tokens' angles, ``cos`` and ``sin`` ``[T, R/2]``; ``out`` may be ``x``."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    # The tables are at least fp32, so type promotion makes these products the accumulation dtype.
    x1, x2 = x[..., :half], x[..., half : 2 * half]
    y1 = (x1 * cos).sub_(x2 * sin)
    y2 = (x2 * cos).add_(x1 * sin)
    out[..., :half] = y1
    out[..., half : 2 * half] = y2
    if out is not x:
        out[..., 2 * half :] = x[..., 2 * half :]


# AdamW


def adamw_(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor], steps: Sequence[Tensor], copies: Sequence[Tensor | None],
    *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, divisor: Tensor, left_out: Tensor,
) -> None:  # fmt: skip
    """PyTorch's own, which is fast on a CPU too; it writes the divided gradients back.

    On a CPU it reads gradients as they lie in memory, whatever their strides (2.13)."""
    gradients = [gradient.contiguous() for gradient in gradients]
    adamw(
        list(parameters), gradients, list(exp_avgs), list(exp_avg_sqs), [], list(steps),
        fused=True, amsgrad=False, maximize=False, grad_scale=divisor, found_inf=left_out,
        lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
    )  # fmt: skip
    pairs = [(copy, parameter) for copy, parameter in zip(copies, parameters, strict=True) if copy is not None]
    if pairs:
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))


# The row-wise halves of the losses: what happens between a chunk's products


def cross_entropy_(
    logits: Tensor, labels: Tensor, scale: Tensor, *, ignore_index: int, need_dlogits: bool, need_correct: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Cross entropy of each row; ``logits`` is consumed, and on request becomes its own gradient.

    Args:
        logits: ``[T, V]``, overwritten; afterwards ``scale · (softmax − onehot)`` with rows of zeros where the label is
            ignored (NaN where a logit of the row was NaN or the largest infinite: a zero would hide it), or scratch
            without ``need_dlogits``.
        labels: ``[T]`` int64.
        scale: scalar on the same device, in the accumulation dtype.
        ignore_index: label that counts for nothing.
        need_dlogits: whether the gradient is wanted.
        need_correct: whether to tell which labels were the prediction.

    Returns:
        ``(losses, correct)``: ``[T]`` unscaled loss in nats in the accumulation dtype, 0 at ignored labels; ``[T]``
        bool, whether the label has the first of the largest logits (never at ignored labels nor where a logit is NaN or
        the largest infinite), or None.
    """
    valid = labels != ignore_index
    index = labels.masked_fill(~valid, 0)[:, None]
    upcast = logits.to(accumulation_dtype(logits.dtype))
    predicted = (upcast == upcast.amax(-1, keepdim=True)).int().argmax(-1) if need_correct else None
    largest = upcast.amax(-1, keepdim=True)
    label_logits = upcast.gather(1, index)
    total = upcast.sub_(largest).exp_().sum(-1, keepdim=True)
    losses = total.log().add_(largest).sub_(label_logits).squeeze(1)
    correct = (predicted == labels) & valid & losses.isfinite() if need_correct else None
    if need_dlogits:
        row_scale = torch.where(valid, scale, 0)[:, None]
        upcast.mul_(row_scale / total)
        upcast.scatter_add_(1, index, -row_scale)
        if upcast is not logits:
            logits.copy_(upcast)
    return torch.where(valid, losses, 0), correct


def cross_entropy_kl_(
    logits: Tensor, base_logits: Tensor, labels: Tensor, scale: Tensor, kl_weight: float, *, ignore_index: int,
    need_dlogits: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`cross_entropy_` of each row, with ``kl_weight`` times its divergence from the base added.

    Args:
        logits: ``[T, V]``, overwritten; afterwards ``scale · (p − onehot + kl_weight · (p − p_base))``, p the softmax,
            or scratch without ``need_dlogits``. Rows whose two logits are bit-equal get :func:`cross_entropy_`'s
            gradient bit for bit.
        base_logits: ``[T, V]``.

    Returns:
        ``(losses, divergence)``: ``[T]`` unscaled and unweighted, nats, in the accumulation dtype, 0 at ignored labels;
        the divergence is KL(base ‖ now), exactly 0 where the logits are bit-equal.
    """
    dtype, valid = accumulation_dtype(logits.dtype), labels != ignore_index
    logp, base_p = (x.log_softmax(-1, dtype=dtype) for x in (logits, base_logits))
    difference = base_p - logp
    base_p.exp_()
    # What the base holds impossible adds nothing, however impossible it is now.
    divergence = difference.masked_fill_(base_logits == float("-inf"), 0).mul_(base_p).sum(-1)
    upcast = logits.to(dtype)
    losses, _ = cross_entropy_(upcast, labels, scale, ignore_index=ignore_index, need_dlogits=need_dlogits)
    if need_dlogits:
        row_scale = torch.where(valid, scale, 0)[:, None]
        upcast.add_(logp.exp_().sub_(base_p).mul_(kl_weight * row_scale))
        if upcast is not logits:
            logits.copy_(upcast)
    return losses, torch.where(valid, divergence, 0)


def kl_divergence(base_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(base_logits) ‖ softmax(logits)) of each row, ``[T, V]`` -> ``[T]`` in the accumulation dtype, nats."""
    dtype = accumulation_dtype(base_logits.dtype)
    base_logp = base_logits.log_softmax(-1, dtype=dtype)
    difference = base_logp - logits.log_softmax(-1, dtype=dtype)
    return base_logp.exp_().mul_(difference).sum(-1)


# Attention of one document: softmax(scale · q kᵀ + causal mask) v


def attention_document_forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Causal attention with the scores written out.

    Args:
        q: ``[L, N, D]``.
        k: ``[L, K, D]``, K divides N; query head n reads key head n // (N/K).
        v: ``[L, K, D]``.
        scale: factor on the scores.
        window: how many keys a query sees, itself included; None for all before it.

    Returns:
        ``(o, lse)``: ``[L, N, D]`` like ``q``; ``[N, L]`` log-sum-exp of the scaled scores in the accumulation dtype.
    """
    _, _, v_heads, scores = _attention_scores(q, k, v, scale, window)
    lse = scores.logsumexp(-1)
    o = scores.sub_(lse[..., None]).exp_() @ v_heads
    return _merge_heads(o).to(q.dtype), lse.flatten(0, 1)


def attention_document_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients ``(dq, dk, dv)`` of :func:`attention_document_forward` (Dao et al. 2022, appendix B.2)."""
    q_heads, k_heads, v_heads, scores = _attention_scores(q, k, v, scale, window)
    do_heads, o_heads = (_group_heads(tensor, k.shape[1]) for tensor in (do, o))
    p = scores.sub_(lse.view(*scores.shape[:2], -1, 1)).exp_()
    dv = (p.mT @ do_heads).sum(1, keepdim=True)
    dp = do_heads @ v_heads.mT
    ds = dp.sub_((do_heads * o_heads).sum(-1, keepdim=True)).mul_(p).mul_(scale)
    dq = ds @ k_heads
    dk = (ds.mT @ q_heads).sum(1, keepdim=True)
    return tuple(_merge_heads(gradient).to(q.dtype) for gradient in (dq, dk, dv))


def _attention_scores(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q ``[K, N/K, L, D]``, k and v ``[K, 1, L, D]``, masked scores ``[K, N/K, L, L]``, in the accumulation dtype."""
    length, num_kv_heads, _ = k.shape
    q, k, v = (_group_heads(tensor, num_kv_heads) for tensor in (q, k, v))
    position = torch.arange(length, device=q.device)
    distance = position[:, None] - position
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return q, k, v, (q @ k.mT).mul_(scale).masked_fill_(hidden, float("-inf"))


def _group_heads(x: Tensor, num_groups: int) -> Tensor:
    """``[L, heads, D]`` -> ``[groups, heads/groups, L, D]`` in the accumulation dtype."""
    return x.to(accumulation_dtype(x.dtype)).unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3)


def _merge_heads(x: Tensor) -> Tensor:
    """The inverse of :func:`_group_heads`, in ``x``'s dtype."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)
