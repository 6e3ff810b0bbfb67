"""The gradient of a scale on a linear layer's input in Triton: one pass over the weight and its gradient.

Both are read once, 6 bytes an element where the weight is bf16 and its gradient fp32, and next to nothing is written.
A program walks down one tile of columns in steps of a few rows, sums in registers and leaves one fp32 row; the kernel
that sums a norm's rows (rms_norm.py) adds these up in a fixed order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import expect, launch
from .rms_norm import sum_rows


@dataclass(frozen=True)
class DscaleConfig:
    """How the weight is cut into programs.

    Attributes:
        rows, columns: of a step; 16 elements a thread at 8 warps, three 16-byte loads in flight for each 8 of them.
        num_warps: of a program.
        programs: a multiprocessor; 8 of 8 warps fill it.
    """

    rows: int = 16
    columns: int = 256
    num_warps: int = 8
    programs: int = 8


CONFIG = DscaleConfig()


@triton.jit(do_not_specialize=["num_rows"])
def _dscale_kernel(
    matrix_ptr, dmatrix_ptr, partial_ptr, num_rows, H, stride, dstride,
    ROWS: tl.constexpr, BLOCK_H: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    column_mask = columns < H
    total = tl.zeros((ROWS, BLOCK_H), dtype=tl.float32)
    for turn in range(0, TURNS):
        rows = (turn * tl.num_programs(1) + tl.program_id(1)) * ROWS + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & column_mask[None, :]
        rows_64 = rows.to(tl.int64)[:, None]
        matrix = tl.load(matrix_ptr + rows_64 * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        dmatrix = tl.load(dmatrix_ptr + rows_64 * dstride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        total += matrix * dmatrix
    partial = partial_ptr + tl.program_id(1).to(tl.int64) * H + columns
    tl.store(partial, tl.sum(total, axis=0), mask=column_mask)


def linear_dscale(weight: Tensor, dweight: Tensor, scale: Tensor) -> Tensor:
    num_rows, width = weight.shape
    expect(dweight=(dweight, weight.shape), scale=(scale, weight.shape[1:]))
    weight, dweight = (t if t.stride(-1) == 1 else t.contiguous() for t in (weight, dweight))
    steps = triton.cdiv(num_rows, CONFIG.rows)
    programs = max(1, min(steps, dscale_partials(width, weight.device)))
    partial = torch.empty(programs, width, dtype=torch.float32, device=weight.device)
    launch(
        _dscale_kernel, (triton.cdiv(width, CONFIG.columns), programs),
        weight, dweight, partial, num_rows, width, weight.stride(0), dweight.stride(0),
        ROWS=CONFIG.rows, BLOCK_H=CONFIG.columns, TURNS=triton.cdiv(steps, programs), num_warps=CONFIG.num_warps,
    )  # fmt: skip
    return sum_rows(partial).div_(scale)


@functools.cache
def dscale_partials(width: int, device: torch.device) -> int:
    """How many rows of partial sums are made at most for a weight of ``width`` columns."""
    if device.type == "meta":
        multiprocessors = 132  # recorded and compiled as for an H100
    elif device.type != "cuda":
        return 3  # the interpreter: several, so that the second kernel has something to add
    else:
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, CONFIG.programs * multiprocessors // triton.cdiv(width, CONFIG.columns))
