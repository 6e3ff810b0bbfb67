"""SwiGLU in Triton over packed ``[T, 2I]``.

Forward moves 3·I elements a token, backward 5·I (reads gate, up and dy, writes both gradients), and I more where the
product is wanted too. A program loads all of its tile before it stores any of it, and tiles do not meet, so backward
may write over its input. As codes the gradients are half as many bytes, and a program takes a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import e4m3
from .e4m3 import CODES, MEASURE, emit, empty_codes, finished, power_of_two
from .launch import expect, launch, overwritten, writable_rows


@dataclass(frozen=True)
class SwiGLUConfig:
    """How the rows are cut into programs.

    Attributes:
        tile: elements of a program and stream. 1,024 over 4 warps are one 16-byte access of bf16 a thread; intermediate
            sizes are multiples of 256 more often than of anything larger, so wider tiles idle more threads at the end
            of a row (11,008: 2 % here, 10 % at 2,048). Rows narrower than a tile are taken several at a time.
        num_warps: 4.
    """

    tile: int = 1024
    num_warps: int = 4

    def cut(self, intermediate: int) -> dict[str, int]:
        """Options of a launch for ``intermediate`` columns."""
        block = min(self.tile, triton.next_power_of_2(intermediate))
        return {"ROWS": self.tile // block, "BLOCK": block, "num_warps": self.num_warps}


CONFIG = SwiGLUConfig()


@triton.jit
def _place(num_rows, I, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """64-bit rows, columns and mask of this program; tiles of both lie on one axis, the only one without limit."""
    blocks = tl.cdiv(I, BLOCK)
    program = tl.program_id(0)
    rows = ((program // blocks) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = ((program % blocks) * BLOCK + tl.arange(0, BLOCK))[None, :]
    return rows.to(tl.int64), columns, (rows < num_rows) & (columns < I)


@triton.jit(do_not_specialize=["num_rows"])
def _swiglu_forward_kernel(
    gate_up_ptr, y_ptr, num_rows, gate_up_stride, I, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    rows, columns, mask = _place(num_rows, I, ROWS, BLOCK)
    gate_ptr = gate_up_ptr + rows * gate_up_stride + columns
    gate = tl.load(gate_ptr, mask=mask).to(tl.float32)
    up = tl.load(gate_ptr + I, mask=mask).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + rows * I + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gradients(dy, gate, up):
    """``(dgate, dup, SiLU(gate))``."""
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    return dy * up * (sigmoid + silu * (1.0 - sigmoid)), dy * silu, silu


@triton.jit(do_not_specialize=["num_rows"])
def _swiglu_backward_kernel(
    dy_ptr, gate_up_ptr, out_ptr, product_ptr, num_rows, dy_stride, gate_up_stride, out_stride, I,
    NEED_PRODUCT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, columns, mask = _place(num_rows, I, ROWS, BLOCK)
    gate_ptr = gate_up_ptr + rows * gate_up_stride + columns
    gate = tl.load(gate_ptr, mask=mask).to(tl.float32)
    up = tl.load(gate_ptr + I, mask=mask).to(tl.float32)
    dy = tl.load(dy_ptr + rows * dy_stride + columns, mask=mask).to(tl.float32)
    dgate, dup, silu = _gradients(dy, gate, up)
    d_ptr = out_ptr + rows * out_stride + columns
    tl.store(d_ptr, dgate.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(d_ptr + I, dup.to(out_ptr.dtype.element_ty), mask=mask)
    if NEED_PRODUCT:
        tl.store(product_ptr + rows * I + columns, (silu * up).to(product_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _row_gradients(dy_ptr, gate_ptr, codes_ptr, inverse, most, I, PASS: tl.constexpr, BLOCK: tl.constexpr):
    """Of one row, tile by tile."""
    for start in range(0, I, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < I
        gate = tl.load(gate_ptr + columns, mask=mask).to(tl.float32)
        up = tl.load(gate_ptr + I + columns, mask=mask).to(tl.float32)
        dy = tl.load(dy_ptr + columns, mask=mask).to(tl.float32)
        dgate, dup, _ = _gradients(dy, gate, up)
        most = emit(codes_ptr + columns, dgate, mask, inverse, most, PASS)
        most = emit(codes_ptr + I + columns, dup, mask, inverse, most, PASS)
    return most


@triton.jit
def _swiglu_backward_e4m3_kernel(
    dy_ptr, gate_up_ptr, codes_ptr, scale_ptr, dy_stride, gate_up_stride, I, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row * dy_stride
    gate_up_ptr += row * gate_up_stride
    codes_ptr += row * 2 * I
    most = tl.full((), 0, tl.int32)
    most = _row_gradients(dy_ptr, gate_up_ptr, codes_ptr, 1.0, most, I, MEASURE, BLOCK)
    scale, inverse = power_of_two(most)
    tl.store(scale_ptr + row, scale)
    _row_gradients(dy_ptr, gate_up_ptr, codes_ptr, inverse, most, I, CODES, BLOCK)


def swiglu_forward(gate_up: Tensor) -> Tensor:
    gate_up = _dense_rows(gate_up)
    num_tokens, intermediate = _sizes(gate_up)
    y = torch.empty(num_tokens, intermediate, dtype=gate_up.dtype, device=gate_up.device)
    grid, options = _cut(num_tokens, intermediate)
    launch(_swiglu_forward_kernel, grid, gate_up, y, num_tokens, gate_up.stride(0), intermediate, **options)
    return y


def swiglu_backward(dy: Tensor, gate_up: Tensor, *, need_product: bool = False) -> tuple[Tensor, Tensor | None]:
    out = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    return out, _backward_into(out, dy, _dense_rows(gate_up), need_product)


def swiglu_backward_(dy: Tensor, gate_up: Tensor, *, need_product: bool = False) -> tuple[Tensor, Tensor | None]:
    if not writable_rows(gate_up):
        # Nothing to gain here: the gradients are made elsewhere and brought back, or PyTorch refuses.
        dgate_up, product = swiglu_backward(dy, gate_up, need_product=need_product)
        return gate_up.copy_(dgate_up), product
    product = _backward_into(gate_up, dy, gate_up, need_product)
    return overwritten(gate_up), product


def swiglu_backward_e4m3(dy: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    num_tokens, intermediate = _sizes(gate_up)
    expect(dy=(dy, (num_tokens, intermediate)))
    dy, gate_up = _dense_rows(dy), _dense_rows(gate_up)
    codes, scales = empty_codes(gate_up, *gate_up.shape)
    launch(
        _swiglu_backward_e4m3_kernel, (num_tokens,),
        dy, gate_up, codes, scales, dy.stride(0), gate_up.stride(0), intermediate, **e4m3.CONFIG.cut(intermediate),
    )  # fmt: skip
    return finished(codes), scales


def _backward_into(out: Tensor, dy: Tensor, gate_up: Tensor, need_product: bool) -> Tensor | None:
    num_tokens, intermediate = _sizes(gate_up)
    expect(dy=(dy, (num_tokens, intermediate)))
    dy = _dense_rows(dy)
    product = torch.empty(dy.shape, dtype=gate_up.dtype, device=gate_up.device) if need_product else None
    grid, options = _cut(num_tokens, intermediate)
    launch(
        _swiglu_backward_kernel, grid,
        dy, gate_up, out, product, num_tokens, dy.stride(0), gate_up.stride(0), out.stride(0), intermediate,
        NEED_PRODUCT=need_product, **options,
    )  # fmt: skip
    return product


def _sizes(gate_up: Tensor) -> tuple[int, int]:
    num_tokens, packed = gate_up.shape
    if packed % 2:
        raise ValueError(f"gate_up has {packed} columns; gate and up are two halves")
    return num_tokens, packed // 2


def _cut(num_rows: int, intermediate: int) -> tuple[tuple[int], dict[str, int]]:
    options = CONFIG.cut(intermediate)
    return (triton.cdiv(num_rows, options["ROWS"]) * triton.cdiv(intermediate, options["BLOCK"]),), options


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
