"""How far a model's predictions have moved: the KL divergence between two hidden states under one output head."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import implementation, register
from .linear import linear
from .linear_cross_entropy import check_chunk_size, rows_per_chunk
from .reference import accumulation_dtype

__all__ = ["linear_kl"]


@register(
    "linear_kl(Tensor x_base, Tensor x_now, Tensor weight, int? chunk_size) -> Tensor",
    fake=lambda x_base, x_now, weight, chunk_size: x_base.new_empty(
        x_base.shape[0], dtype=accumulation_dtype(x_base.dtype)
    ),
    flops=lambda x_base, x_now, weight, chunk_size: 2 * 2 * x_base.numel() * weight.shape[0],
)  # fmt: skip
def _linear_kl(x_base: Tensor, x_now: Tensor, weight: Tensor, chunk_size: int | None) -> Tensor:
    if x_base.shape != x_now.shape:
        raise ValueError(f"x_base has shape {list(x_base.shape)}, x_now {list(x_now.shape)}")
    check_chunk_size(chunk_size)
    kl_divergence = implementation(x_base).kl_divergence
    chunk_size = chunk_size or rows_per_chunk(len(weight), x_base.dtype)
    divergence = torch.empty(len(x_base), dtype=accumulation_dtype(x_base.dtype), device=x_base.device)
    for out, base, now in zip(*(t.split(chunk_size) for t in (divergence, x_base, x_now)), strict=True):
        out.copy_(kl_divergence(linear(base, weight), linear(now, weight)))
    return divergence


@torch.no_grad()
def linear_kl(x_base: Tensor, x_now: Tensor, weight: Tensor, *, chunk_size: int | None = None) -> Tensor:
    """KL(softmax(x_base Wᵀ) ‖ softmax(x_now Wᵀ)) of each token.

    A meter and not a loss: forward only, no gradient flows through it.

    Args:
        x_base: ``[T, H]``, normed final hidden states of the base model.
        x_now: ``[T, H]``, those of the model in training.
        weight: ``[V, H]``, the shared head, in the states' dtype.
        chunk_size: tokens whose logits exist at one time; by default :func:`rows_per_chunk`.

    Returns:
        ``[T]`` in the accumulation dtype, nats: exactly 0 where the two states are bit-equal, otherwise at least 0 up
        to rounding, and NaN where a state is.

    Raises:
        ValueError: states of different shapes, a ``chunk_size`` below 1.
    """
    return _linear_kl(x_base, x_now, weight, chunk_size)
