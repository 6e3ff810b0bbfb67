"""RMSNorm, alone or with the residual sum before it (Zhang & Sennrich 2019, eq. 4).

    y = x · rstd · weight,  rstd = 1 / sqrt(mean(x²) + eps)

Forward keeps one number a token, ``rstd``; the normed rows are cheap to recompute and are never kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .e4m3 import E4M3, empty_e4m3
from .library import implementation, register
from .reference import accumulation_dtype

__all__ = [
    "add_rms_norm",
    "add_rms_norm_forward",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_backward_e4m3",
    "rms_norm_forward",
]


def _empty_rstd(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x.dtype))


@register(
    "rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    fake=lambda x, weight, eps: (x.new_empty(x.shape), _empty_rstd(x)),
)
def _rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return implementation(x).rms_norm_forward(x, weight, eps)


@register(
    "add_rms_norm_forward(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    fake=lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape), _empty_rstd(x)),
)
def _add_rms_norm_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return implementation(x).add_rms_norm_forward(x, residual, weight, eps)


@register(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, Tensor? dresidual, bool need_dweight)"
    " -> Tensor[]",
    fake=lambda dy, x, weight, rstd, dresidual, need_dweight: [
        x.new_empty(x.shape), *([weight.new_empty(weight.shape, dtype=rstd.dtype)] if need_dweight else [])
    ],
)  # fmt: skip
def _rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dresidual: Tensor | None, need_dweight: bool
) -> list[Tensor]:
    gradients = implementation(x).rms_norm_backward(
        dy, x, weight, rstd, dresidual=dresidual, need_dweight=need_dweight
    )  # fmt: skip
    return [gradient for gradient in gradients if gradient is not None]


@register(
    "rms_norm_backward_e4m3(Tensor dy, Tensor x, Tensor weight, Tensor rstd, Tensor? dresidual)"
    " -> (Tensor, Tensor, Tensor)",
    fake=lambda dy, x, weight, rstd, dresidual: (x.new_empty(x.shape), *empty_e4m3(x, *x.shape)),
)
def _rms_norm_backward_e4m3(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dresidual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation(x).rms_norm_backward_e4m3(dy, x, weight, rstd, dresidual=dresidual)


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension.

    Args:
        x: ``[..., H]``, usually ``[T, H]``; ``[T, N, D]`` for a norm per head.
        weight: ``[H]``; may have higher precision than ``x`` (an fp32 master weight).
        eps: added to the mean square.

    Returns:
        ``(y, rstd)``: ``y`` like ``x``; ``rstd`` ``[...]`` in the accumulation dtype, 1 / root mean square.
    """
    return _rms_norm_forward(x, weight, eps)


def add_rms_norm_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``s = x + residual`` in ``x``'s dtype, and RMSNorm of that ``s``.

    The norm reads the sum as it was rounded, because that is what the next block's residual stream carries.

    Args:
        x, residual: ``[..., H]``, of one dtype.
        weight, eps: as in :func:`rms_norm_forward`.

    Returns:
        ``(y, s, rstd)``, see :func:`rms_norm_forward`.

    Raises:
        ValueError: the addends differ in dtype.
    """
    if x.dtype != residual.dtype:
        raise ValueError(f"x is {x.dtype}, residual {residual.dtype}; their sum must have one dtype")
    return _add_rms_norm_forward(x, residual, weight, eps)


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, *, dresidual: Tensor | None = None, need_dweight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of RMSNorm, with the gradient of a residual branch around it added before the one rounding.

    With x̂ = x·rstd and g = dy·weight: dx = rstd·(g − x̂·mean(g·x̂)) + dresidual, dweight = Σ_tokens dy·x̂.

    Args:
        dy: ``[..., H]``, gradient of ``y``.
        x: ``[..., H]``, what was normalised (``s`` of :func:`add_rms_norm_forward`).
        weight: ``[H]``.
        rstd: ``[...]`` from forward.
        dresidual: ``[..., H]``, gradient that reaches ``x`` by another way.
        need_dweight: whether ``dweight`` is computed at all.

    Returns:
        ``(dx, dweight)``: ``dx`` like ``x``; ``dweight`` ``[H]`` in the accumulation dtype, or None.
    """
    dx, *dweight = _rms_norm_backward(dy, x, weight, rstd, dresidual, need_dweight)
    return dx, dweight[0] if dweight else None


def rms_norm_backward_e4m3(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, *, dresidual: Tensor | None = None
) -> tuple[Tensor, E4M3]:
    """:func:`rms_norm_backward` of a frozen weight over ``x`` ``[T, H]``: ``dx``, and its rows in eight bits beside."""
    dx, codes, scales = _rms_norm_backward_e4m3(dy, x, weight, rstd, dresidual)
    return dx, E4M3(codes, scales)


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
        ctx.set_materialize_grads(False)  # zeros for an unused sum would be made, read and added
        return y, s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return ds, ds, None, None
        s, weight, rstd = ctx.saved_tensors
        dx, dweight = rms_norm_backward(dy, s, weight, rstd, dresidual=ds, need_dweight=ctx.needs_input_grad[2])
        return dx, dx, None if dweight is None else dweight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Differentiable :func:`rms_norm_forward`: ``x`` ``[..., H]``, ``weight`` ``[H]`` -> like ``x``.

    The weight may be an fp32 master weight; its gradient comes back in its dtype, unrounded on the way.
    """
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Differentiable :func:`add_rms_norm_forward`: ``(y, s)`` with ``s = x + residual`` and ``y`` its RMSNorm."""
    return _AddRMSNorm.apply(x, residual, weight, eps)
