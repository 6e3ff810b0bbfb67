"""RMSNorm in Triton, plain and with the residual sum, both ways.

Per row of H, forward reads x (and the residual) once and writes y (and the sum) once: 2·H elements, 4·H with the
residual. Backward reads dy, x (and the residual's gradient) and writes dx, likewise. Nothing but rstd is kept, because
x̂ = x·rstd costs a multiplication and reading it again would cost a row.

The weight's gradient is a sum over all rows. Where it is wanted, few programs walk over many rows each, sum in
registers and leave one fp32 row apiece; a second kernel adds these in a fixed order. Where it is not wanted, a program
takes one tile of rows, and neither the rows of sums nor the second kernel exist.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .e4m3 import empty_codes, finished, magnitude, power_of_two
from .launch import expect, launch


@dataclass(frozen=True)
class RMSNormConfig:
    """How rows are cut into programs.

    Attributes:
        tile: elements a program holds at one time. A row of 4,096 fills it; narrower rows (a norm per head) are taken
            several at a time, so that every thread has at least one 16-byte access.
        elements_per_thread: 16 make two 16-byte loads of bf16 per stream; backward with dW holds five streams of them
            in registers.
        max_warps: 16, because 32 leave a thread 64 registers. A row of 16,384 then has 32 elements a thread, and the
            backward with dW spills a few of them; up to 8,192 nothing spills.
        summing_warps: warps on one multiprocessor that sum a weight gradient: two programs of 8 warps or one of 16, for
            which there are registers (up to 93 a thread), so all of them walk at the same time.
        reduce_rows, reduce_columns: the tile of the second kernel; 32 columns make as many programs as there are
            multiprocessors at H = 4,096.
    """

    tile: int = 4096
    elements_per_thread: int = 16
    max_warps: int = 16
    summing_warps: int = 16
    reduce_rows: int = 64
    reduce_columns: int = 32

    def cut(self, width: int) -> dict[str, int]:
        """Options of a launch for rows of ``width``."""
        block = triton.next_power_of_2(width)
        rows = max(1, self.tile // block)
        warps = rows * block // (32 * self.elements_per_thread)
        return {"H": width, "BLOCK_H": block, "ROWS": rows, "num_warps": min(max(1, warps), self.max_warps)}


CONFIG = RMSNormConfig()


@triton.jit
def _row_offsets(rows, stride_token, stride_head, HEADS: tl.constexpr):
    """64-bit offset of each row of a ``[T, HEADS, H]`` tensor."""
    if HEADS == 1:
        return rows.to(tl.int64) * stride_token
    return (rows // HEADS).to(tl.int64) * stride_token + (rows % HEADS).to(tl.int64) * stride_head


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr,
    num_rows, x_stride, x_head_stride, residual_stride, eps,
    HEADS: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_H)
    row_mask = rows < num_rows
    mask = row_mask[:, None] & (columns < H)[None, :]
    out = rows.to(tl.int64)[:, None] * H + columns[None, :]

    x_rows = _row_offsets(rows, x_stride, x_head_stride, HEADS)
    x = tl.load(x_ptr + x_rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if ADD:
        residual_rows = rows.to(tl.int64) * residual_stride
        x += tl.load(residual_ptr + residual_rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        # The norm reads what the residual stream carries: the sum as it is stored.
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + out, rounded, mask=mask)
        x = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / H + tl.full((), eps, tl.float32))
    tl.store(rstd_ptr + rows, rstd, mask=row_mask)
    weight = tl.load(weight_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)
    y = x * rstd[:, None] * weight[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dresidual_ptr, dx_ptr, partial_ptr, codes_ptr, scale_ptr,
    num_rows, dy_stride, dy_head_stride, x_stride, x_head_stride, dresidual_stride, dresidual_head_stride,
    HEADS: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, ROWS: tl.constexpr,
    ADD: tl.constexpr, NEED_DWEIGHT: tl.constexpr, NEED_CODES: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_H)
    weight = tl.load(weight_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)
    if NEED_DWEIGHT:
        dweight = tl.zeros((ROWS, BLOCK_H), dtype=tl.float32)
    # TURNS is 1 where the weight is frozen: known to the compiler, so that no loop is left.
    for turn in range(0, TURNS):
        rows = (turn * tl.num_programs(0) + tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
        row_mask = rows < num_rows
        mask = row_mask[:, None] & (columns < H)[None, :]
        dy_rows = _row_offsets(rows, dy_stride, dy_head_stride, HEADS)
        x_rows = _row_offsets(rows, x_stride, x_head_stride, HEADS)
        dy = tl.load(dy_ptr + dy_rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + x_rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)[:, None]
        normed = x * rstd
        if NEED_DWEIGHT:
            dweight += dy * normed
        g = dy * weight[None, :]
        projection = tl.sum(g * normed, axis=1)[:, None] / H
        dx = (g - normed * projection) * rstd
        if ADD:
            d_rows = _row_offsets(rows, dresidual_stride, dresidual_head_stride, HEADS)
            dx += tl.load(dresidual_ptr + d_rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        out = rows.to(tl.int64)[:, None] * H + columns[None, :]
        tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEED_CODES:
            scale, inverse = power_of_two(tl.max(magnitude(dx), axis=1))
            tl.store(scale_ptr + rows, scale, mask=row_mask)
            tl.store(codes_ptr + out, (dx * inverse[:, None]).to(codes_ptr.dtype.element_ty), mask=mask)
    if NEED_DWEIGHT:
        partial = partial_ptr + tl.program_id(0).to(tl.int64) * H + columns
        tl.store(partial, tl.sum(dweight, axis=0), mask=columns < H)


@triton.jit
def _sum_rows_kernel(
    partial_ptr, dweight_ptr, H, NUM_ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_ROWS, BLOCK_H), dtype=tl.float32)
    for start in range(0, NUM_ROWS, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        mask = (rows < NUM_ROWS)[:, None] & (columns < H)[None, :]
        total += tl.load(partial_ptr + rows.to(tl.int64)[:, None] * H + columns[None, :], mask=mask, other=0.0)
    tl.store(dweight_ptr + columns, tl.sum(total, axis=0), mask=columns < H)


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = _forward(x, None, weight, eps)
    return y, rstd


def add_rms_norm_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, residual, weight, eps)


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    shape, add = x.shape, residual is not None
    expect(weight=(weight, shape[-1:]), residual=(residual, shape))
    x, heads, x_strides = _rows(x, collapse=add or _collapsible(x))
    residual_stride = 0
    if add:
        residual, _, (residual_stride, _) = _rows(residual, collapse=True)
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    s = torch.empty(shape, dtype=x.dtype, device=x.device) if add else None
    rstd = torch.empty(shape[:-1], dtype=torch.float32, device=x.device)
    options = CONFIG.cut(shape[-1])
    launch(
        _rms_norm_forward_kernel, (triton.cdiv(rstd.numel(), options["ROWS"]),),
        x, residual, weight.contiguous(), y, s, rstd, rstd.numel(), *x_strides, residual_stride, eps,
        HEADS=heads, ADD=add, **options,
    )  # fmt: skip
    return y, s, rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, *, dresidual: Tensor | None = None, need_dweight: bool
) -> tuple[Tensor, Tensor | None]:
    return _backward(dy, x, weight, rstd, dresidual, need_dweight)


def rms_norm_backward_e4m3(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, *, dresidual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    codes, scales = empty_codes(x, *x.shape)
    dx, _ = _backward(dy, x, weight, rstd, dresidual, False, codes, scales)
    return dx, finished(codes), scales


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dresidual: Tensor | None, need_dweight: bool,
    codes: Tensor | None = None, scales: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    shape, width = x.shape, x.shape[-1]
    expect(dy=(dy, shape), weight=(weight, shape[-1:]), rstd=(rstd, shape[:-1]), dresidual=(dresidual, shape))
    streams = [dy, x] if dresidual is None else [dy, x, dresidual]
    # One addressing for all: by head only if all can be, and some must be.
    collapse = all(_collapsible(stream) for stream in streams)
    streams = [_rows(stream, collapse=collapse) for stream in streams]
    heads = streams[0][1]
    (dy, _, dy_strides), (x, _, x_strides) = streams[:2]
    dresidual, _, dresidual_strides = streams[2] if dresidual is not None else (None, heads, (0, 0))

    dx = torch.empty(shape, dtype=x.dtype, device=x.device)
    options = CONFIG.cut(width)
    num_rows = rstd.numel()
    tiles = programs = triton.cdiv(num_rows, options["ROWS"])
    partial = None
    if need_dweight:
        programs = min(tiles, summing_programs(x.device, options["num_warps"], CONFIG.summing_warps))
        partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    launch(
        _rms_norm_backward_kernel, (programs,),
        dy, x, weight.contiguous(), rstd.contiguous(), dresidual, dx, partial, codes, scales,
        num_rows, *dy_strides, *x_strides, *dresidual_strides,
        HEADS=heads, ADD=dresidual is not None, NEED_DWEIGHT=need_dweight, NEED_CODES=codes is not None,
        TURNS=triton.cdiv(tiles, max(1, programs)), **options,
    )  # fmt: skip
    if partial is None:
        return dx, None
    return dx, sum_rows(partial)


def sum_rows(partial: Tensor) -> Tensor:
    """Sum of the rows of ``partial`` ``[programs, H]`` fp32, in a fixed order."""
    programs, width = partial.shape
    total = torch.empty(width, dtype=torch.float32, device=partial.device)
    launch(
        _sum_rows_kernel, (triton.cdiv(width, CONFIG.reduce_columns),), partial, total, width,
        NUM_ROWS=programs, BLOCK_ROWS=CONFIG.reduce_rows, BLOCK_H=CONFIG.reduce_columns, num_warps=4,
    )  # fmt: skip
    return total


def _collapsible(x: Tensor) -> bool:
    """Whether all leading dimensions of ``x`` can be walked with one stride."""
    try:
        x.view(-1, x.shape[-1])
    except RuntimeError:
        return False
    return x.stride(-1) == 1


def _rows(x: Tensor, *, collapse: bool) -> tuple[Tensor, int, tuple[int, int]]:
    """``x`` as rows that a kernel can address: (tensor, heads, (stride of a token, stride of a head)).

    A ``[T, N, H]`` view of a packed buffer is addressed where it lies; anything else that has no single row stride is
    copied.
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    if not collapse and x.dim() == 3:
        return x, x.shape[1], (x.stride(0), x.stride(1))
    x = x.reshape(-1, x.shape[-1])
    return x, 1, (x.stride(0), 0)


@functools.cache
def summing_programs(device: torch.device, num_warps: int, summing_warps: int) -> int:
    """How many programs sum a weight's gradient, where ``summing_warps`` on a multiprocessor walk at the same time."""
    if device.type == "meta":
        return 264  # recorded and compiled as for an H100
    if device.type != "cuda":
        return 4  # the interpreter: several, so that the second kernel has something to add
    return summing_warps // num_warps * torch.cuda.get_device_properties(device).multi_processor_count
