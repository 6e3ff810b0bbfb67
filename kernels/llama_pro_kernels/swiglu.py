"""SwiGLU over the packed output of one gate-and-up projection (Shazeer 2020, eq. 6): SiLU(gate) · up.

Only ``gate_up`` is kept. Where the down projection trains, backward recomputes the product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .e4m3 import E4M3, empty_e4m3
from .library import implementation, register

__all__ = ["swiglu", "swiglu_backward", "swiglu_backward_", "swiglu_backward_e4m3", "swiglu_forward"]


def _empty_product(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@register("swiglu_forward(Tensor gate_up) -> Tensor", fake=_empty_product)
def _swiglu_forward(gate_up: Tensor) -> Tensor:
    return implementation(gate_up).swiglu_forward(gate_up)


@register(
    "swiglu_backward(Tensor dy, Tensor gate_up, bool need_product) -> Tensor[]",
    fake=lambda dy, gate_up, need_product: [
        gate_up.new_empty(gate_up.shape), *([_empty_product(gate_up)] if need_product else [])
    ],
)  # fmt: skip
def _swiglu_backward(dy: Tensor, gate_up: Tensor, need_product: bool) -> list[Tensor]:
    dgate_up, product = implementation(gate_up).swiglu_backward(dy, gate_up, need_product=need_product)
    return [dgate_up] if product is None else [dgate_up, product]


@register(
    "swiglu_backward_e4m3(Tensor dy, Tensor gate_up) -> (Tensor, Tensor)",
    fake=lambda dy, gate_up: empty_e4m3(gate_up, *gate_up.shape),
)
def _swiglu_backward_e4m3(dy: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return implementation(gate_up).swiglu_backward_e4m3(dy, gate_up)


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """``SiLU(gate) · up`` of packed ``gate_up`` ``[T, 2I]`` (gate first); returns ``[T, I]`` in its dtype."""
    return _swiglu_forward(gate_up)


def swiglu_backward(dy: Tensor, gate_up: Tensor, *, need_product: bool = False) -> tuple[Tensor, Tensor | None]:
    """Gradient of :func:`swiglu_forward`, and on request its output.

    Args:
        dy: ``[T, I]``.
        gate_up: ``[T, 2I]``, the input of forward.
        need_product: also recompute ``SiLU(gate) · up``, which the down projection's dW needs and nobody kept.

    Returns:
        ``(dgate_up, product)``: ``[T, 2I]`` and ``[T, I]`` or None, both in ``gate_up``'s dtype.
    """
    dgate_up, *product = _swiglu_backward(dy, gate_up, need_product)
    return dgate_up, product[0] if product else None


def swiglu_backward_(dy: Tensor, gate_up: Tensor, *, need_product: bool = False) -> tuple[Tensor, Tensor | None]:
    """:func:`swiglu_backward` written over ``gate_up``, which is returned as ``dgate_up``."""
    return implementation(gate_up).swiglu_backward_(dy, gate_up, need_product=need_product)


def swiglu_backward_e4m3(dy: Tensor, gate_up: Tensor) -> E4M3:
    """:func:`swiglu_backward` in eight bits: of ``dgate_up`` ``[T, 2I]`` only the codes are made."""
    return E4M3(*_swiglu_backward_e4m3(dy, gate_up))


class _SwiGLU(torch.autograd.Function):
    """Keeps gate_up."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return swiglu_forward(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return swiglu_backward(dy, gate_up)[0]


def swiglu(gate_up: Tensor) -> Tensor:
    """Differentiable :func:`swiglu_forward`: packed ``[T, 2I]``, gate first -> ``[T, I]``."""
    return _SwiGLU.apply(gate_up)
