"""The layers that hold weights: linear, RMSNorm, embedding; and in which dtypes they hold them.

    master weight        a weight that trains: a float32 Parameter (float64 under a float64 computation). The optimizer
                         updates it, and its gradient has its dtype.
    low-precision copy   of a master weight, in the compute dtype, for the products; no Parameter. It is refreshed after
                         each optimizer step. There is none where the master weight already has the compute dtype, nor
                         where the caller wants none kept: then each product casts the master weight.
    frozen weight        one Parameter in the compute dtype, without a gradient.
    transposed           of a frozen matrix, in e4m3 codes, for backward in eight bits; buffers beside the Parameter,
                         made with it: who gives it other numbers, or the module another dtype, must make it anew.

The compute dtype is that of the activations: bf16 on a GPU, float32 on a CPU unless asked otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama_pro_kernels import E4M3, quantize_e4m3, rms_norm
from llama_pro_kernels.linear import fits_e4m3


class Linear(nn.Module):
    """A weight ``[out, in]`` and perhaps a bias ``[out]``. Who calls makes the products.

    Args:
        weight, bias: of any float dtype.
        trained: whether the two train.
        compute_dtype: of the activations.
        keep_low_precision: whether a low-precision copy of the weight is kept where one is needed. A bias has none.
        keep_transposed: whether the transpose of a frozen weight is kept in e4m3, where its sides allow that.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        trained: bool,
        compute_dtype: torch.dtype,
        keep_low_precision: bool = True,
        keep_transposed: bool = False,
    ) -> None:
        super().__init__()
        self.weight = parameter(weight, trained=trained, compute_dtype=compute_dtype)
        self.bias = None if bias is None else parameter(bias, trained=trained, compute_dtype=compute_dtype)
        copy = low_precision_copy(self.weight, compute_dtype) if keep_low_precision else None
        self.register_buffer("low_precision", copy, persistent=False)
        wanted = keep_transposed and not trained and fits_e4m3(weight.shape)
        codes, scales = quantize_e4m3(self.weight.detach().t()) if wanted else (None, None)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    @property
    def transposed(self) -> E4M3 | None:
        return None if self.codes is None else E4M3(self.codes, self.scales)


class RMSNorm(nn.Module):
    """The weight ``[H]`` of an RMSNorm. The op computes in float32, so it needs no low-precision copy."""

    def __init__(self, weight: Tensor, eps: float, *, trained: bool, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = parameter(weight, trained=trained, compute_dtype=compute_dtype)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Embedding(nn.Module):
    """A ``[V, H]`` table: of input embeddings, of the output head, or of both when they are tied."""

    def __init__(self, weight: Tensor, *, trained: bool, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = parameter(weight, trained=trained, compute_dtype=compute_dtype)
        self.register_buffer("low_precision", low_precision_copy(self.weight, compute_dtype), persistent=False)
        self.compute_dtype = compute_dtype

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.embedding(input_ids, self.weight).to(self.compute_dtype)

    @property
    def weight_in_compute_dtype(self) -> Tensor:
        """``[V, H]``, without a gradient."""
        return self.weight.detach() if self.low_precision is None else self.low_precision


def parameter(tensor: Tensor, *, trained: bool, compute_dtype: torch.dtype) -> nn.Parameter:
    """A master weight where it trains, else a frozen weight in the compute dtype."""
    dtype = torch.promote_types(compute_dtype, torch.float32) if trained else compute_dtype
    return nn.Parameter(tensor.detach().to(dtype), requires_grad=trained)


def low_precision_copy(weight: Tensor, compute_dtype: torch.dtype) -> Tensor | None:
    """A copy of ``weight`` in the compute dtype; None where ``weight`` itself has it."""
    return None if weight.dtype == compute_dtype else weight.detach().to(compute_dtype)


def low_precision_copies(module: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Master weight -> its low-precision copy, where one is kept."""
    kept = (m for m in module.modules() if getattr(m, "low_precision", None) is not None)
    return {m.weight: m.low_precision for m in kept}


@torch.no_grad()
def refresh_low_precision_copies(module: nn.Module) -> None:
    """Bring the low-precision copies in line with their master weights."""
    copies = low_precision_copies(module)
    if copies:
        torch._foreach_copy_(list(copies.values()), list(copies))
