"""AdamW (Loshchilov & Hutter 2019, algorithm 2) in one pass over a parameter, which clips and makes its bf16 copy too.

    g = gradient / divisor          m = β1 m + (1 − β1) g          v = β2 v + (1 − β2) g²
    p = (1 − lr · decay) p − lr · m̂ / (sqrt(v̂) + eps),  m̂ = m / (1 − β1ᵗ),  v̂ = v / (1 − β2ᵗ)

The least that must move is 28 bytes a parameter, its gradient, weight and moments read, the latter three written, and 2
for the copy. Neither the divisor nor whether the step counts is known to the host: both are device scalars.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .library import implementation

__all__ = ["adamw_"]


@torch.no_grad()
def adamw_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    copies: Sequence[Tensor | None],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    divisor: Tensor,
    left_out: Tensor,
) -> None:
    """A step of AdamW, written over the parameters, their moments and counts of steps, and over the copies.

    Args:
        parameters: of any shapes, contiguous, fp32 (or fp64) and on one device.
        gradients, exp_avgs, exp_avg_sqs: like the parameters. A gradient may be written over.
        steps: scalars in fp32, steps made so far.
        copies: like the parameters in a lower precision, brought in line with them; None where there is none.
        divisor: fp32 scalar, of the gradients.
        left_out: fp32 scalar: 1 leaves everything as it is, 0 does not.

    Raises:
        ValueError: one of a parameter's tensors has another shape, or is written over and not contiguous.
    """
    if not parameters:
        return
    written = (*parameters, *exp_avgs, *exp_avg_sqs, *(copy for copy in copies if copy is not None))
    if not all(each.is_contiguous() for each in written):
        raise ValueError("parameters, their moments and their copies must be contiguous")
    implementation(parameters[0]).adamw_(
        parameters, gradients, exp_avgs, exp_avg_sqs, steps, copies,
        lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, divisor=divisor, left_out=left_out,
    )  # fmt: skip
    increment_version(written)
