"""An RMSNorm on each head of q and k, then the rotation, over the packed output of one q/k/v projection (as in Qwen3).

Only the projection's output is kept. Attention's backward needs the normed and rotated q and k: they are recomputed
from it, and each head's rstd with them, so this norm keeps no byte of its own between forward and backward.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .rms_norm import rms_norm_backward, rms_norm_forward
from .rotary import rotary_backward, rotary_forward_

__all__ = ["QKNormRotaryOutput", "qk_norm_rotary_backward", "qk_norm_rotary_forward"]


class QKNormRotaryOutput(NamedTuple):
    """What attention takes, and what backward needs beside the input.

    Attributes:
        q: ``[T, N, D]``, normed and rotated.
        k: ``[T, K, D]``, likewise.
        v: ``[T, K, D]``, a view of the input, which it keeps alive.
        q_rstd: ``[T, N]`` in the accumulation dtype, 1 / root mean square of each head.
        k_rstd: ``[T, K]``, likewise.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_rstd: Tensor
    k_rstd: Tensor


def qk_norm_rotary_forward(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> QKNormRotaryOutput:
    """Split packed ``qkv``, norm each head of q and of k, rotate both.

    Args:
        qkv: ``[T, (N + 2K)·D]``: the query heads, the key heads, the value heads. It is not changed.
        q_weight: ``[D]``, shared by the query heads; may have higher precision than ``qkv``.
        k_weight: ``[D]``, shared by the key heads, likewise.
        eps: added to the mean square.
        cos, sin, position_ids, num_heads, num_kv_heads, head_dim: as in ``rotary_forward``.
    """
    q, k, v = _split(qkv, num_heads, num_kv_heads, head_dim)
    q, q_rstd = rms_norm_forward(q, q_weight, eps)
    k, k_rstd = rms_norm_forward(k, k_weight, eps)
    for heads in (q, k):
        rotary_forward_(heads.flatten(1), cos, sin, position_ids, heads.shape[1], 0, head_dim)
    return QKNormRotaryOutput(q, k, v, q_rstd, k_rstd)


def qk_norm_rotary_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_rstd: Tensor,
    k_rstd: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    *,
    need_dweight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of :func:`qk_norm_rotary_forward`.

    Args:
        dq: ``[T, N, D]``.
        dk: ``[T, K, D]``.
        dv: ``[T, K, D]``.
        qkv, q_weight, k_weight, cos, sin, position_ids: as in forward.
        q_rstd, k_rstd: from forward.
        need_dweight: whether the weights' gradients are computed at all.

    Returns:
        ``(dqkv, dq_weight, dk_weight)``: ``[T, (N + 2K)·D]`` in ``dq``'s dtype; ``[D]`` each in the accumulation
        dtype, or None.
    """
    sizes = (dq.shape[1], dk.shape[1], dq.shape[2])
    q, k, _ = _split(qkv, *sizes)
    dqkv = rotary_backward(dq, dk, dv, cos, sin, position_ids)
    dq, dk, _ = _split(dqkv, *sizes)
    dq_raw, dq_weight = rms_norm_backward(dq, q, q_weight, q_rstd, need_dweight=need_dweight)
    dk_raw, dk_weight = rms_norm_backward(dk, k, k_weight, k_rstd, need_dweight=need_dweight)
    dq.copy_(dq_raw)
    dk.copy_(dk_raw)
    return dqkv, dq_weight, dk_weight


def _split(qkv: Tensor, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """Views ``[T, N, D]``, ``[T, K, D]``, ``[T, K, D]``."""
    heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, head_dim)
    return heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
