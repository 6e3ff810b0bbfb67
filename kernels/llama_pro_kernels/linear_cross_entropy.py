"""The output head and the loss in one: logits exist for one chunk of tokens at a time, and never twice.

    per chunk:  logits = x Wᵀ      losses, and logits become dlogits in place      dx = dlogits W      dW += dlogitsᵀ x

The loss is the last thing a model computes, so its gradient is known up to one factor while the logits are still
there. dX is made then and there and multiplied by the incoming gradient in backward. A frozen head costs two products,
what a plain head costs in forward plus dX; nothing is recomputed and no [T, V] tensor is ever kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .linear import linear, linear_dw, linear_dx
from .reference import compute_dtype, cross_entropy_

__all__ = [
    "LinearCrossEntropyOutput",
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
    "linear_cross_entropy_forward",
    "rows_per_chunk",
]

_CHUNK_BYTES = 1 << 28


def rows_per_chunk(vocab_size: int, dtype: torch.dtype) -> int:
    """How many tokens' logits are made at one time: the largest power of two whose buffer stays within 256 MiB.

    Others divide the tokens by ⌈V/H⌉, so that a chunk is as large as the input. That makes chunks of about a hundred
    rows for a narrow model with a large vocabulary, too few to keep a GPU's matrix product busy, and chunks that grow
    with the batch. A bound in bytes does neither: 2,048 rows at V = 32,000, 512 at 128,256, 256 at 262,144 (fp32),
    each thousands of output tiles, and less than a hundredth of the memory a 7B model trains in.
    """
    rows = max(1, _CHUNK_BYTES // (vocab_size * dtype.itemsize))
    return 1 << (rows.bit_length() - 1)


class LinearCrossEntropyOutput(NamedTuple):
    """What one pass over the tokens yields.

    Attributes:
        loss: scalar in the compute dtype, ``scale · Σ`` cross entropy of the valid tokens.
        dx: ``[T, H]`` in ``x``'s dtype, d loss / d x; None if not wanted.
        dweight: ``[V, H]`` in the compute dtype, d loss / d weight; None if not wanted.
        token_losses: ``[T]`` in the compute dtype, nats, unscaled, 0 at ignored labels; None without ``per_token``.
    """

    loss: Tensor
    dx: Tensor | None
    dweight: Tensor | None
    token_losses: Tensor | None


def linear_cross_entropy_forward(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    *,
    need_dx: bool,
    need_dweight: bool,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    per_token: bool = False,
) -> LinearCrossEntropyOutput:
    """Loss of a linear head, with the gradients that are wanted.

    Args:
        x: ``[T, H]``, normed final hidden states.
        weight: ``[V, H]``, the head, in ``x``'s dtype.
        labels: ``[T]`` int64, already shifted.
        scale: scalar tensor, factor on the summed loss: 1 / valid tokens of the global step. A tensor, known before
            the step, so that nobody waits for a count.
        need_dx: whether ``dx`` is made, one product.
        need_dweight: whether ``dweight`` is made, one more product and a ``[V, H]`` buffer.
        ignore_index: label that counts for nothing. With no valid label the loss and the gradients are exactly 0,
            whatever the scale.
        chunk_size: tokens whose logits exist at one time; by default :func:`rows_per_chunk`.
        per_token: also return each token's loss, for evaluation.

    Logits are rounded to ``x``'s dtype by their product, as in a plain head; from there on all is in the compute dtype
    until dlogits enter the next product. NaN and infinities reach the loss and the gradients.
    """
    dtype = compute_dtype(x.dtype)
    chunk_size = chunk_size or rows_per_chunk(len(weight), dtype)
    scale = scale.to(device=x.device, dtype=dtype)
    token_losses = torch.empty(len(x), dtype=dtype, device=x.device)
    dx = torch.empty_like(x) if need_dx else None
    dweight = torch.zeros(weight.shape, dtype=dtype, device=x.device) if need_dweight else None

    for start in range(0, len(x), chunk_size):
        rows = slice(start, start + chunk_size)
        logits = linear(x[rows], weight).to(dtype)
        token_losses[rows] = cross_entropy_(
            logits, labels[rows], scale, ignore_index=ignore_index, need_dlogits=need_dx or need_dweight
        )
        if need_dx or need_dweight:
            dlogits = logits.to(x.dtype)
            if need_dx:
                dx[rows] = linear_dx(dlogits, weight)
            if need_dweight:
                linear_dw(dlogits, x[rows], out=dweight)

    # Scaled before the sum: with no valid label the scale may be infinite, and 0 · inf is not 0.
    loss = torch.where(labels != ignore_index, token_losses * scale, 0).sum()
    return LinearCrossEntropyOutput(loss, dx, dweight, token_losses if per_token else None)


def linear_cross_entropy_backward(
    dloss: Tensor, dx: Tensor | None, dweight: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The stored gradients times the one that comes in: ``(dx · dloss, dweight · dloss)``, each in its own dtype."""
    return None if dx is None else dx * dloss, None if dweight is None else dweight * dloss


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps dX, and dW where the head trains; neither x nor the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        scale: Tensor,
        shadow: Tensor | None,
        ignore_index: int,
        chunk_size: int | None,
    ) -> Tensor:
        need_dx, need_dweight, *_ = ctx.needs_input_grad
        output = linear_cross_entropy_forward(
            x,
            weight.to(x.dtype) if shadow is None else shadow,
            labels,
            scale,
            need_dx=need_dx,
            need_dweight=need_dweight,
            ignore_index=ignore_index,
            chunk_size=chunk_size,
        )
        ctx.save_for_backward(output.dx, output.dweight)
        ctx.weight_dtype = weight.dtype
        return output.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = linear_cross_entropy_backward(dloss, *ctx.saved_tensors)
        return dx, None if dweight is None else dweight.to(ctx.weight_dtype), None, None, None, None, None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    *,
    shadow: Tensor | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> Tensor:
    """Differentiable :func:`linear_cross_entropy_forward`, returning the loss.

    Args:
        weight: ``[V, H]``, differentiable, possibly an fp32 master; its gradient comes back in its dtype.
        shadow: ``weight`` in ``x``'s dtype, not differentiable, used in its place for the products; by default
            ``weight`` is narrowed for the call.

    The gradients are made in forward; under ``no_grad`` they are not.
    """
    if not torch.is_grad_enabled():
        # Inside a Function needs_input_grad ignores the grad mode, and evaluation would pay for gradients.
        x, weight = x.detach(), weight.detach()
    return _LinearCrossEntropy.apply(x, weight, labels, scale, shadow, ignore_index, chunk_size)
