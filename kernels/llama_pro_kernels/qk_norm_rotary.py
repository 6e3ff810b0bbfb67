"""An RMSNorm on each head of q and k, then the rotation, over the packed output of one q/k/v projection (as in Qwen3).

Only the projection's output is kept. Attention's backward needs the normed and rotated q and k: they are recomputed
from it, so this norm keeps no byte of its own between forward and backward.
"""

from __future__ import annotations

from torch import Tensor

from .e4m3 import E4M3, empty_e4m3
from .library import implementation, register
from .reference import accumulation_dtype

__all__ = ["qk_norm_rotary_backward", "qk_norm_rotary_backward_e4m3", "qk_norm_rotary_forward"]


@register(
    "qk_norm_rotary_forward(Tensor qkv, Tensor q_weight, Tensor k_weight, float eps, Tensor cos, Tensor sin,"
    " Tensor position_ids, int num_heads, int num_kv_heads, int head_dim) -> Tensor",
    fake=lambda qkv, q_weight, k_weight, eps, cos, sin, position_ids, num_heads, num_kv_heads, head_dim: qkv.new_empty(
        qkv.shape[0], num_heads + num_kv_heads, head_dim
    ),
)
def _qk_norm_rotary_forward(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor, position_ids: Tensor,
    num_heads: int, num_kv_heads: int, head_dim: int,
) -> Tensor:  # fmt: skip
    return implementation(qkv).qk_norm_rotary_forward(
        qkv, q_weight, k_weight, eps, cos, sin, position_ids, num_heads, num_kv_heads, head_dim
    )


@register(
    "qk_norm_rotary_backward(Tensor dq, Tensor dk, Tensor dv, Tensor qkv, Tensor q_weight, Tensor k_weight, float eps,"
    " Tensor cos, Tensor sin, Tensor position_ids, bool need_dweight) -> Tensor[]",
    fake=lambda dq, dk, dv, qkv, q_weight, k_weight, eps, cos, sin, position_ids, need_dweight: [
        qkv.new_empty(qkv.shape),
        *([q_weight.new_empty(2, len(q_weight), dtype=accumulation_dtype(qkv.dtype))] if need_dweight else []),
    ],
)  # fmt: skip
def _qk_norm_rotary_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float,
    cos: Tensor, sin: Tensor, position_ids: Tensor, need_dweight: bool,
) -> list[Tensor]:  # fmt: skip
    gradients = implementation(qkv).qk_norm_rotary_backward(
        dq, dk, dv, qkv, q_weight, k_weight, eps, cos, sin, position_ids, need_dweight=need_dweight
    )
    return [gradient for gradient in gradients if gradient is not None]


@register(
    "qk_norm_rotary_backward_e4m3(Tensor dq, Tensor dk, Tensor dv, Tensor qkv, Tensor q_weight, Tensor k_weight,"
    " float eps, Tensor cos, Tensor sin, Tensor position_ids) -> (Tensor, Tensor)",
    fake=lambda dq, dk, dv, qkv, *_: empty_e4m3(qkv, *qkv.shape),
)
def _qk_norm_rotary_backward_e4m3(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float,
    cos: Tensor, sin: Tensor, position_ids: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return implementation(qkv).qk_norm_rotary_backward_e4m3(
        dq, dk, dv, qkv, q_weight, k_weight, eps, cos, sin, position_ids
    )


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Split packed ``qkv``, norm each head of q and of k, rotate both; rounded once.

    Args:
        qkv: ``[T, (N + 2K)·D]``: the query heads, the key heads, the value heads. It is not changed.
        q_weight: ``[D]``, shared by the query heads; may have higher precision than ``qkv``.
        k_weight: ``[D]``, shared by the key heads, likewise.
        eps: added to the mean square.
        cos, sin: ``[P, D/2]`` fp32: heads are turned whole.
        position_ids, num_heads, num_kv_heads, head_dim: as in ``rotary_forward``.

    Returns:
        ``(q [T, N, D], k [T, K, D], v [T, K, D])`` in ``qkv``'s dtype; q and k lie side by side in one buffer, ``v`` is
        a view of ``qkv`` and keeps it alive.

    Raises:
        ValueError: the tables turn a part of a head alone.
        IndexError: a position lies beyond the tables (CPU; in Triton its token's q and k become NaN).
    """
    if 2 * cos.shape[-1] != head_dim:
        raise ValueError(f"cos turns {2 * cos.shape[-1]} dimensions, a head has {head_dim}: it must be turned whole")
    turned = _qk_norm_rotary_forward(
        qkv, q_weight, k_weight, eps, cos, sin, position_ids, num_heads, num_kv_heads, head_dim
    )
    v = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, head_dim)[:, num_heads + num_kv_heads :]
    return turned[:, :num_heads], turned[:, num_heads:], v


def qk_norm_rotary_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
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
        qkv, q_weight, k_weight, eps, cos, sin, position_ids: as in forward.
        need_dweight: whether the weights' gradients are computed at all.

    Returns:
        ``(dqkv, dq_weight, dk_weight)``: ``[T, (N + 2K)·D]`` in ``qkv``'s dtype; ``[D]`` each in the accumulation
        dtype, or None.
    """
    dqkv, *dweights = _qk_norm_rotary_backward(
        dq, dk, dv, qkv, q_weight, k_weight, eps, cos, sin, position_ids, need_dweight
    )
    return dqkv, *(dweights[0] if dweights else (None, None))


def qk_norm_rotary_backward_e4m3(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float,
    cos: Tensor, sin: Tensor, position_ids: Tensor,
) -> E4M3:  # fmt: skip
    """:func:`qk_norm_rotary_backward` of frozen weights in eight bits: of ``dqkv`` only the codes are made."""
    return E4M3(*_qk_norm_rotary_backward_e4m3(dq, dk, dv, qkv, q_weight, k_weight, eps, cos, sin, position_ids))
