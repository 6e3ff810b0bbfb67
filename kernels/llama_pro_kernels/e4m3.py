"""Rows in eight bits: e4m3 codes with one scale a row, a power of two (Micikevicius et al. 2022, "FP8 formats").

    x ≈ codes · scale,  scale = the least power of two with max |x| <= 448 · scale, and not below 2⁻¹⁰⁰

e4m3 has three bits of mantissa: a code is off by at most 2⁻⁴ of its number, or 2⁻¹⁰ of the scale where the number is
small. A power of two rounds nothing, so where a scale is multiplied in does not matter. The bound is for rows of zeros,
which would have a scale of 0. A row with an Inf or a NaN has the scale NaN: its codes alone would hide it.

The ops whose name ends in ``_e4m3`` write the codes of a gradient in the kernel that makes it, from numbers that were
not rounded before; a pass of its own would read and write it once more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .library import implementation, register

__all__ = ["E4M3", "empty_e4m3", "quantize_e4m3"]


class E4M3(NamedTuple):
    """Rows as ``codes · scales[:, None]``.

    Attributes:
        codes: ``[rows, columns]`` float8_e4m3fn, contiguous.
        scales: ``[rows]`` float32, powers of two; NaN for a row that held an Inf or a NaN.
    """

    codes: Tensor
    scales: Tensor


def empty_e4m3(like: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The shape of an op's result, for fake tensors."""
    codes = like.new_empty(rows, columns, dtype=torch.float8_e4m3fn)
    return codes, like.new_empty(rows, dtype=torch.float32)


@register("quantize_e4m3(Tensor x) -> (Tensor, Tensor)", fake=lambda x: empty_e4m3(x, *x.shape))
def _quantize_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    return implementation(x).quantize_e4m3(x)


def quantize_e4m3(x: Tensor) -> E4M3:
    """The rows of ``x`` ``[rows, columns]``, of any float dtype and any strides, in eight bits."""
    return E4M3(*_quantize_e4m3(x))
