"""The output head and the loss in one: logits exist for one chunk of tokens at a time, and never twice.

    per chunk:  logits = x Wᵀ      losses, and logits become dlogits in place      dx = dlogits W      dW += dlogitsᵀ x

The middle one is one kernel: it reads the logits in the products' dtype, computes in fp32 and writes dlogits over them.

The loss is the last thing a model computes, so its gradient is known up to one factor while the logits are still
there. dX is made then and there and multiplied by the incoming gradient in backward. A frozen head costs two products,
what a plain head costs in forward plus dX; nothing is recomputed and no [T, V] tensor is ever kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .library import Consumed, implementation, register
from .linear import linear, linear_dw, linear_dx
from .reference import accumulation_dtype

__all__ = [
    "LinearCrossEntropyOutput",
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
    "linear_cross_entropy_backward_",
    "linear_cross_entropy_forward",
    "rows_per_chunk",
]

_CHUNK_BYTES = 1 << 28
_MIN_ROWS = 1024
_ROW_MULTIPLE = 256


def rows_per_chunk(vocab_size: int, dtype: torch.dtype) -> int:
    """How many tokens' logits are made at one time: what 256 MiB hold, in multiples of 256, and never below 1,024.

    Others divide the tokens by ⌈V/H⌉, so that a chunk is as large as the input. That makes chunks of about a hundred
    rows for a narrow model with a large vocabulary, and chunks that grow with the batch. A bound in bytes does neither.
    The least is there for dX, whose ``[rows, H]`` must be tiles enough for a GPU: 1,024 × 4,096 are 128 of 128 × 256.
    In bf16: 4,096 rows at V = 32,000, and 1,024 at 128,256, 151,936 (297 MiB) and 262,144 (512 MiB).

    Args:
        vocab_size: V.
        dtype: of the logits, which is that of the hidden states.
    """
    rows = _CHUNK_BYTES // (vocab_size * dtype.itemsize)
    return max(_MIN_ROWS, rows // _ROW_MULTIPLE * _ROW_MULTIPLE)


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise ValueError if ``chunk_size`` is no number of tokens."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1, or None")


class LinearCrossEntropyOutput(NamedTuple):
    """What one pass over the tokens yields.

    Attributes:
        loss: scalar in the accumulation dtype, ``scale · Σ`` cross entropy of the valid tokens.
        dx: ``[T, H]`` in ``x``'s dtype, d loss / d x; None if not wanted.
        dweight: ``[V, H]`` in the accumulation dtype, d loss / d weight; None if not wanted.
        token_losses: ``[T]`` in the accumulation dtype, nats, unscaled, 0 at ignored labels; None without
            ``per_token``.
        token_correct: ``[T]`` bool, whether the label is the prediction, the first of the largest logits; False at
            ignored labels; its sum is the count of right predictions. None without ``need_correct``.
    """

    loss: Tensor
    dx: Tensor | None
    dweight: Tensor | None
    token_losses: Tensor | None
    token_correct: Tensor | None


def _empty_outputs(
    x: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, need_dx: bool, need_dweight: bool, ignore_index: int,
    chunk_size: int | None, per_token: bool, need_correct: bool,
) -> list[Tensor]:  # fmt: skip
    dtype = accumulation_dtype(x.dtype)
    outputs = [x.new_empty((), dtype=dtype)]
    if need_dx:
        outputs.append(x.new_empty(x.shape))
    if need_dweight:
        outputs.append(x.new_empty(weight.shape, dtype=dtype))
    if per_token:
        outputs.append(x.new_empty(x.shape[0], dtype=dtype))
    if need_correct:
        outputs.append(x.new_empty(x.shape[0], dtype=torch.bool))
    return outputs


def _count_flops(
    x: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, need_dx: bool, need_dweight: bool, *_: Any
) -> int:
    return 2 * x.numel() * weight.shape[0] * (1 + need_dx + need_dweight)


def linear_cross_entropy_outputs(
    x: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, need_dx: bool, need_dweight: bool, ignore_index: int,
    chunk_size: int | None, per_token: bool, need_correct: bool,
) -> list[Tensor]:  # fmt: skip
    """The outputs that are wanted, in the order of :class:`LinearCrossEntropyOutput`."""
    if labels.shape != x.shape[:1] or scale.dim() != 0:
        raise ValueError(
            f"labels have shape {list(labels.shape)} and scale {list(scale.shape)}, for x {list(x.shape)} they must "
            f"have [{len(x)}] and []"
        )
    check_chunk_size(chunk_size)
    cross_entropy_ = implementation(x).cross_entropy_
    dtype = accumulation_dtype(x.dtype)
    chunk_size = chunk_size or rows_per_chunk(len(weight), x.dtype)
    scale = scale.to(device=x.device, dtype=dtype)
    token_losses = torch.empty(len(x), dtype=dtype, device=x.device)
    token_correct = torch.empty(len(x), dtype=torch.bool, device=x.device) if need_correct else None
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_dx else None
    dweight = None

    for start in range(0, len(x), chunk_size):
        rows = slice(start, start + chunk_size)
        logits = linear(x[rows], weight)
        token_losses[rows], correct = cross_entropy_(
            logits, labels[rows], scale, ignore_index=ignore_index, need_dlogits=need_dx or need_dweight,
            need_correct=need_correct,
        )  # fmt: skip
        if need_correct:
            token_correct[rows] = correct
        if need_dx:
            linear_dx(logits, weight, out=dx[rows])
        if need_dweight:
            dweight = linear_dw(logits, x[rows], out=dweight)
        del logits  # before the next chunk's are made

    if need_dweight and dweight is None:
        dweight = torch.zeros(weight.shape, dtype=dtype, device=x.device)
    # Scaled before the sum: with no valid label the scale may be infinite, and 0 · inf is not 0.
    loss = torch.where(labels != ignore_index, token_losses * scale, 0).sum()
    outputs = [loss, dx, dweight, token_losses if per_token else None, token_correct]
    return [output for output in outputs if output is not None]


_linear_cross_entropy_forward = register(
    "linear_cross_entropy_forward(Tensor x, Tensor weight, Tensor labels, Tensor scale, bool need_dx,"
    " bool need_dweight, int ignore_index, int? chunk_size, bool per_token, bool need_correct) -> Tensor[]",
    fake=_empty_outputs,
    flops=_count_flops,
)(linear_cross_entropy_outputs)


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
    need_correct: bool = False,
) -> LinearCrossEntropyOutput:
    """Loss of a linear head, with the gradients that are wanted.

    Args:
        x: ``[T, H]``, normed final hidden states.
        weight: ``[V, H]``, the head, in ``x``'s dtype.
        labels: ``[T]`` int64, already shifted; one outside the vocabulary is an IndexError on a CPU and makes NaN of
            its token's loss and gradient in Triton.
        scale: scalar tensor, factor on the summed loss: 1 / valid tokens of the global step. A tensor, known before
            the step, so that nobody waits for a count.
        need_dx: whether ``dx`` is made, one product.
        need_dweight: whether ``dweight`` is made, one more product and a ``[V, H]`` buffer.
        ignore_index: label that counts for nothing. With no valid label the loss and the gradients are exactly 0,
            whatever the scale.
        chunk_size: tokens whose logits exist at one time, at least 1; by default :func:`rows_per_chunk`.
        per_token: also return each token's loss, for evaluation.
        need_correct: also return whether each token was the prediction, one more reading of the logits.

    Logits, and then dlogits, are rounded to ``x``'s dtype by and for their products, as in a plain head; between the
    products all is in the accumulation dtype. NaN and infinities reach the loss and the gradients. fp16 has too few
    small numbers for dlogits at a scale of 1 / thousands: there a loss scale belongs into ``scale``.

    Raises:
        ValueError: shapes that do not fit, a ``chunk_size`` below 1.
    """
    outputs = iter(
        _linear_cross_entropy_forward(
            x, weight, labels, scale, need_dx, need_dweight, ignore_index, chunk_size, per_token, need_correct
        )
    )
    wanted = (True, need_dx, need_dweight, per_token, need_correct)
    return LinearCrossEntropyOutput(*(next(outputs) if want else None for want in wanted))


def linear_cross_entropy_backward(
    dloss: Tensor, dx: Tensor | None, dweight: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The stored gradients times the one that comes in: ``(dx · dloss, dweight · dloss)``, each in its own dtype."""
    return None if dx is None else dx * dloss, None if dweight is None else dweight * dloss


def linear_cross_entropy_backward_(
    dloss: Tensor, dx: Tensor | None, dweight: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """:func:`linear_cross_entropy_backward` written over the stored gradients, which are returned."""
    return None if dx is None else dx.mul_(dloss), None if dweight is None else dweight.mul_(dloss)


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps dX, and dW where the head trains; neither x nor the weight. On request backward hands out those buffers."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        scale: Tensor,
        low_precision_weight: Tensor | None,
        ignore_index: int,
        chunk_size: int | None,
        consume: bool,
    ) -> Tensor:
        need_dx, need_dweight, *_ = ctx.needs_input_grad
        output = linear_cross_entropy_forward(
            x,
            weight.to(x.dtype) if low_precision_weight is None else low_precision_weight,
            labels,
            scale,
            need_dx=need_dx,
            need_dweight=need_dweight,
            ignore_index=ignore_index,
            chunk_size=chunk_size,
        )
        ctx.save_for_backward(output.dx, output.dweight)
        ctx.weight_dtype = weight.dtype
        ctx.consumed = Consumed("linear_cross_entropy") if consume else None
        return output.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.consumed is None:
            dx, dweight = linear_cross_entropy_backward(dloss, *ctx.saved_tensors)
        else:
            ctx.consumed.once()
            dx, dweight = linear_cross_entropy_backward_(dloss, *ctx.saved_tensors)
        return dx, None if dweight is None else dweight.to(ctx.weight_dtype), None, None, None, None, None, None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    *,
    low_precision_weight: Tensor | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    consume: bool = False,
) -> Tensor:
    """Differentiable :func:`linear_cross_entropy_forward`, returning the loss.

    Args:
        weight: ``[V, H]``, differentiable, possibly an fp32 master weight; its gradient comes back in its dtype.
        low_precision_weight: the copy of ``weight`` in ``x``'s dtype, not differentiable, that the products are made
            of; by default ``weight`` is cast for the call.
        consume: backward multiplies the stored gradients in place and hands them out, which saves a buffer the size of
            ``x`` when memory is fullest; a second backward raises RuntimeError. Ignored under ``torch.compile``, which
            reuses buffers itself.

    The gradients are made in forward; under ``no_grad`` they are not.
    """
    if not torch.is_grad_enabled():
        # Inside a Function needs_input_grad ignores the grad mode, and evaluation would pay for gradients.
        x, weight = x.detach(), weight.detach()
    consume = consume and not torch.compiler.is_compiling()
    return _LinearCrossEntropy.apply(x, weight, labels, scale, low_precision_weight, ignore_index, chunk_size, consume)
