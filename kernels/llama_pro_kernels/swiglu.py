"""SwiGLU over the packed output of one gate-and-up projection.

Only ``gate_up`` is kept. Where the down projection trains, backward makes the product again instead of keeping it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference import swiglu_backward, swiglu_backward_, swiglu_forward

__all__ = ["swiglu", "swiglu_backward", "swiglu_backward_", "swiglu_forward"]


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
