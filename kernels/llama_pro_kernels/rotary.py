"""Rotary position embedding over the packed output of one q/k/v projection (Su et al. 2021, eq. 34).

Half-split, as in Hugging Face's Llama: dimension i turns together with i + R/2. A rotation is orthogonal, so backward
needs the angles and nothing that forward computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .e4m3 import E4M3, empty_e4m3
from .library import implementation, register

__all__ = ["rotary", "rotary_backward", "rotary_backward_e4m3", "rotary_forward", "rotary_forward_"]


@register(
    "rotary_forward(Tensor qkv, Tensor cos, Tensor sin, Tensor position_ids, int num_heads, int num_kv_heads,"
    " int head_dim) -> Tensor",
    fake=lambda qkv, cos, sin, position_ids, num_heads, num_kv_heads, head_dim: qkv.new_empty(
        qkv.shape[0], num_heads + num_kv_heads, head_dim
    ),
)
def _rotary_forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, num_heads: int, num_kv_heads: int, head_dim: int
) -> Tensor:
    return implementation(qkv).rotary_forward(qkv, cos, sin, position_ids, num_heads, num_kv_heads, head_dim)


@register(
    "rotary_backward(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin, Tensor position_ids) -> Tensor",
    fake=lambda dq, dk, dv, cos, sin, position_ids: dq.new_empty(
        dq.shape[0], (dq.shape[1] + 2 * dk.shape[1]) * dq.shape[2]
    ),
)
def _rotary_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
    return implementation(dq).rotary_backward(dq, dk, dv, cos, sin, position_ids)


@register(
    "rotary_backward_e4m3(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin, Tensor position_ids)"
    " -> (Tensor, Tensor)",
    fake=lambda dq, dk, dv, cos, sin, position_ids: empty_e4m3(
        dq, dq.shape[0], (dq.shape[1] + 2 * dk.shape[1]) * dq.shape[2]
    ),
)
def _rotary_backward_e4m3(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor
) -> tuple[Tensor, Tensor]:
    return implementation(dq).rotary_backward_e4m3(dq, dk, dv, cos, sin, position_ids)


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
        num_kv_heads: K; 0 rotates heads of one kind.
        head_dim: D.

    Returns:
        ``(q [T, N, D], k [T, K, D], v [T, K, D])`` in ``qkv``'s dtype; q and k lie side by side in one buffer, ``v`` is
        a view of ``qkv`` and keeps it alive.

    Raises:
        IndexError: a position lies beyond the tables (CPU; in Triton its token's q and k become NaN).
    """
    rotated = _rotary_forward(qkv, cos, sin, position_ids, num_heads, num_kv_heads, head_dim)
    v = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, head_dim)[:, num_heads + num_kv_heads :]
    return rotated[:, :num_heads], rotated[:, num_heads:], v


def rotary_forward_(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, num_heads: int, num_kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`rotary_forward` written over ``qkv``; all three results are views of it."""
    implementation(qkv).rotary_forward_(qkv, cos, sin, position_ids, num_heads, num_kv_heads, head_dim)
    heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, head_dim)
    return heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)


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
    return _rotary_backward(dq, dk, dv, cos, sin, position_ids)


def rotary_backward_e4m3(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> E4M3:
    """:func:`rotary_backward` in eight bits: of ``dqkv`` ``[T, (N + 2K)·D]`` only the codes are made."""
    return E4M3(*_rotary_backward_e4m3(dq, dk, dv, cos, sin, position_ids))


class _Rotary(torch.autograd.Function):
    """Keeps the tables and the positions; no activation."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin, position_ids)
        return rotary_forward(qkv, cos, sin, position_ids, num_heads, num_kv_heads, head_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        return rotary_backward(dq, dk, dv, *ctx.saved_tensors), None, None, None, None, None, None


def rotary(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, num_heads: int, num_kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiable :func:`rotary_forward`: packed ``[T, (N + 2K)·D]`` -> ``(q, k, v)``; the tables are constants."""
    return _Rotary.apply(qkv, cos, sin, position_ids, num_heads, num_kv_heads, head_dim)
