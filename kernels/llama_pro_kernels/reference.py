"""Every op in plain PyTorch: the definition, the path for the CPU, and the oracle the tests hold the kernels to.

Precision: arithmetic happens in ``compute_dtype`` of the activations (fp32 for bf16 and fp16, fp64 for fp64) and is
narrowed once, at the end. Nothing here is chosen for speed on a GPU; temporaries are reused where that costs no
clarity.

Shapes: T tokens, H hidden, I intermediate, N heads, K key/value heads, D head dim, R rotary dim, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype an op computes in for activations of ``dtype``: at least fp32, and fp64 stays fp64."""
    return torch.promote_types(dtype, torch.float32)


# RMSNorm (Zhang & Sennrich 2019, eq. 4): y = x / sqrt(mean(x²) + eps) · weight


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension.

    Args:
        x: ``[..., H]``, usually ``[T, H]``; ``[T, N, D]`` for a norm per head.
        weight: ``[H]``; may be wider than ``x`` (an fp32 master).
        eps: added to the mean square.

    Returns:
        ``(y, rstd)``: ``y`` like ``x``; ``rstd`` ``[...]`` in the compute dtype, 1 / root mean square.
    """
    wide = x.to(compute_dtype(x.dtype))
    rstd = wide.square().mean(-1).add_(eps).rsqrt_()
    return (wide * rstd[..., None]).mul_(weight).to(x.dtype), rstd


def add_rms_norm_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``s = x + residual`` in ``x``'s dtype, and RMSNorm of that ``s``.

    The norm reads the narrowed sum, because that is what the next block's residual stream carries.

    Returns:
        ``(y, s, rstd)``, see :func:`rms_norm_forward`.
    """
    s = x + residual
    y, rstd = rms_norm_forward(s, weight, eps)
    return y, s, rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, *, dresidual: Tensor | None = None, need_dweight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of RMSNorm, with the gradient of a residual branch around it added before the one narrowing.

    With x̂ = x·rstd and g = dy·weight: dx = rstd·(g − x̂·mean(g·x̂)) + dresidual, dweight = Σ_tokens dy·x̂.

    Args:
        dy: ``[..., H]``, gradient of ``y``.
        x: ``[..., H]``, what was normalised (``s`` of :func:`add_rms_norm_forward`).
        weight: ``[H]``.
        rstd: ``[...]`` from forward.
        dresidual: ``[..., H]``, gradient that reaches ``x`` by another way.
        need_dweight: whether ``dweight`` is computed at all.

    Returns:
        ``(dx, dweight)``: ``dx`` like ``x``; ``dweight`` ``[H]`` in the compute dtype, or None.
    """
    dtype = compute_dtype(x.dtype)
    normed = x.to(dtype) * rstd[..., None]
    dy = dy.to(dtype)
    dweight = (dy * normed).flatten(0, -2).sum(0) if need_dweight else None
    g = dy * weight
    projection = (g * normed).mean(-1, keepdim=True)
    dx = g.sub_(normed.mul_(projection)).mul_(rstd[..., None])
    if dresidual is not None:
        dx.add_(dresidual)
    return dx.to(x.dtype), dweight


# SwiGLU (Shazeer 2020, eq. 6): SiLU(gate) · up


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """``SiLU(gate) · up`` of packed ``gate_up`` ``[T, 2I]`` (gate first); returns ``[T, I]`` in its dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate.to(compute_dtype(gate.dtype))).mul_(up).to(gate_up.dtype)


def swiglu_backward(dy: Tensor, gate_up: Tensor, *, need_product: bool = False) -> tuple[Tensor, Tensor | None]:
    """Gradient of :func:`swiglu_forward`, and on request its output again.

    Args:
        dy: ``[T, I]``.
        gate_up: ``[T, 2I]``, the input of forward.
        need_product: also recompute ``SiLU(gate) · up``, which the down projection's dW needs and nobody kept.

    Returns:
        ``(dgate_up, product)``: ``[T, 2I]`` and ``[T, I]`` or None, both in ``gate_up``'s dtype.
    """
    dgate_up = torch.empty_like(gate_up)
    return dgate_up, _swiglu_backward_into(dgate_up, dy, gate_up, need_product)


def swiglu_backward_(dy: Tensor, gate_up: Tensor, *, need_product: bool = False) -> tuple[Tensor, Tensor | None]:
    """:func:`swiglu_backward` written over ``gate_up``, which is returned as ``dgate_up``."""
    return gate_up, _swiglu_backward_into(gate_up, dy, gate_up, need_product)


def _swiglu_backward_into(out: Tensor, dy: Tensor, gate_up: Tensor, need_product: bool) -> Tensor | None:
    dtype = compute_dtype(gate_up.dtype)
    gate, up = gate_up.to(dtype).chunk(2, dim=-1)
    dy = dy.to(dtype)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    product = (silu * up).to(gate_up.dtype) if need_product else None
    # SiLU'(g) = σ + SiLU·(1 − σ). Both gradients are complete before the first store: `out` may be `gate_up`.
    dgate = (1 - sigmoid).mul_(silu).add_(sigmoid).mul_(up).mul_(dy)
    dup = silu.mul_(dy)
    out_gate, out_up = out.chunk(2, dim=-1)
    out_gate.copy_(dgate)
    out_up.copy_(dup)
    return product


# Rotary position embedding (Su et al. 2021, eq. 34), half-split: dimension i turns together with i + R/2.


def rotary_forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, num_heads: int, num_kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split packed ``qkv`` and rotate q and k.

    Args:
        qkv: ``[T, (N + 2K)·D]``: the query heads, the key heads, the value heads.
        cos: ``[P, R/2]`` fp32, R ≤ D even; dimensions from R on pass through.
        sin: like ``cos``.
        position_ids: ``[T]`` int64, rows of the tables.
        num_heads: N.
        num_kv_heads: K.
        head_dim: D.

    Returns:
        ``(q [T, N, D], k [T, K, D], v [T, K, D])`` in ``qkv``'s dtype; ``v`` is a view of ``qkv`` and keeps it alive.

    Raises:
        IndexError: a position lies beyond the tables (CPU; on CUDA PyTorch's device-side assertion).
    """
    qk, v = _split_packed(qkv, num_heads, num_kv_heads, head_dim)
    rotated = torch.empty(qk.shape, dtype=qk.dtype, device=qk.device)
    _rotate_into(rotated, qk, cos[position_ids], sin[position_ids])
    return rotated[:, :num_heads], rotated[:, num_heads:], v


def rotary_forward_(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, num_heads: int, num_kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`rotary_forward` written over ``qkv``; all three results are views of it."""
    qk, v = _split_packed(qkv, num_heads, num_kv_heads, head_dim)
    _rotate_into(qk, qk, cos[position_ids], sin[position_ids])
    return qk[:, :num_heads], qk[:, num_heads:], v


def rotary_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
    """Gradient of :func:`rotary_forward`: the conjugate rotation, packed.

    Args:
        dq: ``[T, N, D]``.
        dk: ``[T, K, D]``.
        dv: ``[T, K, D]``.
        cos, sin, position_ids: as in forward.

    Returns:
        ``dqkv`` ``[T, (N + 2K)·D]`` in ``dq``'s dtype.
    """
    num_tokens, num_heads, head_dim = dq.shape
    num_kv_heads = dk.shape[1]
    dqkv = dq.new_empty(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    dqk, dv_packed = _split_packed(dqkv, num_heads, num_kv_heads, head_dim)
    cos, minus_sin = cos[position_ids], -sin[position_ids]
    _rotate_into(dqk[:, :num_heads], dq, cos, minus_sin)
    _rotate_into(dqk[:, num_heads:], dk, cos, minus_sin)
    dv_packed.copy_(dv)
    return dqkv


def _split_packed(qkv: Tensor, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Views ``[T, N + K, D]`` of q and k together, and ``[T, K, D]`` of v."""
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, head_dim))
    return heads.split([num_heads + num_kv_heads, num_kv_heads], dim=1)


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate ``x`` ``[T, heads, D]`` by its tokens' angles, ``cos`` and ``sin`` ``[T, R/2]``; ``out`` may be ``x``."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    # The tables are at least fp32, so type promotion makes these products the compute dtype.
    x1, x2 = x[..., :half], x[..., half : 2 * half]
    y1 = (x1 * cos).sub_(x2 * sin)
    y2 = (x2 * cos).add_(x1 * sin)
    out[..., :half] = y1
    out[..., half : 2 * half] = y2
    if out is not x:
        out[..., 2 * half :] = x[..., 2 * half :]


# The row-wise halves of the losses: what happens between a chunk's products


def cross_entropy_(logits: Tensor, labels: Tensor, scale: Tensor, *, ignore_index: int, need_dlogits: bool) -> Tensor:
    """Cross entropy of each row; ``logits`` is consumed, and on request becomes its own gradient.

    Args:
        logits: ``[T, V]`` in a compute dtype, overwritten; afterwards ``scale · (softmax − onehot)`` with rows of
            zeros where the label is ignored (NaN where a logit of the row was not finite: a zero would hide it), or
            scratch without ``need_dlogits``.
        labels: ``[T]`` int64.
        scale: scalar on the same device.
        ignore_index: label that counts for nothing.
        need_dlogits: whether the gradient is wanted.

    Returns:
        ``[T]`` unscaled loss in nats, 0 at ignored labels.
    """
    valid = labels != ignore_index
    index = labels.masked_fill(~valid, 0)[:, None]
    largest = logits.amax(-1, keepdim=True)
    label_logits = logits.gather(1, index)
    total = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    losses = total.log().add_(largest).sub_(label_logits).squeeze(1)
    if need_dlogits:
        row_scale = torch.where(valid, scale, 0)[:, None]
        logits.mul_(row_scale / total)
        logits.scatter_add_(1, index, -row_scale)
    return torch.where(valid, losses, 0)


def kl_divergence(base_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(base_logits) ‖ softmax(logits)) of each row, ``[T, V]`` twice -> ``[T]``, nats."""
    base_logp = base_logits.log_softmax(-1)
    difference = base_logp - logits.log_softmax(-1)
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
        ``(o, lse)``: ``[L, N, D]`` like ``q``; ``[N, L]`` log-sum-exp of the scaled scores in the compute dtype.
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
    """q ``[K, N/K, L, D]``, k and v ``[K, 1, L, D]``, masked scores ``[K, N/K, L, L]``, in the compute dtype."""
    length, num_kv_heads, _ = k.shape
    q, k, v = (_group_heads(tensor, num_kv_heads) for tensor in (q, k, v))
    position = torch.arange(length, device=q.device)
    distance = position[:, None] - position
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return q, k, v, (q @ k.mT).mul_(scale).masked_fill_(hidden, float("-inf"))


def _group_heads(x: Tensor, num_groups: int) -> Tensor:
    """``[L, heads, D]`` -> ``[groups, heads/groups, L, D]`` in the compute dtype."""
    return x.to(compute_dtype(x.dtype)).unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3)


def _merge_heads(x: Tensor) -> Tensor:
    """The inverse of :func:`_group_heads`, in ``x``'s dtype."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)
