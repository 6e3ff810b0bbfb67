"""The output head and two losses in one: cross entropy, and a weight times the KL divergence from the base.

    per chunk:  logits = x Wᵀ, base = x_base Wᵀ      losses, and logits become dlogits in place      dx = dlogits W

    dlogits = scale · (p − onehot + kl_weight · (p − p_base)),  p the softmax

The base is the teacher. Both models share the frozen head, so the base's logits cost one product, exist for one chunk
at a time like the model's own, and are read by the same kernel. Only dX is kept, as in linear_cross_entropy.py. Where
the two states are bit-equal, as at the first step of a run, p − p_base is exactly 0; written as above, and not as
(1 + kl_weight) · p − kl_weight · p_base, the gradient is then that op's bit for bit.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .library import Consumed, implementation, register
from .linear import linear, linear_dx
from .linear_cross_entropy import (
    check_chunk_size,
    linear_cross_entropy_backward,
    linear_cross_entropy_backward_,
    rows_per_chunk,
)
from .reference import accumulation_dtype

__all__ = ["LinearCrossEntropyKLOutput", "linear_cross_entropy_kl", "linear_cross_entropy_kl_forward"]


class LinearCrossEntropyKLOutput(NamedTuple):
    """What one pass over the tokens yields. Losses are nats in the accumulation dtype.

    Attributes:
        loss: scalar, ``cross_entropy + kl_weight · divergence``.
        cross_entropy: scalar, ``scale · Σ`` cross entropy of the valid tokens.
        divergence: scalar, ``scale · Σ`` KL(base ‖ now) of the valid tokens.
        dx: ``[T, H]`` in ``x``'s dtype, d loss / d x; None if not wanted.
        token_losses, token_divergence: ``[T]``, neither scaled nor weighted, 0 at ignored labels; None without
            ``per_token``.
    """

    loss: Tensor
    cross_entropy: Tensor
    divergence: Tensor
    dx: Tensor | None
    token_losses: Tensor | None
    token_divergence: Tensor | None


def _empty_outputs(
    x: Tensor, x_base: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, kl_weight: float, need_dx: bool,
    ignore_index: int, chunk_size: int | None, per_token: bool,
) -> list[Tensor]:  # fmt: skip
    dtype = accumulation_dtype(x.dtype)
    outputs = [x.new_empty((), dtype=dtype) for _ in range(3)]
    if need_dx:
        outputs.append(x.new_empty(x.shape))
    if per_token:
        outputs += [x.new_empty(x.shape[0], dtype=dtype) for _ in range(2)]
    return outputs


def _count_flops(
    x: Tensor, x_base: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, kl_weight: float, need_dx: bool, *_: Any
) -> int:
    return 2 * x.numel() * weight.shape[0] * (2 + need_dx)


def linear_cross_entropy_kl_outputs(
    x: Tensor, x_base: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, kl_weight: float, need_dx: bool,
    ignore_index: int, chunk_size: int | None, per_token: bool,
) -> list[Tensor]:  # fmt: skip
    """The outputs that are wanted, in the order of :class:`LinearCrossEntropyKLOutput`."""
    if x_base.shape != x.shape or labels.shape != x.shape[:1] or scale.dim() != 0:
        raise ValueError(
            f"x_base has shape {list(x_base.shape)}, labels {list(labels.shape)} and scale {list(scale.shape)}; for x "
            f"{list(x.shape)} they must have {list(x.shape)}, [{len(x)}] and []"
        )
    if not 0 <= kl_weight < math.inf:
        raise ValueError(f"kl_weight is {kl_weight}; it must be a finite number and not below 0")
    check_chunk_size(chunk_size)
    cross_entropy_kl_ = implementation(x).cross_entropy_kl_
    dtype = accumulation_dtype(x.dtype)
    chunk_size = chunk_size or rows_per_chunk(len(weight), x.dtype)
    scale = scale.to(device=x.device, dtype=dtype)
    token_losses, token_divergence = (torch.empty(len(x), dtype=dtype, device=x.device) for _ in range(2))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_dx else None

    for start in range(0, len(x), chunk_size):
        rows = slice(start, start + chunk_size)
        logits, base_logits = linear(x[rows], weight), linear(x_base[rows], weight)
        token_losses[rows], token_divergence[rows] = cross_entropy_kl_(
            logits, base_logits, labels[rows], scale, kl_weight, ignore_index=ignore_index, need_dlogits=need_dx
        )
        del base_logits
        if need_dx:
            linear_dx(logits, weight, out=dx[rows])
        del logits  # before the next chunk's are made

    # Scaled before the sum: with no valid label the scale may be infinite, and 0 · inf is not 0.
    valid = labels != ignore_index
    cross_entropy, divergence = (
        torch.where(valid, tokens * scale, 0).sum() for tokens in (token_losses, token_divergence)
    )
    outputs = [cross_entropy + kl_weight * divergence, cross_entropy, divergence]
    outputs += [] if dx is None else [dx]
    return outputs + ([token_losses, token_divergence] if per_token else [])


_linear_cross_entropy_kl_forward = register(
    "linear_cross_entropy_kl_forward(Tensor x, Tensor x_base, Tensor weight, Tensor labels, Tensor scale,"
    " float kl_weight, bool need_dx, int ignore_index, int? chunk_size, bool per_token) -> Tensor[]",
    fake=_empty_outputs,
    flops=_count_flops,
)(linear_cross_entropy_kl_outputs)


def linear_cross_entropy_kl_forward(
    x: Tensor,
    x_base: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    kl_weight: float,
    *,
    need_dx: bool,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    per_token: bool = False,
) -> LinearCrossEntropyKLOutput:
    """Both losses of a frozen linear head, with the gradient of ``x`` if it is wanted.

    Args:
        x: ``[T, H]``, normed final hidden states of the model in training.
        x_base: ``[T, H]``, those of the base, in ``x``'s dtype; a constant.
        weight: ``[V, H]``, the head of both, in ``x``'s dtype.
        labels: ``[T]`` int64, already shifted; one outside the vocabulary is an IndexError on a CPU and makes NaN of
            its token's loss and gradient in Triton.
        scale: scalar tensor, factor on both sums: 1 / valid tokens of the global step.
        kl_weight: factor on the divergence, finite and at least 0; with 0 the divergence is still computed.
        need_dx: whether ``dx`` is made, one product beside the two of the logits.
        ignore_index: label that counts for nothing, in neither loss. With no valid label the losses and the gradient
            are exactly 0, whatever the scale.
        chunk_size: tokens whose logits exist at one time, twice; by default :func:`rows_per_chunk`.
        per_token: also return each token's two losses.

    Where a token's two rows of logits are bit-equal its divergence and the divergence's gradient are exactly 0. A word
    whose logit is −∞ for the base adds nothing to the divergence. Other NaN and infinities reach the losses and the
    gradient. Precision is that of :func:`linear_cross_entropy_forward`.

    Raises:
        ValueError: shapes that do not fit, a ``kl_weight`` below 0 or not finite, a ``chunk_size`` below 1.
    """
    outputs = iter(
        _linear_cross_entropy_kl_forward(
            x, x_base, weight, labels, scale, kl_weight, need_dx, ignore_index, chunk_size, per_token
        )
    )
    wanted = (True, True, True, need_dx, per_token, per_token)
    return LinearCrossEntropyKLOutput(*(next(outputs) if want else None for want in wanted))


class _LinearCrossEntropyKL(torch.autograd.Function):
    """Keeps dX alone. On request backward hands out that buffer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_base: Tensor,
        weight: Tensor,
        labels: Tensor,
        scale: Tensor,
        kl_weight: float,
        ignore_index: int,
        chunk_size: int | None,
        consume: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        output = linear_cross_entropy_kl_forward(
            x,
            x_base,
            weight,
            labels,
            scale,
            kl_weight,
            need_dx=ctx.needs_input_grad[0],
            ignore_index=ignore_index,
            chunk_size=chunk_size,
        )
        ctx.save_for_backward(output.dx)
        ctx.mark_non_differentiable(output.cross_entropy, output.divergence)
        ctx.consumed = Consumed("linear_cross_entropy_kl") if consume else None
        return output.loss, output.cross_entropy, output.divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.consumed is None:
            dx, _ = linear_cross_entropy_backward(dloss, *ctx.saved_tensors, None)
        else:
            ctx.consumed.once()
            dx, _ = linear_cross_entropy_backward_(dloss, *ctx.saved_tensors, None)
        return dx, *[None] * 8


def linear_cross_entropy_kl(
    x: Tensor,
    x_base: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    kl_weight: float,
    *,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    consume: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`linear_cross_entropy_kl_forward`, differentiable in ``x``: ``(loss, cross_entropy, divergence)``.

    Args:
        consume: backward multiplies the stored gradient in place and hands it out; a second backward raises
            RuntimeError. Ignored under ``torch.compile``, which reuses buffers itself.

    The gradient flows through ``loss``; the other two are its parts, for a log, and not differentiable. It is made in
    forward, and under ``no_grad`` it is not.

    Raises:
        ValueError: ``x_base`` or ``weight`` requires a gradient: the base is a constant here, and its head, which is
            this one, too; and what :func:`linear_cross_entropy_kl_forward` refuses.
    """
    for name, tensor in (("x_base", x_base), ("weight", weight)):
        if tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient and would get none; pass {name}.detach() if it is constant")
    if not torch.is_grad_enabled():
        x = x.detach()  # inside a Function needs_input_grad ignores the grad mode
    consume = consume and not torch.compiler.is_compiling()
    return _LinearCrossEntropyKL.apply(x, x_base, weight, labels, scale, kl_weight, ignore_index, chunk_size, consume)
