"""Rows in eight bits in Triton: what a kernel that writes codes needs, and the one that writes nothing else.

A row's scale is known when all of the row is. So a program takes whole rows: in one go where they fit its registers (a
norm's), else twice, once for the largest magnitude and once for the codes; the second reading comes from the cache.

A magnitude is compared as the integer of its bits, which orders floats and puts NaN above Inf above all else; a power
of two is made of the bits of its exponent. So there is neither a rounding nor a NaN that a maximum drops.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

PLAIN, MEASURE, CODES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What :func:`emit` does with a tile: store it as it is, take note of its largest magnitude, or store its codes."""


@dataclass(frozen=True)
class RowsConfig:
    """How long rows are cut, where a program takes one of them in tiles.

    Attributes:
        tile: elements of a tile. 8,192 over 16 warps are 16 elements, two 16-byte loads of bf16, a thread and stream;
            two programs fill a multiprocessor of a Hopper, whose 256 KiB of cache hold both rows of a SwiGLU of 11,008
            (64.5 KiB each) for the second reading; on an Ada it comes from the cache behind.
        elements_per_thread: 16.
    """

    tile: int = 8192
    elements_per_thread: int = 16

    def cut(self, width: int) -> dict[str, int]:
        """Options of a launch for rows of ``width``."""
        block = min(self.tile, triton.next_power_of_2(width))
        return {"BLOCK": block, "num_warps": max(1, block // (32 * self.elements_per_thread))}


CONFIG = RowsConfig()


@triton.jit
def magnitude(x):
    """int32 that orders fp32 numbers by magnitude."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def power_of_two(most):
    """``(scale, 1 / scale)`` of rows whose largest magnitude is ``most``: 448 = 1.75 · 2⁸ is the largest code."""
    exponent = (most >> 23) - 8 + tl.where((most & 0x7FFFFF) > 0x600000, 1, 0)
    exponent = tl.maximum(exponent, 27)  # 2⁻¹⁰⁰
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    scale = tl.where(most < 0x7F800000, exponent << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    return scale, inverse


@triton.jit
def emit(ptr, x, mask, inverse, most, PASS: tl.constexpr):
    """What ``PASS`` says, with a tile; the largest magnitude of it and of those before."""
    if PASS == MEASURE:
        most = tl.maximum(most, tl.max(magnitude(tl.where(mask, x.to(tl.float32), 0.0))))
    elif PASS == CODES:
        tl.store(ptr, (x.to(tl.float32) * inverse).to(ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)
    return most


@triton.jit
def _quantize_e4m3_kernel(x_ptr, codes_ptr, scale_ptr, x_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    most = tl.full((), 0, tl.int32)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_stride + columns, mask=columns < WIDTH)
        most = emit(codes_ptr, x, columns < WIDTH, 1.0, most, MEASURE)
    scale, inverse = power_of_two(most)
    tl.store(scale_ptr + row, scale)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_stride + columns, mask=columns < WIDTH)
        emit(codes_ptr + row * WIDTH + columns, x, columns < WIDTH, inverse, most, CODES)


def quantize_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    codes, scales = empty_codes(x, rows, width)
    launch(_quantize_e4m3_kernel, (rows,), x, codes, scales, x.stride(0), WIDTH=width, **CONFIG.cut(width))
    return finished(codes), scales


def empty_codes(like: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Where a kernel writes codes and scales.

    The interpreter rounds to e4m3 wrongly (NaN becomes 384, subnormals are cut off). There a kernel writes in fp32 what
    it would have rounded, and :func:`finished` rounds.
    """
    dtype = torch.float32 if like.device.type == "cpu" else torch.float8_e4m3fn
    codes = torch.empty(rows, columns, dtype=dtype, device=like.device)
    return codes, torch.empty(rows, dtype=torch.float32, device=like.device)


def finished(codes: Tensor) -> Tensor:
    return codes.to(torch.float8_e4m3fn)
