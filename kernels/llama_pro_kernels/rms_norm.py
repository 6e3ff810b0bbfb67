"""RMSNorm, alone or with the residual sum before it.

Forward keeps one number a token, ``rstd``; the normed rows are cheap to make again and are never kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference import add_rms_norm_forward, rms_norm_backward, rms_norm_forward

__all__ = ["add_rms_norm", "add_rms_norm_forward", "rms_norm", "rms_norm_backward", "rms_norm_forward"]


class _RMSNorm(torch.autograd.Function):
    """Keeps x, rstd and the weight; a frozen weight gets no gradient computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = rms_norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = rms_norm_backward(dy, x, weight, rstd, need_dweight=ctx.needs_input_grad[1])
        return dx, None if dweight is None else dweight.to(weight.dtype), None


class _AddRMSNorm(torch.autograd.Function):
    """Keeps the sum, rstd and the weight, neither of the two addends."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, s, rstd = add_rms_norm_forward(x, residual, weight, eps)
        ctx.save_for_backward(s, weight, rstd)
        return y, s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, ds: Tensor) -> tuple[Tensor | None, ...]:
        s, weight, rstd = ctx.saved_tensors
        dx, dweight = rms_norm_backward(dy, s, weight, rstd, dresidual=ds, need_dweight=ctx.needs_input_grad[2])
        return dx, dx, None if dweight is None else dweight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Differentiable :func:`rms_norm_forward`: ``x`` ``[..., H]``, ``weight`` ``[H]`` (may be wider) -> like ``x``.

    The weight's gradient comes back in the weight's dtype, unrounded on the way.
    """
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Differentiable :func:`add_rms_norm_forward`: ``(y, s)`` with ``s = x + residual`` and ``y`` its RMSNorm."""
    return _AddRMSNorm.apply(x, residual, weight, eps)
