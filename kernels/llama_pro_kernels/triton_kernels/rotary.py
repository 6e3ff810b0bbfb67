"""Rotary position embedding in Triton over the packed output of one q/k/v projection.

One program turns all heads of one token: positions and angles are read once, in fp32, and each element of q and k is
read and written once, which is the least there is. Forward reads q and k out of the packed buffer and writes both into
one buffer, or in place; backward reads dq, dk and dv wherever attention left them and writes the packed gradient. Both
are one launch of one kernel: the reverse of a rotation is the rotation by the opposite angle. For codes of the packed
gradient a program goes over its token twice, first for the scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .e4m3 import CODES, MEASURE, PLAIN, emit, empty_codes, finished, power_of_two
from .launch import expect, launch, overwritten, writable_rows


@dataclass(frozen=True)
class RotaryConfig:
    """How the heads of a token are cut into tiles.

    Attributes:
        tile: elements of one half of a tile of heads. 1,024 over 4 warps are one 16-byte access of bf16 a thread and
            half; at head dim 128 that is 16 heads.
        num_warps: 4.
    """

    tile: int = 1024
    num_warps: int = 4

    def cut(self, half: int) -> dict[str, int]:
        """Options of a launch for ``half`` the rotary dimensions."""
        block = triton.next_power_of_2(half)
        return {"BLOCK_HALF": block, "BLOCK_HEADS": max(1, self.tile // block), "num_warps": self.num_warps}


CONFIG = RotaryConfig()


@triton.jit
def copy_heads(
    in_ptr, in_head_stride, out_ptr, heads, head_mask, inverse, most,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    mask = head_mask & (columns < WIDTH)[None, :]
    x = tl.load(in_ptr + heads[:, None] * in_head_stride + columns[None, :], mask=mask)
    return emit(out_ptr + heads[:, None] * HEAD_DIM + columns[None, :], x, mask, inverse, most, PASS)


@triton.jit
def copy_all_heads(
    in_ptr, in_head_stride, out_ptr, limit, inverse, most,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr,
    PASS: tl.constexpr,
):  # fmt: skip
    """Those below ``limit``."""
    for start in range(0, NUM_HEADS, BLOCK_HEADS):
        heads = (start + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
        most = copy_heads(
            in_ptr, in_head_stride, out_ptr, heads, (heads < limit)[:, None], inverse, most,
            HEAD_DIM, HEAD_DIM, BLOCK_DIM, PASS,
        )  # fmt: skip
    return most


@triton.jit
def _turn(
    in_ptr, in_head_stride, out_ptr, cos, sin, inverse, most,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_REST: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """Rotate the heads of one token; in ``out`` they lie one behind the other."""
    columns = tl.arange(0, BLOCK_HALF)
    for start in range(0, NUM_HEADS, BLOCK_HEADS):
        heads = (start + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
        head_mask = (heads < NUM_HEADS)[:, None]
        mask = head_mask & (columns < HALF)[None, :]
        source = in_ptr + heads[:, None] * in_head_stride + columns[None, :]
        target = out_ptr + heads[:, None] * HEAD_DIM + columns[None, :]
        x1 = tl.load(source, mask=mask).to(tl.float32)
        x2 = tl.load(source + HALF, mask=mask).to(tl.float32)
        most = emit(target, x1 * cos - x2 * sin, mask, inverse, most, PASS)
        most = emit(target + HALF, x2 * cos + x1 * sin, mask, inverse, most, PASS)
        if BLOCK_REST > 0:
            REST: tl.constexpr = HEAD_DIM - 2 * HALF
            most = copy_heads(
                in_ptr + 2 * HALF, in_head_stride, out_ptr + 2 * HALF, heads, head_mask, inverse, most,
                HEAD_DIM, REST, BLOCK_REST, PASS,
            )  # fmt: skip
    return most


@triton.jit
def angles_of(position, cos_ptr, sin_ptr, num_positions, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """cos and sin of a token ``[1, BLOCK_HALF]``. A position without a row in the tables turns into NaN, not into
    somebody else's memory."""
    columns = tl.arange(0, BLOCK_HALF)
    mask = columns < tl.where((position >= 0) & (position < num_positions), HALF, 0)
    angles = position * HALF + columns
    cos = tl.load(cos_ptr + angles, mask=mask, other=float("nan")).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + angles, mask=mask, other=float("nan")).to(tl.float32)[None, :]
    return cos, sin


@triton.jit
def _turn_token(
    q_ptr, q_head_stride, k_ptr, k_head_stride, v_ptr, v_head_stride, out_ptr, cos, sin, inverse, most,
    COPY_V: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_DIM: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """All heads of one token; the largest magnitude of them."""
    most = _turn(
        q_ptr, q_head_stride, out_ptr, cos, sin, inverse, most,
        NUM_HEADS, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_HEADS, BLOCK_REST, PASS,
    )  # fmt: skip
    most = _turn(
        k_ptr, k_head_stride, out_ptr + NUM_HEADS * HEAD_DIM, cos, sin, inverse, most,
        NUM_KV_HEADS, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_HEADS, BLOCK_REST, PASS,
    )  # fmt: skip
    if COPY_V:
        most = copy_all_heads(
            v_ptr, v_head_stride, out_ptr + (NUM_HEADS + NUM_KV_HEADS) * HEAD_DIM, NUM_KV_HEADS, inverse, most,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_HEADS, BLOCK_DIM, PASS,
        )  # fmt: skip
    return most


@triton.jit(do_not_specialize=["num_positions"])
def _rotary_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, scale_ptr, cos_ptr, sin_ptr, position_ptr,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, out_stride, position_stride,
    num_positions,
    CONJUGATE: tl.constexpr, COPY_V: tl.constexpr,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_DIM: tl.constexpr,
    NEED_CODES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + token * position_stride)
    cos, sin = angles_of(position, cos_ptr, sin_ptr, num_positions, HALF, BLOCK_HALF)
    if CONJUGATE:
        sin = -sin
    q_ptr += token * q_stride
    k_ptr += token * k_stride
    if COPY_V:
        v_ptr += token * v_stride
    out_ptr += token * out_stride
    most = tl.full((), 0, tl.int32)
    inverse = tl.full((), 1.0, tl.float32)
    if NEED_CODES:
        most = _turn_token(
            q_ptr, q_head_stride, k_ptr, k_head_stride, v_ptr, v_head_stride, out_ptr, cos, sin, inverse, most, COPY_V,
            NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_HEADS, BLOCK_REST, BLOCK_DIM, MEASURE,
        )  # fmt: skip
        scale, inverse = power_of_two(most)
        tl.store(scale_ptr + token, scale)
    _turn_token(
        q_ptr, q_head_stride, k_ptr, k_head_stride, v_ptr, v_head_stride, out_ptr, cos, sin, inverse, most, COPY_V,
        NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_HEADS, BLOCK_REST, BLOCK_DIM,
        CODES if NEED_CODES else PLAIN,
    )  # fmt: skip


def rotary_forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, num_heads: int, num_kv_heads: int, head_dim: int
) -> Tensor:
    q, k = query_and_key(qkv, num_heads, num_kv_heads, head_dim)
    shape = (len(qkv), num_heads + num_kv_heads, head_dim)
    rotated = torch.empty(shape, dtype=qkv.dtype, device=qkv.device)
    _rotate(rotated, q, k, None, cos, sin, position_ids)
    return rotated


def rotary_forward_(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    q, k = query_and_key(qkv, num_heads, num_kv_heads, head_dim)
    if writable_rows(qkv):
        _rotate(qkv, q, k, None, cos, sin, position_ids, in_place=True)
        overwritten(qkv)
    else:
        # Nothing to gain here: q and k are turned elsewhere and brought back, or PyTorch refuses.
        rotated = rotary_forward(qkv, cos, sin, position_ids, num_heads, num_kv_heads, head_dim)
        q.copy_(rotated[:, :num_heads])
        k.copy_(rotated[:, num_heads:])


def rotary_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
    num_tokens, num_heads, head_dim = dq.shape
    dqkv = dq.new_empty(num_tokens, (num_heads + 2 * dk.shape[1]) * head_dim)
    _rotate(dqkv, dq, dk, dv, cos, sin, position_ids, conjugate=True)
    return dqkv


def rotary_backward_e4m3(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor
) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads, head_dim = dq.shape
    codes, scales = empty_codes(dq, num_tokens, (num_heads + 2 * dk.shape[1]) * head_dim)
    _rotate(codes, dq, dk, dv, cos, sin, position_ids, scales=scales, conjugate=True)
    return finished(codes), scales


def _rotate(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor | None, cos: Tensor, sin: Tensor, position_ids: Tensor,
    *, scales: Tensor | None = None, conjugate: bool = False, in_place: bool = False,
) -> None:  # fmt: skip
    """Turn ``q`` and ``k`` ``[T, heads, D]`` into ``out``, whose tokens lie ``out.stride(0)`` apart, and copy ``v``; as
    codes where there are ``scales``."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, half = k.shape[1], cos.shape[-1]
    kv_shape = (num_tokens, num_kv_heads, head_dim)
    expect(k=(k, kv_shape), v=(v, kv_shape), sin=(sin, cos.shape), position_ids=(position_ids, (num_tokens,)))
    rest = head_dim - 2 * half
    if rest < 0:
        raise ValueError(f"cos turns {2 * half} dimensions, a head has {head_dim}")
    q, k, v = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    launch(
        _rotary_kernel, (num_tokens,),
        q, k, v, out, scales, cos.contiguous(), sin.contiguous(), position_ids,
        *q.stride()[:2], *k.stride()[:2], *(v.stride()[:2] if v is not None else (0, 0)),
        out.stride(0), position_ids.stride(0), len(cos),
        CONJUGATE=conjugate, COPY_V=v is not None,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, HALF=half,
        BLOCK_REST=0 if in_place or not rest else triton.next_power_of_2(rest),
        BLOCK_DIM=triton.next_power_of_2(head_dim), NEED_CODES=scales is not None, **CONFIG.cut(half),
    )  # fmt: skip


def query_and_key(qkv: Tensor, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Views of ``qkv``: q ``[T, N, D]``, k ``[T, K, D]``."""
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, head_dim))
    return heads[:, :num_heads], heads[:, num_heads : num_heads + num_kv_heads]
