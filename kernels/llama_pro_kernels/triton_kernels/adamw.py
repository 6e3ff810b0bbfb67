"""AdamW in Triton: a launch a parameter, which reads gradient, weight and moments once and writes the latter and the
copy once. PyTorch's fused kernel writes the clipped gradient back, and the copies are a pass of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import expect, launch


@dataclass(frozen=True)
class AdamWConfig:
    """How a parameter is cut into programs.

    Attributes:
        block: elements of a program; 8 a thread are two 16-byte accesses in each of the four fp32 streams, and one of
            the copy.
        num_warps: 4.
    """

    block: int = 1024
    num_warps: int = 4


CONFIG = AdamWConfig()


@triton.jit(do_not_specialize_on_alignment=["correction_ptr"])
def _adamw_kernel(
    parameter_ptr, gradient_ptr, exp_avg_ptr, exp_avg_sq_ptr, copy_ptr, correction_ptr, divisor_ptr, left_out_ptr,
    num_elements, lr, new1, new2, eps, weight_decay,
    BLOCK: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    if tl.load(left_out_ptr) == 0.0:
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < num_elements
        correction1 = tl.load(correction_ptr)
        correction2 = tl.load(correction_ptr + 1)
        gradient = tl.load(gradient_ptr + offsets, mask=mask) / tl.load(divisor_ptr)
        parameter = tl.load(parameter_ptr + offsets, mask=mask)
        exp_avg = tl.load(exp_avg_ptr + offsets, mask=mask)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=mask)
        exp_avg += new1 * (gradient - exp_avg)
        exp_avg_sq += new2 * (gradient * gradient - exp_avg_sq)
        parameter -= lr * weight_decay * parameter
        parameter -= lr * (exp_avg / correction1) / (tl.sqrt(exp_avg_sq / correction2) + eps)
        tl.store(parameter_ptr + offsets, parameter, mask=mask)
        tl.store(exp_avg_ptr + offsets, exp_avg, mask=mask)
        tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq, mask=mask)
        if COPY:
            tl.store(copy_ptr + offsets, parameter.to(copy_ptr.dtype.element_ty), mask=mask)


def adamw_(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor], steps: Sequence[Tensor], copies: Sequence[Tensor | None],
    *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, divisor: Tensor, left_out: Tensor,
) -> None:  # fmt: skip
    torch._foreach_add_(list(steps), [1.0 - left_out] * len(steps))  # one tensor for all might be asked for its value
    # Taken from 1 in fp64, here and for the kernel: of 1 − β2, 1e-3, an fp32 near 1 keeps three digits less.
    counts = torch.stack(list(steps)).double()
    corrections = torch.stack([1.0 - beta1**counts, 1.0 - beta2**counts], dim=1).float()
    tensors = zip(parameters, gradients, exp_avgs, exp_avg_sqs, copies, corrections, strict=True)
    for parameter, gradient, exp_avg, exp_avg_sq, copy, correction in tensors:
        shape = parameter.shape
        expect(gradient=(gradient, shape), exp_avg=(exp_avg, shape), exp_avg_sq=(exp_avg_sq, shape), copy=(copy, shape))
        launch(
            _adamw_kernel, (triton.cdiv(parameter.numel(), CONFIG.block),),
            parameter, gradient.contiguous(), exp_avg, exp_avg_sq, copy, correction, divisor, left_out,
            parameter.numel(), lr, 1.0 - beta1, 1.0 - beta2, eps, weight_decay,
            COPY=copy is not None, BLOCK=CONFIG.block, num_warps=CONFIG.num_warps,
        )  # fmt: skip
