"""How far a model's predictions have moved: the KL divergence between two hidden states under one output head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .library import implementation, register
from .linear import linear
from .linear_cross_entropy import check_chunk_size, rows_per_chunk
from .reference import accumulation_dtype

__all__ = ["LinearKLOutput", "linear_kl", "linear_kl_with_losses"]


class LinearKLOutput(NamedTuple):
    """Of each token, ``[T]`` in the accumulation dtype, nats.

    Attributes:
        divergence: KL(base ‖ now).
        base_losses, losses: cross entropy of the base and of the model now, 0 at ignored labels.
    """

    divergence: Tensor
    base_losses: Tensor
    losses: Tensor


def _empty_outputs(
    x_base: Tensor, x_now: Tensor, weight: Tensor, weight_base: Tensor | None, labels: Tensor | None,
    ignore_index: int, chunk_size: int | None,
) -> list[Tensor]:  # fmt: skip
    dtype = accumulation_dtype(x_base.dtype)
    return [x_base.new_empty(x_base.shape[0], dtype=dtype) for _ in range(1 if labels is None else 3)]


@register(
    "linear_kl(Tensor x_base, Tensor x_now, Tensor weight, Tensor? weight_base, Tensor? labels, int ignore_index, "
    "int? chunk_size) -> Tensor[]",
    fake=_empty_outputs,
    flops=lambda x_base, x_now, weight, *_: 2 * (x_base.numel() + x_now.numel()) * weight.shape[0],
)
def _linear_kl(
    x_base: Tensor, x_now: Tensor, weight: Tensor, weight_base: Tensor | None, labels: Tensor | None,
    ignore_index: int, chunk_size: int | None,
) -> list[Tensor]:  # fmt: skip
    weight_base = weight if weight_base is None else weight_base
    if len(weight_base) != len(weight):
        raise ValueError(f"weight has {len(weight)} rows, weight_base {len(weight_base)}")
    fits = len(x_base) == len(x_now) if weight_base is not weight else x_base.shape == x_now.shape
    if not fits or (labels is not None and labels.shape != x_base.shape[:1]):
        wrong = "" if labels is None else f", labels {list(labels.shape)}"
        raise ValueError(f"x_base has shape {list(x_base.shape)}, x_now {list(x_now.shape)}{wrong}")
    check_chunk_size(chunk_size)
    ops, dtype = implementation(x_base), accumulation_dtype(x_base.dtype)
    chunk_size = chunk_size or rows_per_chunk(len(weight), x_base.dtype)
    outputs = _empty_outputs(x_base, x_now, weight, weight_base, labels, ignore_index, chunk_size)
    one = torch.ones((), dtype=dtype, device=x_base.device)
    for start in range(0, len(x_base), chunk_size):
        rows = slice(start, start + chunk_size)
        base, now = linear(x_base[rows], weight_base), linear(x_now[rows], weight)
        outputs[0][rows] = ops.kl_divergence(base, now)
        if labels is not None:
            for losses, logits in zip(outputs[1:], (base, now), strict=True):
                losses[rows], _ = ops.cross_entropy_(
                    logits, labels[rows], one, ignore_index=ignore_index, need_dlogits=False
                )
        del base, now  # before the next chunk's are made
    return outputs


@torch.no_grad()
def linear_kl(
    x_base: Tensor, x_now: Tensor, weight: Tensor, *, weight_base: Tensor | None = None, chunk_size: int | None = None
) -> Tensor:
    """KL(softmax(x_base W_baseᵀ) ‖ softmax(x_now Wᵀ)) of each token.

    A meter and not a loss: forward only, no gradient flows through it.

    Args:
        x_base: ``[T, H]``, normed final hidden states of the base model.
        x_now: ``[T, H]``, those of the model in training.
        weight: ``[V, H]``, the head, in the states' dtype.
        weight_base: ``[V, H_base]``, the base's head and as wide as its states, where it is another one.
        chunk_size: tokens whose logits exist at one time; by default :func:`rows_per_chunk`.

    Returns:
        ``[T]`` in the accumulation dtype, nats: exactly 0 where the two states are bit-equal, otherwise at least 0 up
        to rounding, and NaN where a state is.

    Raises:
        ValueError: states or heads that do not fit each other, a ``chunk_size`` below 1.
    """
    return _linear_kl(x_base, x_now, weight, weight_base, None, -100, chunk_size)[0]


@torch.no_grad()
def linear_kl_with_losses(
    x_base: Tensor,
    x_now: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    weight_base: Tensor | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> LinearKLOutput:
    """:func:`linear_kl`, and both models' losses from the same logits: one product with the head for each.

    Args:
        labels: ``[T]`` int64, already shifted.
        ignore_index: label whose losses are 0; its divergence is computed like any other.

    Raises:
        ValueError: shapes that do not fit, a ``chunk_size`` below 1.
    """
    return LinearKLOutput(*_linear_kl(x_base, x_now, weight, weight_base, labels, ignore_index, chunk_size))
