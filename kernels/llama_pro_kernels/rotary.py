"""Rotary position embedding over the packed output of one q/k/v projection.

A rotation is orthogonal, so backward needs the angles and nothing that forward computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference import rotary_backward, rotary_forward, rotary_forward_

__all__ = ["rotary", "rotary_backward", "rotary_forward", "rotary_forward_"]


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
