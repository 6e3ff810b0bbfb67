"""An RMSNorm on each head of q and k and the rotation behind it, in Triton, one launch each way.

A program takes all heads of one token. Forward reads the raw q and k once and writes them normed and rotated once;
backward reads the gradients and the raw q and k once and writes the packed gradient once. Made of the norm's and the
rotation's own kernels that would be two reads and two writes an element forward, and seven of either backward. The
root mean square is taken anew in backward, from a head that is in registers anyway. Between norm and rotation nothing
is rounded.

Where the weights train, few programs walk over many tokens each, as in the norm's kernel (rms_norm.py). For codes of
the packed gradient a program goes over its token twice, as in the rotation's (rotary.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .e4m3 import CODES, MEASURE, PLAIN, emit, empty_codes, finished, power_of_two
from .launch import expect, launch
from .rms_norm import sum_rows, summing_programs
from .rotary import CONFIG, angles_of, copy_all_heads, query_and_key

SUMMING_WARPS = 12
"""On one multiprocessor, where the weights train: three programs of 4 warps, for which there are registers (161 a
thread)."""


@triton.jit
def _halves(ptr, columns, mask, HALF: tl.constexpr):
    """Both halves of what begins at ``ptr``, in fp32."""
    first = tl.load(ptr + columns, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(ptr + HALF + columns, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _normed(ptr, columns, mask, eps, HEAD_DIM: tl.constexpr, HALF: tl.constexpr):
    """Both halves of heads over their root mean square, 0 where there is none, and one over that."""
    x1, x2 = _halves(ptr, columns, mask, HALF)
    square = tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)
    rstd = tl.rsqrt(square / HEAD_DIM + tl.full((), eps, tl.float32))[:, None]
    # With an eps of 0 a row of zeros is 0 · inf.
    return tl.where(mask, x1 * rstd, 0.0), tl.where(mask, x2 * rstd, 0.0), rstd


@triton.jit
def _norm_and_turn(
    in_ptr, in_head_stride, weight_ptr, out_ptr, cos, sin, eps,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    """The heads of one token; in ``out`` they lie one behind the other."""
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    dtype = out_ptr.dtype.element_ty
    weight1, weight2 = _halves(weight_ptr, columns, columns < HALF, HALF)
    for start in range(0, NUM_HEADS, BLOCK_HEADS):
        heads = (start + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
        mask = (heads < NUM_HEADS) & (columns < HALF)
        x1, x2, _ = _normed(in_ptr + heads * in_head_stride, columns, mask, eps, HEAD_DIM, HALF)
        z1 = x1 * weight1
        z2 = x2 * weight2
        target = out_ptr + heads * HEAD_DIM + columns
        tl.store(target, (z1 * cos - z2 * sin).to(dtype), mask=mask)
        tl.store(target + HALF, (z2 * cos + z1 * sin).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["num_positions"])
def _qk_norm_rotary_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, out_ptr, cos_ptr, sin_ptr, position_ptr,
    q_stride, q_head_stride, k_stride, k_head_stride, position_stride, num_positions, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + token * position_stride)
    cos, sin = angles_of(position, cos_ptr, sin_ptr, num_positions, HALF, BLOCK_HALF)
    out_ptr += token * (NUM_HEADS + NUM_KV_HEADS) * HEAD_DIM
    _norm_and_turn(
        q_ptr + token * q_stride, q_head_stride, q_weight_ptr, out_ptr, cos, sin, eps,
        NUM_HEADS, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_HEADS,
    )  # fmt: skip
    _norm_and_turn(
        k_ptr + token * k_stride, k_head_stride, k_weight_ptr, out_ptr + NUM_HEADS * HEAD_DIM, cos, sin, eps,
        NUM_KV_HEADS, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_HEADS,
    )  # fmt: skip


@triton.jit
def _gradients(
    d_ptr, d_head_stride, x_ptr, x_head_stride, weight_ptr, out_ptr, cos, sin, eps, active, inverse, most,
    dweight1, dweight2,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, NEED_DWEIGHT: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """Of the heads of one token, where it is one; and the largest magnitude and the sums so far."""
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    weight1, weight2 = _halves(weight_ptr, columns, columns < HALF, HALF)
    for start in range(0, NUM_HEADS, BLOCK_HEADS):
        heads = (start + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
        mask = (heads < tl.where(active, NUM_HEADS, 0)) & (columns < HALF)
        x1, x2, rstd = _normed(x_ptr + heads * x_head_stride, columns, mask, eps, HEAD_DIM, HALF)
        y1, y2 = _halves(d_ptr + heads * d_head_stride, columns, mask, HALF)
        # The opposite rotation. Beyond HALF cos and sin are NaN.
        dz1 = tl.where(mask, y1 * cos + y2 * sin, 0.0)
        dz2 = tl.where(mask, y2 * cos - y1 * sin, 0.0)
        if NEED_DWEIGHT:
            dweight1 += dz1 * x1
            dweight2 += dz2 * x2
        g1 = dz1 * weight1
        g2 = dz2 * weight2
        projection = tl.sum(g1 * x1, axis=1) + tl.sum(g2 * x2, axis=1)
        projection = (projection / HEAD_DIM)[:, None]
        target = out_ptr + heads * HEAD_DIM + columns
        most = emit(target, (g1 - x1 * projection) * rstd, mask, inverse, most, PASS)
        most = emit(target + HALF, (g2 - x2 * projection) * rstd, mask, inverse, most, PASS)
    return most, dweight1, dweight2


@triton.jit
def _token_gradients(
    dq_ptr, dq_head_stride, dk_ptr, dk_head_stride, dv_ptr, dv_head_stride, q_ptr, q_head_stride, k_ptr, k_head_stride,
    q_weight_ptr, k_weight_ptr, out_ptr, cos, sin, eps, active, inverse, most, q_sum1, q_sum2, k_sum1, k_sum2,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr,
    PASS: tl.constexpr,
):  # fmt: skip
    most, q_sum1, q_sum2 = _gradients(
        dq_ptr, dq_head_stride, q_ptr, q_head_stride, q_weight_ptr,
        out_ptr, cos, sin, eps, active, inverse, most, q_sum1, q_sum2,
        NUM_HEADS, HEAD_DIM, HALF, NEED_DWEIGHT, BLOCK_HALF, BLOCK_HEADS, PASS,
    )  # fmt: skip
    out_ptr += NUM_HEADS * HEAD_DIM
    most, k_sum1, k_sum2 = _gradients(
        dk_ptr, dk_head_stride, k_ptr, k_head_stride, k_weight_ptr,
        out_ptr, cos, sin, eps, active, inverse, most, k_sum1, k_sum2,
        NUM_KV_HEADS, HEAD_DIM, HALF, NEED_DWEIGHT, BLOCK_HALF, BLOCK_HEADS, PASS,
    )  # fmt: skip
    most = copy_all_heads(
        dv_ptr, dv_head_stride, out_ptr + NUM_KV_HEADS * HEAD_DIM, tl.where(active, NUM_KV_HEADS, 0), inverse, most,
        NUM_KV_HEADS, HEAD_DIM, BLOCK_HEADS, BLOCK_DIM, PASS,
    )  # fmt: skip
    return most, q_sum1, q_sum2, k_sum1, k_sum2


@triton.jit
def _store_sums(
    partial_ptr, dweight1, dweight2,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_HALF)
    tl.store(partial_ptr + columns, tl.sum(dweight1, axis=0), mask=columns < HALF)
    tl.store(partial_ptr + HALF + columns, tl.sum(dweight2, axis=0), mask=columns < HALF)


@triton.jit(do_not_specialize=["num_tokens", "num_positions"])
def _qk_norm_rotary_backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, out_ptr, partial_ptr, scale_ptr,
    cos_ptr, sin_ptr, position_ptr,
    dq_stride, dq_head_stride, dk_stride, dk_head_stride, dv_stride, dv_head_stride,
    q_stride, q_head_stride, k_stride, k_head_stride, position_stride, num_tokens, num_positions, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr, NEED_CODES: tl.constexpr, TURNS: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    PASS: tl.constexpr = CODES if NEED_CODES else PLAIN
    q_sum1 = tl.zeros((BLOCK_HEADS, BLOCK_HALF), dtype=tl.float32)
    q_sum2 = tl.zeros((BLOCK_HEADS, BLOCK_HALF), dtype=tl.float32)
    k_sum1 = tl.zeros((BLOCK_HEADS, BLOCK_HALF), dtype=tl.float32)
    k_sum2 = tl.zeros((BLOCK_HEADS, BLOCK_HALF), dtype=tl.float32)
    # TURNS is 1 where the weights are frozen: known to the compiler, so that no loop is left.
    for turn in range(0, TURNS):
        token = turn * tl.num_programs(0).to(tl.int64) + tl.program_id(0)
        active = token < num_tokens
        position = tl.load(position_ptr + tl.minimum(token, num_tokens - 1) * position_stride)
        cos, sin = angles_of(position, cos_ptr, sin_ptr, num_positions, HALF, BLOCK_HALF)
        out = out_ptr + token * (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
        dq = dq_ptr + token * dq_stride
        dk = dk_ptr + token * dk_stride
        dv = dv_ptr + token * dv_stride
        q = q_ptr + token * q_stride
        k = k_ptr + token * k_stride
        most = tl.full((), 0, tl.int32)
        inverse = tl.full((), 1.0, tl.float32)
        if NEED_CODES:
            most, _, _, _, _ = _token_gradients(
                dq, dq_head_stride, dk, dk_head_stride, dv, dv_head_stride, q, q_head_stride, k, k_head_stride,
                q_weight_ptr, k_weight_ptr, out, cos, sin, eps, active, inverse, most, q_sum1, q_sum2, k_sum1, k_sum2,
                NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HALF, NEED_DWEIGHT, BLOCK_HALF, BLOCK_HEADS, BLOCK_DIM, MEASURE,
            )  # fmt: skip
            scale, inverse = power_of_two(most)
            tl.store(scale_ptr + token, scale)
        _, q_sum1, q_sum2, k_sum1, k_sum2 = _token_gradients(
            dq, dq_head_stride, dk, dk_head_stride, dv, dv_head_stride, q, q_head_stride, k, k_head_stride,
            q_weight_ptr, k_weight_ptr, out, cos, sin, eps, active, inverse, most, q_sum1, q_sum2, k_sum1, k_sum2,
            NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HALF, NEED_DWEIGHT, BLOCK_HALF, BLOCK_HEADS, BLOCK_DIM, PASS,
        )  # fmt: skip
    if NEED_DWEIGHT:
        partial = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * HEAD_DIM
        _store_sums(partial, q_sum1, q_sum2, HEAD_DIM, HALF, BLOCK_HALF)
        _store_sums(partial + HEAD_DIM, k_sum1, k_sum2, HEAD_DIM, HALF, BLOCK_HALF)


def qk_norm_rotary_forward(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor, position_ids: Tensor,
    num_heads: int, num_kv_heads: int, head_dim: int,
) -> Tensor:  # fmt: skip
    q, k = query_and_key(_dense(qkv), num_heads, num_kv_heads, head_dim)
    out = torch.empty(len(qkv), num_heads + num_kv_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    launch(
        _qk_norm_rotary_kernel, (len(qkv),),
        q, k, q_weight.contiguous(), k_weight.contiguous(), out, cos.contiguous(), sin.contiguous(), position_ids,
        *q.stride()[:2], *k.stride()[:2], position_ids.stride(0), len(cos), eps,
        **_options(q, k, q_weight, k_weight, cos, sin, position_ids),
    )  # fmt: skip
    return out


def qk_norm_rotary_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float,
    cos: Tensor, sin: Tensor, position_ids: Tensor, *, need_dweight: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    partial = _backward_into(
        dqkv, None, dq, dk, dv, qkv, q_weight, k_weight, eps, cos, sin, position_ids, need_dweight=need_dweight
    )
    return dqkv, None if partial is None else sum_rows(partial).view(2, -1)


def qk_norm_rotary_backward_e4m3(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float,
    cos: Tensor, sin: Tensor, position_ids: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    codes, scales = empty_codes(qkv, *qkv.shape)
    _backward_into(codes, scales, dq, dk, dv, qkv, q_weight, k_weight, eps, cos, sin, position_ids, need_dweight=False)
    return finished(codes), scales


def _backward_into(
    out: Tensor, scales: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor,
    k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor, position_ids: Tensor, *, need_dweight: bool,
) -> Tensor | None:  # fmt: skip
    """Write the gradient, or with ``scales`` its codes; the sums of the weights' gradients, one row a program."""
    num_tokens, num_heads, head_dim = dq.shape
    num_kv_heads = dk.shape[1]
    q, k = query_and_key(_dense(qkv), num_heads, num_kv_heads, head_dim)
    expect(dq=(dq, q.shape), dk=(dk, k.shape), dv=(dv, k.shape))
    dq, dk, dv = map(_dense, (dq, dk, dv))
    options = _options(q, k, q_weight, k_weight, cos, sin, position_ids)
    programs, partial = num_tokens, None
    if need_dweight:
        programs = min(num_tokens, summing_programs(qkv.device, options["num_warps"], SUMMING_WARPS))
        partial = torch.empty(programs, 2 * head_dim, dtype=torch.float32, device=qkv.device)
    launch(
        _qk_norm_rotary_backward_kernel, (programs,),
        dq, dk, dv, q, k, q_weight.contiguous(), k_weight.contiguous(), out, partial, scales,
        cos.contiguous(), sin.contiguous(), position_ids,
        *dq.stride()[:2], *dk.stride()[:2], *dv.stride()[:2], *q.stride()[:2], *k.stride()[:2],
        position_ids.stride(0), num_tokens, len(cos), eps,
        NEED_DWEIGHT=need_dweight, NEED_CODES=scales is not None, TURNS=triton.cdiv(num_tokens, max(1, programs)),
        BLOCK_DIM=triton.next_power_of_2(head_dim), **options,
    )  # fmt: skip
    return partial


def _options(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor
) -> dict[str, int]:
    """Of a launch; the arguments are what they must be, or a ValueError says which is not."""
    num_tokens, num_heads, head_dim = q.shape
    half = head_dim // 2
    expect(
        q_weight=(q_weight, (head_dim,)), k_weight=(k_weight, (head_dim,)),
        cos=(cos, (len(cos), half)), sin=(sin, cos.shape), position_ids=(position_ids, (num_tokens,)),
    )  # fmt: skip
    sizes = {"NUM_HEADS": num_heads, "NUM_KV_HEADS": k.shape[1], "HEAD_DIM": head_dim, "HALF": half}
    return sizes | CONFIG.cut(half)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
