"""One decoder block, its forward and its backward written out by hand.

    x ── input_layernorm ── qkv_proj ── (qk norm) ── rotary ── attention ── o_proj ──┐
    └─────────────────────────────────────────────────────────────────────────────── + ── s
    s ── post_attention_layernorm ── gate_up_proj ── SwiGLU ── down_proj ─┐
    └──────────────────────────────────────────────────────────────────── + ── y

Weights are packed: q, k and v in one matrix, gate and up in another, so that a block is four products. A block is of
one of three classes, set by where it lies and whether it trains:

    prefix    below the first trained block: runs without a graph, keeps nothing
    frozen    above it: the gradient passes through, no weight gets one
    trained   its float32 weights are Parameters; products run on a narrow copy (the shadow) that is refreshed after
              each optimizer step, and every gradient stays float32

Between forward and backward a frozen and a trained block keep the same: x, q, k, v, o, lse, s, gate and up, and one
number a token for each of the two layer norms; `cost.kept_bytes` is the sum. The normed rows and the SwiGLU product,
which the weights' gradients need, are made again elementwise; so are q and k where they are normed, and then what is
kept of them is raw. Backward writes d(gate, up) over (gate, up), so it runs once.

The weight of an RMSNorm gets its gradient from the projection behind it (`linear_dscale`). So the lowest trained block,
whose input needs no gradient, makes no product for one, and no block sums over tokens for a layer norm.

A new block starts as an identity because `o_proj` and `down_proj` are zero (paper, section 3.2): both branches add 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llama_pro_fast.batch import PackedBatch
from llama_pro_fast.families import BlockSpec
from llama_pro_kernels import (
    add_rms_norm_forward,
    attention_backward,
    attention_forward,
    linear,
    linear_dbias,
    linear_dscale,
    linear_dw,
    linear_dx,
    qk_norm_rotary_backward,
    qk_norm_rotary_forward,
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
    rotary_backward,
    rotary_forward_,
    swiglu_backward_,
    swiglu_forward,
)
from llama_pro_kernels.library import Consumed


class BlockClass(Enum):
    """What backward asks of a block."""

    PREFIX = "prefix"
    FROZEN = "frozen"
    TRAINED = "trained"


@dataclass(frozen=True)
class BlockContext:
    """What every block of a forward pass shares: the batch's layout, the rotary tables, the attention backend.

    Attributes:
        position_ids: ``[T]`` int64.
        cu_seqlens: ``[C]`` int32.
        max_seqlen: constant over a run.
        cos, sin: ``[positions, D/2]`` float32.
        attention: name of the attention backend.
    """

    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    cos: Tensor
    sin: Tensor
    attention: str

    @classmethod
    def for_batch(cls, batch: PackedBatch, *, rotary_tables: tuple[Tensor, Tensor], attention: str) -> BlockContext:
        cos, sin = rotary_tables
        return cls(batch.position_ids, batch.cu_seqlens, batch.max_seqlen, cos, sin, attention)

    @property
    def rotation(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.cos, self.sin, self.position_ids

    def attention_arguments(self, spec: BlockSpec) -> tuple[tuple[Tensor, int], dict[str, Any]]:
        """What a block's attention takes behind its tensors; a window as long as every document is none."""
        window = spec.window if spec.window is not None and spec.window < self.max_seqlen else None
        options = {"scale": spec.head_dim**-0.5, "window": window, "backend": self.attention}
        return (self.cu_seqlens, self.max_seqlen), options


class Weights(NamedTuple):
    """A block's weights, or what belongs to them one by one: shadows, gradients. None where there is none."""

    input_layernorm: Tensor | None = None
    qkv_proj: Tensor | None = None
    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    o_proj: Tensor | None = None
    o_bias: Tensor | None = None
    post_attention_layernorm: Tensor | None = None
    gate_up_proj: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_proj: Tensor | None = None
    down_bias: Tensor | None = None


class _DecoderBlock(torch.autograd.Function):
    """``(x [T, H], …) -> y [T, H]``. A weight is a master, possibly wider than x, with or without a shadow."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, spec: BlockSpec, context: BlockContext, shadows: Weights, *masters: Tensor | None
    ) -> Tensor:
        w = Weights(*(m if shadow is None else shadow for m, shadow in zip(masters, shadows, strict=True)))
        lengths, options = context.attention_arguments(spec)

        normed, rstd = rms_norm_forward(x, w.input_layernorm, spec.norm_eps)
        qkv = _linear(normed, w.qkv_proj, w.qkv_bias)
        if spec.qk_norm:
            q, k, v = _qk_norm(qkv, w, spec, context)[:3]
        else:
            q, k, v = rotary_forward_(qkv, *context.rotation, spec.num_heads, spec.num_kv_heads, spec.head_dim)
        o, lse = attention_forward(q, k, v, *lengths, **options)
        branch = _linear(o.flatten(1), w.o_proj, w.o_bias)

        normed, s, post_rstd = add_rms_norm_forward(branch, x, w.post_attention_layernorm, spec.norm_eps)
        gate_up = _linear(normed, w.gate_up_proj, w.gate_up_bias)
        y = _linear(swiglu_forward(gate_up), w.down_proj, w.down_bias).add_(s)

        ctx.save_for_backward(x, rstd, qkv, o, lse, s, post_rstd, gate_up, *w)
        ctx.spec, ctx.context, ctx.consumed = spec, context, Consumed("decoder block")
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ctx.consumed.once()
        spec, context = ctx.spec, ctx.context
        x, rstd, qkv, o, lse, s, post_rstd, gate_up, *weights = ctx.saved_tensors
        w = Weights(*weights)
        need_dx, _, _, _, *need_dweight = ctx.needs_input_grad
        trained = any(need_dweight)
        lengths, options = context.attention_arguments(spec)
        dw: dict[str, Tensor | None] = {}

        # y = s + down_proj(SwiGLU(gate_up)),  gate_up = gate_up_proj(post_attention_layernorm(s))
        dproduct = linear_dx(dy, w.down_proj.to(dy.dtype))
        dgate_up, product = swiglu_backward_(dproduct, gate_up, need_product=trained)
        gate_up_proj = w.gate_up_proj.to(dy.dtype)
        if trained:
            dw["down_proj"], dw["down_bias"] = linear_dw(dy, product), _dbias(dy, w.down_bias)
            dw["gate_up_proj"], dw["gate_up_bias"], dw["post_attention_layernorm"] = _norm_linear_dw(
                dgate_up, s, w.post_attention_layernorm, gate_up_proj, w.gate_up_bias, spec
            )
        del dproduct, product
        dnormed = linear_dx(dgate_up, gate_up_proj)
        ds, _ = rms_norm_backward(
            dnormed, s, w.post_attention_layernorm, post_rstd, dresidual=dy, need_dweight=False
        )  # fmt: skip
        del dnormed, gate_up_proj

        # s = x + o_proj(o),  o = attention(rotary(qkv_proj(input_layernorm(x))))
        do = linear_dx(ds, w.o_proj.to(dy.dtype)).view(o.shape)
        if spec.qk_norm:
            q, k, v, *qk_rstd = _qk_norm(qkv, w, spec, context)
        else:
            heads = qkv.view(len(qkv), spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
            q, k, v = heads.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
        dq, dk, dv = attention_backward(do, q, k, v, o, lse, *lengths, **options)
        if spec.qk_norm:
            dqkv, dw["q_norm"], dw["k_norm"] = qk_norm_rotary_backward(
                dq, dk, dv, qkv, w.q_norm, w.k_norm, *qk_rstd, *context.rotation, need_dweight=trained
            )
        else:
            dqkv = rotary_backward(dq, dk, dv, *context.rotation)
        del do, q, k, v, dq, dk, dv
        qkv_proj = w.qkv_proj.to(dy.dtype)
        if trained:
            dw["o_proj"], dw["o_bias"] = linear_dw(ds, o.flatten(1)), _dbias(ds, w.o_bias)
            dw["qkv_proj"], dw["qkv_bias"], dw["input_layernorm"] = _norm_linear_dw(
                dqkv, x, w.input_layernorm, qkv_proj, w.qkv_bias, spec
            )
        dx = None
        if need_dx:
            dnormed = linear_dx(dqkv, qkv_proj)
            dx, _ = rms_norm_backward(dnormed, x, w.input_layernorm, rstd, dresidual=ds, need_dweight=False)
        return dx, None, None, None, *Weights(**dw)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _dbias(dy: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else linear_dbias(dy)


def _qk_norm(qkv: Tensor, w: Weights, spec: BlockSpec, context: BlockContext) -> tuple[Tensor, ...]:
    """``(q, k, v, q_rstd, k_rstd)``, made in forward and once more in backward."""
    sizes = spec.num_heads, spec.num_kv_heads, spec.head_dim
    return qk_norm_rotary_forward(qkv, w.q_norm, w.k_norm, spec.norm_eps, *context.rotation, *sizes)


def _norm_linear_dw(
    dz: Tensor, x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None, spec: BlockSpec
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients ``(dweight, dbias, dnorm)`` of ``z = RMSNorm(x) weightᵀ + bias``.

    The norm's weight is divided by, so elements below 1e-19 (in float32) are taken for 1e-19 here. Their own gradient
    is exact all the same; their column of dweight is off by at most 1e-19 · Σ |dz · x̂|, too little for a weight.
    """
    least = torch.finfo(norm.dtype).tiny ** 0.5
    norm = torch.where(norm.abs() < least, least, norm)
    normed, _ = rms_norm_forward(x, norm, spec.norm_eps)
    dweight = linear_dw(dz, normed)
    return dweight, _dbias(dz, bias), linear_dscale(weight, dweight, norm)


class Linear(nn.Module):
    """A weight ``[out, in]``, perhaps a bias, and while it trains in a wider dtype than it computes in, a shadow.

    With ``shadow`` set to None, as where the master is sharded, it is narrowed in forward and once more in backward.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, trained: bool, compute_dtype: torch.dtype):
        super().__init__()
        self.weight = parameter(weight, trained=trained, compute_dtype=compute_dtype)
        self.bias = None if bias is None else parameter(bias, trained=trained, compute_dtype=compute_dtype)
        needs_shadow = self.weight.dtype != compute_dtype
        self.register_buffer("shadow", self.weight.detach().to(compute_dtype) if needs_shadow else None, False)


class RMSNorm(nn.Module):
    """The weight ``[H]`` of an RMSNorm; the op computes in float32, so it needs no shadow."""

    def __init__(self, weight: Tensor, eps: float, *, trained: bool, compute_dtype: torch.dtype):
        super().__init__()
        self.weight = parameter(weight, trained=trained, compute_dtype=compute_dtype)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Block(nn.Module):
    """A decoder block.

    Args:
        spec: its shape.
        tensors: our parameter names (:meth:`BlockSpec.tensors`) -> packed tensors of any float dtype.
        block_class: prefix, frozen or trained.
        compute_dtype: of the activations and of frozen weights. A trained block wants the exponents of float32 (bf16,
            fp32, fp64): float16 loses small gradients. Autocast is not for it.
    """

    def __init__(
        self, spec: BlockSpec, tensors: dict[str, Tensor], *, block_class: BlockClass, compute_dtype: torch.dtype
    ) -> None:
        super().__init__()
        trained = block_class is BlockClass.TRAINED
        assert not (trained and compute_dtype == torch.float16), "a trained block does not compute in float16"
        self.spec = spec
        self.block_class = block_class
        how = {"trained": trained, "compute_dtype": compute_dtype}
        for name in ("input_layernorm", "q_norm", "k_norm", "post_attention_layernorm"):
            weight = tensors.get(f"{name}.weight")
            setattr(self, name, None if weight is None else RMSNorm(weight, spec.norm_eps, **how))
        for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            setattr(self, name, Linear(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), **how))

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """``[T, H]`` -> ``[T, H]``, in the dtype of ``x``."""
        masters = Weights(
            input_layernorm=self.input_layernorm.weight,
            qkv_proj=self.qkv_proj.weight,
            qkv_bias=self.qkv_proj.bias,
            q_norm=self.q_norm and self.q_norm.weight,
            k_norm=self.k_norm and self.k_norm.weight,
            o_proj=self.o_proj.weight,
            o_bias=self.o_proj.bias,
            post_attention_layernorm=self.post_attention_layernorm.weight,
            gate_up_proj=self.gate_up_proj.weight,
            gate_up_bias=self.gate_up_proj.bias,
            down_proj=self.down_proj.weight,
            down_bias=self.down_proj.bias,
        )
        shadows = Weights(
            qkv_proj=self.qkv_proj.shadow,
            o_proj=self.o_proj.shadow,
            gate_up_proj=self.gate_up_proj.shadow,
            down_proj=self.down_proj.shadow,
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.block_class is not BlockClass.PREFIX):
            return _DecoderBlock.apply(x, self.spec, context, shadows, *masters)


def parameter(tensor: Tensor, *, trained: bool, compute_dtype: torch.dtype) -> nn.Parameter:
    """A trained tensor is its float32 master (float64 under a float64 computation), a frozen one the only copy."""
    dtype = torch.promote_types(compute_dtype, torch.float32) if trained else compute_dtype
    return nn.Parameter(tensor.detach().to(dtype), requires_grad=trained)


@torch.no_grad()
def refresh_shadows(module: nn.Module) -> None:
    """Bring the narrow copies in line with their masters; once after each optimizer step."""
    pairs = [(m.shadow, m.weight) for m in module.modules() if getattr(m, "shadow", None) is not None]
    if pairs:
        torch._foreach_copy_([shadow for shadow, _ in pairs], [weight for _, weight in pairs])
