"""The products of a linear layer, y = x Wᵀ + b, and the one place where they are made; with the gradients beside them.

Every product of the project goes through here, so that another number format for frozen weights has one door to
come in by. A weight's gradient is summed and returned in the accumulation dtype: rounding it to bf16 would lose the
small updates an fp32 master weight is kept for.

Shapes: ``x`` ``[T, in]``, ``weight`` ``[out, in]``, ``dy`` ``[T, out]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .e4m3 import E4M3
from .library import implementation, register
from .reference import accumulation_dtype

__all__ = [
    "linear",
    "linear_dbias",
    "linear_dscale",
    "linear_dw",
    "linear_dx",
    "linear_dx_e4m3",
    "trainable_linear",
]

E4M3_MULTIPLE = 16
"""Both sides of a weight must be multiples of it: 16 bytes of codes, what the products of Ada and Hopper ask for."""


def fits_e4m3(shape: Sequence[int]) -> bool:
    """Whether a weight of this shape can be multiplied in eight bits."""
    return all(side % E4M3_MULTIPLE == 0 for side in shape)


def missing_e4m3(device: torch.device) -> str:
    """Why a device cannot multiply in eight bits, in words; empty if it can. On a CPU that is imitated."""
    if device.type != "cuda":
        return ""
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        return f"{name} is an AMD card, whose eight-bit floats are others"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return f"{name} does not multiply eight-bit floats, which Ada, Hopper and later cards do"
    try:
        rows = E4M3(*(torch.zeros(size, device=device) for size in ((64, 64), (64,))))
        rows = rows._replace(codes=rows.codes.to(torch.float8_e4m3fn))
        linear_dx_e4m3(rows, rows, torch.bfloat16)
    except (RuntimeError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        return f"PyTorch {torch.__version__} cannot make such a product on {name} ({why})"
    return ""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` ``[T, in]``, ``weight`` ``[out, in]``, ``bias`` ``[out]``, all of one dtype -> ``[T, out]``."""
    return F.linear(x, weight, bias)


def linear_dx(dy: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Gradient of the input: ``dy`` ``[T, out]``, ``weight`` ``[out, in]`` -> ``[T, in]``, in ``out`` where given."""
    return torch.mm(dy, weight, out=out)


def linear_dx_e4m3(dy: E4M3, weight: E4M3, dtype: torch.dtype) -> Tensor:
    """:func:`linear_dx` in eight bits, summed in float32.

    Args:
        dy: ``[T, out]``, with a scale a token.
        weight: ``[in, out]``, the weight transposed, with a scale for each of its columns. Tensor cores of Ada and
            Hopper multiply e4m3 only along rows that lie dense, so a weight that forward reads is no help here.
        dtype: of the result; any other than bfloat16 is computed as on a CPU, of the decoded rows.

    Returns:
        ``[T, in]``. Of a token whose scale is NaN every number is.

    Raises:
        ValueError: codes that a GPU's product would not take: not contiguous, not of one width, or the weight's sides
            no multiples of 16.
    """
    codes, transposed = dy.codes, weight.codes
    if not (codes.is_contiguous() and transposed.is_contiguous()) or codes.shape[1] != transposed.shape[1]:
        raise ValueError(
            f"codes of {list(codes.shape)} and {list(transposed.shape)}: give contiguous rows of one width"
        )
    if not fits_e4m3(transposed.shape):
        raise ValueError(f"codes of {list(transposed.shape)}: both sides must be multiples of {E4M3_MULTIPLE}")
    if codes.is_cuda and dtype == torch.bfloat16:
        return scaled_product(dy, weight)
    acc = accumulation_dtype(dtype)
    product = torch.mm(codes.to(acc), transposed.to(acc).t())
    return product.mul_(dy.scales[:, None]).mul_(weight.scales).to(dtype)


def scaled_product(dy: E4M3, weight: E4M3, *, fast: bool = False) -> Tensor:
    """PyTorch's product in eight bits, scaled by rows and by columns, in bfloat16.

    Args:
        fast: sum in the tensor cores' own registers, which on a Hopper hold fewer bits than float32.
    """
    return torch._scaled_mm(
        dy.codes, weight.codes.t(), dy.scales[:, None], weight.scales[None],
        out_dtype=torch.bfloat16, use_fast_accum=fast,
    )  # fmt: skip


def linear_dw(dy: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """Gradient of the weight: ``dy`` ``[T, out]``, ``x`` ``[T, in]`` -> ``[out, in]`` in the accumulation dtype.

    Args:
        dy: gradient of the output.
        x: the input of forward, in ``dy``'s dtype.
        out: ``[out, in]`` in the accumulation dtype; the gradient is added to it, within the product, and it is
            returned.
    """
    dtype = accumulation_dtype(dy.dtype)
    if dy.is_cuda and dy.dtype != dtype:
        # Tensor cores accumulate in fp32 anyway; this keeps cuBLAS from rounding the result.
        if out is None:
            return torch.mm(dy.t(), x, out_dtype=dtype)
        return torch.addmm(out, dy.t(), x, out_dtype=dtype, out=out)
    dy, x = dy.to(dtype), x.to(dtype)
    # Not addmm_: PyTorch's FLOP counter has no formula for the method.
    return torch.mm(dy.t(), x) if out is None else torch.addmm(out, dy.t(), x, out=out)


def linear_dbias(dy: Tensor) -> Tensor:
    """Gradient of the bias: ``dy`` ``[T, out]`` -> ``[out]`` in the accumulation dtype."""
    return dy.sum(0, dtype=accumulation_dtype(dy.dtype))


@register(
    "linear_dscale(Tensor weight, Tensor dweight, Tensor scale) -> Tensor",
    fake=lambda weight, dweight, scale: dweight.new_empty(dweight.shape[1:]),
)
def _linear_dscale(weight: Tensor, dweight: Tensor, scale: Tensor) -> Tensor:
    return implementation(dweight).linear_dscale(weight, dweight, scale)


def linear_dscale(weight: Tensor, dweight: Tensor, scale: Tensor) -> Tensor:
    """Gradient of a scale on the input's columns, from the weight's gradient: colsum(W ∘ dW) / scale.

    With z = (x̂ · scale) Wᵀ the weight's gradient is dW = dzᵀ (x̂ · scale), and the scale's is Σ_tokens (dz W) ∘ x̂. Both
    sum the same terms, so no dz W is needed: the weight of an RMSNorm before a trained projection gets its gradient
    even where its input gets none. It is linear in dW.

    Args:
        weight: ``[out, in]``, as the product used it.
        dweight: ``[out, in]`` in the accumulation dtype, of a product whose input was scaled by ``scale``.
        scale: ``[in]``, no element 0.

    Returns:
        ``[in]`` in ``dweight``'s dtype.
    """
    return _linear_dscale(weight, dweight, scale)


class _TrainableLinear(torch.autograd.Function):
    """Keeps x only where the weight trains and the weight only where x needs a gradient.

    Without a low-precision copy the master weight itself is kept and cast in backward as in forward: a copy made here
    and kept would cost memory from forward to backward, in every layer.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, low_precision_weight: Tensor | None
    ) -> Tensor:
        need_dx, need_dweight, *_ = ctx.needs_input_grad
        source = weight if low_precision_weight is None else low_precision_weight
        ctx.save_for_backward(x if need_dweight else None, source if need_dx else None)
        ctx.weight_dtype = weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return linear(x, source.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, source = ctx.saved_tensors
        need_dx, need_dweight, need_dbias, _ = ctx.needs_input_grad
        return (
            linear_dx(dy, source.to(dy.dtype)) if need_dx else None,
            linear_dw(dy, x).to(ctx.weight_dtype) if need_dweight else None,
            linear_dbias(dy).to(ctx.bias_dtype) if need_dbias else None,
            None,
        )


def trainable_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, low_precision_weight: Tensor | None = None
) -> Tensor:
    """Differentiable linear layer whose weight may have higher precision than its input.

    Args:
        x: ``[T, in]``, the dtype the products are made in.
        weight: ``[out, in]``, differentiable, possibly an fp32 master weight; its gradient comes back in its dtype
            without having been rounded to ``x``'s. If frozen, ``x`` is not kept for it.
        bias: ``[out]``, like ``weight``.
        low_precision_weight: the copy of ``weight`` in ``x``'s dtype, not differentiable, that the products are made
            of; by default ``weight`` is cast for each product.

    Returns:
        ``[T, out]`` in ``x``'s dtype.
    """
    return _TrainableLinear.apply(x, weight, bias, low_precision_weight)
