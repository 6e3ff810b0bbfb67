"""SwiGLU in Triton over packed ``[T, 2I]``.

Forward moves 3·I elements a token, backward 5·I (reads gate, up and dy, writes both gradients), and I more where the
product is wanted again. Each element is read and written by the same thread, reads first, so backward may write over
its input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch


@dataclass(frozen=True)
class SwiGLUConfig:
    """How a row is cut into programs.

    Attributes:
        block: columns of a program. 1,024 over 4 warps are one 16-byte access of bf16 a thread and stream; intermediate
            sizes are multiples of 256 more often than of anything larger, so wider blocks idle more threads at the end
            of a row (11,008: 2 % here, 10 % at 2,048).
        num_warps: 4.
    """

    block: int = 1024
    num_warps: int = 4

    def cut(self, intermediate: int) -> dict[str, int]:
        """Options of a launch for ``intermediate`` columns."""
        return {"BLOCK": min(self.block, triton.next_power_of_2(intermediate)), "num_warps": self.num_warps}


CONFIG = SwiGLUConfig()


@triton.jit
def _place(I, BLOCK: tl.constexpr):
    """64-bit row and columns of this program: rows × blocks of columns lie on one axis, the only one without limit."""
    blocks = tl.cdiv(I, BLOCK)
    program = tl.program_id(0)
    return (program // blocks).to(tl.int64), (program % blocks) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _swiglu_forward_kernel(gate_up_ptr, y_ptr, gate_up_stride, I, BLOCK: tl.constexpr):
    row, columns = _place(I, BLOCK)
    mask = columns < I
    gate_ptr = gate_up_ptr + row * gate_up_stride
    gate = tl.load(gate_ptr + columns, mask=mask).to(tl.float32)
    up = tl.load(gate_ptr + I + columns, mask=mask).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * I + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(
    dy_ptr, gate_up_ptr, out_ptr, product_ptr, dy_stride, gate_up_stride, out_stride, I,
    NEED_PRODUCT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, columns = _place(I, BLOCK)
    mask = columns < I
    gate_ptr = gate_up_ptr + row * gate_up_stride
    gate = tl.load(gate_ptr + columns, mask=mask).to(tl.float32)
    up = tl.load(gate_ptr + I + columns, mask=mask).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_stride + columns, mask=mask).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = dy * up * (sigmoid + silu * (1.0 - sigmoid))
    dup = dy * silu
    d_ptr = out_ptr + row * out_stride
    tl.store(d_ptr + columns, dgate.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(d_ptr + I + columns, dup.to(out_ptr.dtype.element_ty), mask=mask)
    if NEED_PRODUCT:
        tl.store(product_ptr + row * I + columns, (silu * up).to(product_ptr.dtype.element_ty), mask=mask)


def swiglu_forward(gate_up: Tensor) -> Tensor:
    gate_up = _dense_rows(gate_up)
    num_tokens, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(num_tokens, intermediate, dtype=gate_up.dtype, device=gate_up.device)
    options = CONFIG.cut(intermediate)
    grid = (num_tokens * triton.cdiv(intermediate, options["BLOCK"]),)
    launch(_swiglu_forward_kernel, grid, gate_up, y, gate_up.stride(0), intermediate, **options)
    return y


def swiglu_backward(dy: Tensor, gate_up: Tensor, *, need_product: bool = False) -> tuple[Tensor, Tensor | None]:
    out = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    return out, _backward_into(out, dy, _dense_rows(gate_up), need_product)


def swiglu_backward_(dy: Tensor, gate_up: Tensor, *, need_product: bool = False) -> tuple[Tensor, Tensor | None]:
    if gate_up.stride(-1) != 1:
        # Nothing to gain here: the gradients are made elsewhere and brought back.
        dgate_up, product = swiglu_backward(dy, gate_up, need_product=need_product)
        return gate_up.copy_(dgate_up), product
    return gate_up, _backward_into(gate_up, dy, gate_up, need_product)


def _backward_into(out: Tensor, dy: Tensor, gate_up: Tensor, need_product: bool) -> Tensor | None:
    dy = _dense_rows(dy)
    num_tokens, intermediate = dy.shape
    product = torch.empty(dy.shape, dtype=gate_up.dtype, device=gate_up.device) if need_product else None
    options = CONFIG.cut(intermediate)
    launch(
        _swiglu_backward_kernel, (num_tokens * triton.cdiv(intermediate, options["BLOCK"]),),
        dy, gate_up, out, product, dy.stride(0), gate_up.stride(0), out.stride(0), intermediate,
        NEED_PRODUCT=need_product, **options,
    )  # fmt: skip
    return product


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
