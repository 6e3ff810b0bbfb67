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
              each optimizer step, or made for each product where nothing is kept; every gradient stays float32

Between forward and backward a frozen and a trained block keep the same: x, q, k, v, o, lse, s, gate and up, and one
number a token for each of the two layer norms; `cost.kept_bytes` is the sum. The normed rows and the SwiGLU product,
which the weights' gradients need, are made again elementwise; so are q and k where they are normed, and then what is
kept of them is raw. Backward writes d(gate, up) over (gate, up), so it runs once.

Where that does not fit, a block keeps less (`Recompute`) and backward makes the rest again, by the code and in the
order of forward, so that no bit of a gradient changes. down_proj is never made again: nothing in backward reads its
output.

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


class Recompute(Enum):
    """What a block makes again in backward instead of keeping it."""

    NONE = "none"
    MLP = "mlp"
    ATTENTION = "attention"
    BLOCK = "block"

    @property
    def kept(self) -> tuple[str, ...]:
        """The fields of :class:`Activations` that live from forward to backward."""
        return _KEPT[self]


class Activations(NamedTuple):
    """What backward reads of forward; None where it is not there (yet).

    Attributes:
        x: ``[T, H]``, the block's input.
        rstd, post_rstd: ``[T]`` in the compute dtype, of the two layer norms.
        qkv: ``[T, (N + 2K)·D]``, rotated; raw where a norm on q and k stands before the rotation.
        o: ``[T, N, D]``, attention's output.
        lse: ``[N, T]`` in the compute dtype.
        s: ``[T, H]``, the sum between the two branches.
        gate_up: ``[T, 2I]``.
    """

    x: Tensor | None = None
    rstd: Tensor | None = None
    qkv: Tensor | None = None
    o: Tensor | None = None
    lse: Tensor | None = None
    s: Tensor | None = None
    post_rstd: Tensor | None = None
    gate_up: Tensor | None = None


_KEPT = {
    Recompute.NONE: Activations._fields,
    Recompute.MLP: ("x", "rstd", "qkv", "o", "lse", "s", "post_rstd"),
    Recompute.ATTENTION: ("x", "o", "lse"),  # its products are replayed, its quadratic part is not
    Recompute.BLOCK: ("x",),
}


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
        ctx: Any,
        x: Tensor,
        spec: BlockSpec,
        context: BlockContext,
        recompute: Recompute,
        shadows: Weights,
        *masters: Tensor | None,
    ) -> Tensor:
        w = Weights(*(m if shadow is None else shadow for m, shadow in zip(masters, shadows, strict=True)))
        a = _attention_branch(Activations(x=x), w, spec, context)
        a = _mlp_branch(a, w, spec)
        y = _linear(swiglu_forward(a.gate_up), w.down_proj, w.down_bias).add_(a.s)
        kept = (value if name in recompute.kept else None for name, value in a._asdict().items())
        ctx.save_for_backward(*kept, *w)
        ctx.spec, ctx.context, ctx.consumed = spec, context, Consumed("decoder block")
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ctx.consumed.once()
        spec, context, saved = ctx.spec, ctx.context, ctx.saved_tensors
        a, w = Activations(*saved[: len(Activations._fields)]), Weights(*saved[len(Activations._fields) :])
        del saved
        need_dx, _, _, _, _, *need_dweight = ctx.needs_input_grad
        trained = any(need_dweight)
        lengths, options = context.attention_arguments(spec)
        dw: dict[str, Tensor | None] = {}

        # y = s + down_proj(SwiGLU(gate_up)),  gate_up = gate_up_proj(post_attention_layernorm(s))
        if a.o is None:
            a = _attention_branch(a, w, spec, context)
        a = _mlp_branch(a, w, spec)
        dproduct = linear_dx(dy, w.down_proj.to(dy.dtype))
        dgate_up, product = swiglu_backward_(dproduct, a.gate_up, need_product=trained)
        a = a._replace(gate_up=None)
        if trained:
            dw["down_proj"], dw["down_bias"] = linear_dw(dy, product), _dbias(dy, w.down_bias)
        del dproduct, product
        gate_up_proj = w.gate_up_proj.to(dy.dtype)
        if trained:
            dw["gate_up_proj"], dw["gate_up_bias"], dw["post_attention_layernorm"] = _norm_linear_dw(
                dgate_up, a.s, w.post_attention_layernorm, gate_up_proj, w.gate_up_bias, spec
            )
        dnormed = linear_dx(dgate_up, gate_up_proj)
        ds, _ = rms_norm_backward(
            dnormed, a.s, w.post_attention_layernorm, a.post_rstd, dresidual=dy, need_dweight=False
        )  # fmt: skip
        del dnormed, dgate_up, gate_up_proj

        # s = x + o_proj(o),  o = attention(rotary(qkv_proj(input_layernorm(x))))
        a = _attention_branch(a._replace(s=None), w, spec, context)
        do = linear_dx(ds, w.o_proj.to(dy.dtype)).view(a.o.shape)
        q, k, v, *qk_rstd = _heads(a.qkv, w, spec, context)
        dq, dk, dv = attention_backward(do, q, k, v, a.o, a.lse, *lengths, **options)
        del do, q, k, v
        if spec.qk_norm:
            dqkv, dw["q_norm"], dw["k_norm"] = qk_norm_rotary_backward(
                dq, dk, dv, a.qkv, w.q_norm, w.k_norm, *qk_rstd, *context.rotation, need_dweight=trained
            )
        else:
            dqkv = rotary_backward(dq, dk, dv, *context.rotation)
        del dq, dk, dv
        a = a._replace(qkv=None)
        qkv_proj = w.qkv_proj.to(dy.dtype)
        if trained:
            dw["o_proj"], dw["o_bias"] = linear_dw(ds, a.o.flatten(1)), _dbias(ds, w.o_bias)
            dw["qkv_proj"], dw["qkv_bias"], dw["input_layernorm"] = _norm_linear_dw(
                dqkv, a.x, w.input_layernorm, qkv_proj, w.qkv_bias, spec
            )
        dx = None
        if need_dx:
            dnormed = linear_dx(dqkv, qkv_proj)
            dx, _ = rms_norm_backward(dnormed, a.x, w.input_layernorm, a.rstd, dresidual=ds, need_dweight=False)
        return dx, None, None, None, None, *Weights(**dw)


def _attention_branch(a: Activations, w: Weights, spec: BlockSpec, context: BlockContext) -> Activations:
    """With ``rstd``, ``qkv``, ``o`` and ``lse``: made of ``x`` where they are not there."""
    if a.qkv is None:
        normed, rstd = rms_norm_forward(a.x, w.input_layernorm, spec.norm_eps)
        qkv = _linear(normed, w.qkv_proj, w.qkv_bias)
        if not spec.qk_norm:
            rotary_forward_(qkv, *context.rotation, spec.num_heads, spec.num_kv_heads, spec.head_dim)
        a = a._replace(rstd=rstd, qkv=qkv)
        del normed
    if a.o is None:
        lengths, options = context.attention_arguments(spec)
        o, lse = attention_forward(*_heads(a.qkv, w, spec, context)[:3], *lengths, **options)
        a = a._replace(o=o, lse=lse)
    return a


def _mlp_branch(a: Activations, w: Weights, spec: BlockSpec) -> Activations:
    """With ``s``, ``post_rstd`` and ``gate_up``: made of ``x`` and ``o`` where they are not there."""
    if a.gate_up is not None:
        return a
    if a.s is None:
        branch = _linear(a.o.flatten(1), w.o_proj, w.o_bias)
        normed, s, post_rstd = add_rms_norm_forward(branch, a.x, w.post_attention_layernorm, spec.norm_eps)
        del branch
        a = a._replace(s=s, post_rstd=post_rstd)
    else:
        normed, _ = rms_norm_forward(a.s, w.post_attention_layernorm, spec.norm_eps)
    return a._replace(gate_up=_linear(normed, w.gate_up_proj, w.gate_up_bias))


def _heads(qkv: Tensor, w: Weights, spec: BlockSpec, context: BlockContext) -> tuple[Tensor, ...]:
    """``(q, k, v)`` as attention takes them; where they are normed ``(q, k, v, q_rstd, k_rstd)``, made anew."""
    sizes = spec.num_heads, spec.num_kv_heads, spec.head_dim
    if spec.qk_norm:
        return qk_norm_rotary_forward(qkv, w.q_norm, w.k_norm, spec.norm_eps, *context.rotation, *sizes)
    heads = qkv.view(len(qkv), spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
    return heads.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _dbias(dy: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else linear_dbias(dy)


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
    del normed
    return dweight, _dbias(dz, bias), linear_dscale(weight, dweight, norm)


class Linear(nn.Module):
    """A weight ``[out, in]``, perhaps a bias, and while it trains in a wider dtype than it computes in, a shadow.

    Without a shadow, as where the master is sharded or its block recomputes everything, it is narrowed for each
    product.

    Args:
        shadow: whether one is kept where it is needed.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, trained: bool, compute_dtype: torch.dtype, shadow: bool = True
    ):
        super().__init__()
        self.weight = parameter(weight, trained=trained, compute_dtype=compute_dtype)
        self.bias = None if bias is None else parameter(bias, trained=trained, compute_dtype=compute_dtype)
        needs_shadow = shadow and self.weight.dtype != compute_dtype
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
        recompute: what is made again in backward; ``BLOCK`` keeps no shadows either.
    """

    def __init__(
        self,
        spec: BlockSpec,
        tensors: dict[str, Tensor],
        *,
        block_class: BlockClass,
        compute_dtype: torch.dtype,
        recompute: Recompute = Recompute.NONE,
    ) -> None:
        super().__init__()
        trained = block_class is BlockClass.TRAINED
        assert not (trained and compute_dtype == torch.float16), "a trained block does not compute in float16"
        self.spec = spec
        self.block_class = block_class
        self.recompute = recompute
        how = {"trained": trained, "compute_dtype": compute_dtype}
        for name in ("input_layernorm", "q_norm", "k_norm", "post_attention_layernorm"):
            weight = tensors.get(f"{name}.weight")
            setattr(self, name, None if weight is None else RMSNorm(weight, spec.norm_eps, **how))
        for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
            setattr(self, name, Linear(weight, bias, **how, shadow=recompute is not Recompute.BLOCK))

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
            return _DecoderBlock.apply(x, self.spec, context, self.recompute, shadows, *masters)


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
