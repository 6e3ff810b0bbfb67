"""One decoder block, its forward and its backward written out by hand.

    x ── input_layernorm ── qkv_proj ── (q_norm, k_norm) ── rotary ── attention ── o_proj ──┐
    └────────────────────────────────────────────────────────────────────────────────────── + ── s
    s ── post_attention_layernorm ── gate_up_proj ── SwiGLU ── down_proj ──┐
    └───────────────────────────────────────────────────────────────────── + ── y

Sizes: T tokens, H hidden size, I intermediate size, N heads of q, K heads of k and of v, D elements a head, C entries
of cu_seqlens. A product is always a matrix product; those inside attention are not counted.

Weights are packed: q, k and v in one matrix, gate and up in another, so forward makes four products. A block that an
expansion inserts starts as an identity: its `o_proj` and `down_proj` are zero (LLaMA Pro, section 3.2), so both
branches add 0. What backward asks of a block and what it finds kept is told in policy.py.

**Weights.** A prefix or frozen block holds each weight once, in the compute dtype. A trained block holds float32 master
weights and, where the compute dtype is lower, low-precision copies of its four matrices for the products (layers.py).
Under the policy `block` a trained block has no copies; it casts a matrix in forward and again in backward. Norms and
biases never have copies. Gradients of weights are float32. Under a float64 computation masters and gradients are
float64.

**Several micro-batches.** A block that accumulates adds the gradients of its matrices to those that are there within
the products, which then read them once: autograd would read both and write their sum, 8 bytes a parameter more, and
hold the new one besides. A norm's gradient is linear in its matrix', so that of the sum takes the old one's place.

**Eight bits.** A frozen weight has no gradient of its own, so a frozen block may make its four products of backward in
e4m3 (llama_pro_kernels/e4m3.py), of each matrix' transpose in codes that it keeps beside the weight. Forward is not
touched: logits and losses are what they are without. The kernel that makes a gradient writes its codes: for qkv_proj
and gate_up_proj nothing else, for o_proj beside the gradient, which is a residual too. Those of dy are made apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llama_pro_fast.model.batch import BlockContext
from llama_pro_fast.model.layers import Linear, RMSNorm
from llama_pro_fast.model.policy import Activations, BlockClass, Recompute
from llama_pro_fast.model.spec import BlockSpec
from llama_pro_kernels import (
    E4M3,
    add_rms_norm_forward,
    attention_backward,
    attention_forward,
    linear,
    linear_dbias,
    linear_dscale,
    linear_dw,
    linear_dx,
    linear_dx_e4m3,
    qk_norm_rotary_backward,
    qk_norm_rotary_backward_e4m3,
    qk_norm_rotary_forward,
    quantize_e4m3,
    rms_norm_backward,
    rms_norm_backward_e4m3,
    rms_norm_forward,
    rotary_backward,
    rotary_backward_e4m3,
    rotary_forward_,
    swiglu_backward_,
    swiglu_backward_e4m3,
    swiglu_forward,
)
from llama_pro_kernels.library import Consumed

NORMS = ("input_layernorm", "q_norm", "k_norm", "post_attention_layernorm")
PROJECTIONS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
_SUMMED = (*PROJECTIONS, "input_layernorm", "post_attention_layernorm")


class BlockWeights(NamedTuple):
    """A block's weights, in the order in which the autograd function takes them; None where a block has none."""

    input_layernorm: Tensor
    qkv_proj: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o_proj: Tensor
    o_bias: Tensor | None
    post_attention_layernorm: Tensor
    gate_up_proj: Tensor
    gate_up_bias: Tensor | None
    down_proj: Tensor
    down_bias: Tensor | None


class _DecoderBlock(torch.autograd.Function):
    """``(x [T, H], …) -> y [T, H]``, differentiable in x and in the weights.

    ``weights`` are the Parameters, in the order of :class:`BlockWeights`. ``low_precision`` is name -> low-precision
    copy, for the matrices that have one: products read the copy, the gradient goes to the Parameter. ``sums`` is name
    -> Parameter, for the matrices and norms to whose gradients, where there are any, backward adds itself.
    ``transposed`` is name -> transpose in codes, for the frozen matrices whose dX is made in eight bits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        spec: BlockSpec,
        context: BlockContext,
        recompute: Recompute,
        low_precision: dict[str, Tensor],
        sums: dict[str, nn.Parameter],
        transposed: dict[str, E4M3],
        *weights: Tensor | None,
    ) -> Tensor:
        w = BlockWeights(*weights)._replace(**low_precision)
        rstd, qkv = _project_qkv(x, w, spec, context)
        o, lse = _attend(qkv, w, spec, context)
        s, post_rstd, gate_up = _project_gate_up(x, o, w, spec)
        y = _linear(swiglu_forward(gate_up), w.down_proj, w.down_bias).add_(s)
        activations = Activations(x, rstd, qkv, o, lse, s, post_rstd, gate_up)
        kept = (tensor if name in recompute.kept else None for name, tensor in activations._asdict().items())
        ctx.save_for_backward(*kept, *w)
        ctx.spec, ctx.context, ctx.sums, ctx.consumed = spec, context, sums, Consumed("decoder block")
        ctx.transposed = transposed
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ctx.consumed.once()
        spec, context, codes = ctx.spec, ctx.context, ctx.transposed
        x, rstd, qkv, o, lse, s, post_rstd, gate_up, *weights = ctx.saved_tensors  # Activations, then BlockWeights
        w = BlockWeights(*weights)
        # The lowest trained block needs no dx, unless the embeddings train.
        need_dx, *need_others = ctx.needs_input_grad
        # Of the other inputs only weights can need a gradient, and all of a block's weights train or none.
        trained = any(need_others)
        gradients: dict[str, Tensor | None] = {}  # of weights, by the names of BlockWeights
        sums = {name: parameter.grad for name, parameter in ctx.sums.items()}

        # What the policy did not keep and the MLP's backward reads.
        if o is None:  # under block
            rstd, qkv = _project_qkv(x, w, spec, context)
            o, lse = _attend(qkv, w, spec, context)
        if s is None:  # under block and all_but_attention
            s, post_rstd, gate_up = _project_gate_up(x, o, w, spec)
        elif gate_up is None:  # under mlp
            gate_up = _recompute_gate_up(s, w, spec)

        # y = s + down_proj(SwiGLU(gate_up)),  gate_up = gate_up_proj(post_attention_layernorm(s))
        dswiglu = _linear_dx(dy, w.down_proj.to(dy.dtype), codes.get("down_proj"))
        if "gate_up_proj" in codes:
            dgate_up, swiglu = swiglu_backward_e4m3(dswiglu, gate_up), None
        else:
            dgate_up, swiglu = swiglu_backward_(dswiglu, gate_up, need_product=trained)
        del gate_up  # only the name, where dgate_up has its storage now or autograd keeps it
        if trained:
            gradients["down_proj"] = linear_dw(dy, swiglu, out=sums.get("down_proj"))
            gradients["down_bias"] = _dbias(dy, w.down_bias)
        del dswiglu, swiglu
        gate_up_proj = w.gate_up_proj.to(dy.dtype)
        if trained:
            gradients["gate_up_proj"], gradients["gate_up_bias"], gradients["post_attention_layernorm"] = (
                _norm_linear_dw(
                    dgate_up,
                    s,
                    w.post_attention_layernorm,
                    gate_up_proj,
                    w.gate_up_bias,
                    spec,
                    sums.get("gate_up_proj"),
                )
            )
        dnormed = _linear_dx(dgate_up, gate_up_proj, codes.get("gate_up_proj"))
        into_s = dnormed, s, w.post_attention_layernorm, post_rstd
        if "o_proj" in codes:
            ds, ds_rows = rms_norm_backward_e4m3(*into_s, dresidual=dy)
        else:
            # No need_dweight in a trained block either: the norm's gradient is `_norm_linear_dw`'s.
            ds, _ = rms_norm_backward(*into_s, dresidual=dy, need_dweight=False)
            ds_rows = ds
        del into_s
        del dnormed, dgate_up, gate_up_proj

        # What the policy did not keep and attention's backward reads.
        if qkv is None:  # under all_but_attention; under block it was made above
            rstd, qkv = _project_qkv(x, w, spec, context)
        del s  # the MLP's backward was the last to read it

        # s = x + o_proj(o),  o = attention(rotary(qkv_proj(input_layernorm(x))))
        do = _linear_dx(ds_rows, w.o_proj.to(dy.dtype), codes.get("o_proj")).view(o.shape)
        del ds_rows
        q, k, v = _heads(qkv, w, spec, context)
        dq, dk, dv = attention_backward(
            do, q, k, v, o, lse, context.cu_seqlens, context.max_seqlen,
            scale=spec.head_dim**-0.5, window=context.window(spec), backend=context.attention,
        )  # fmt: skip
        del do, q, k, v
        if spec.qk_norm:
            normed = qkv, w.q_norm, w.k_norm, spec.norm_eps, *context.rotation
            if "qkv_proj" in codes:
                dqkv = qk_norm_rotary_backward_e4m3(dq, dk, dv, *normed)
            else:
                dqkv, gradients["q_norm"], gradients["k_norm"] = qk_norm_rotary_backward(
                    dq, dk, dv, *normed, need_dweight=trained
                )
            del normed
        else:
            turn_back = rotary_backward_e4m3 if "qkv_proj" in codes else rotary_backward
            dqkv = turn_back(dq, dk, dv, *context.rotation)
        del dq, dk, dv, qkv
        qkv_proj = w.qkv_proj.to(dy.dtype)
        if trained:
            # o_proj's gradient comes only now so that attention's backward runs without it in memory.
            gradients["o_proj"] = linear_dw(ds, o.flatten(1), out=sums.get("o_proj"))
            gradients["o_bias"] = _dbias(ds, w.o_bias)
            gradients["qkv_proj"], gradients["qkv_bias"], gradients["input_layernorm"] = _norm_linear_dw(
                dqkv, x, w.input_layernorm, qkv_proj, w.qkv_bias, spec, sums.get("qkv_proj")
            )
        dx = None
        if need_dx:
            dnormed = _linear_dx(dqkv, qkv_proj, codes.get("qkv_proj"))
            dx, _ = rms_norm_backward(dnormed, x, w.input_layernorm, rstd, dresidual=ds, need_dweight=False)
        for name, total in sums.items():
            if total is not None:
                gradient = gradients.pop(name)
                if gradient is not total:  # a norm's, of the sum
                    total.copy_(gradient)
        # None for spec, context, recompute, low_precision, sums and transposed.
        return dx, None, None, None, None, None, None, *(gradients.get(name) for name in BlockWeights._fields)


def _project_qkv(x: Tensor, w: BlockWeights, spec: BlockSpec, context: BlockContext) -> tuple[Tensor, Tensor]:
    """``(rstd, qkv)`` of :class:`Activations`."""
    normed, rstd = rms_norm_forward(x, w.input_layernorm, spec.norm_eps)
    qkv = _linear(normed, w.qkv_proj, w.qkv_bias)
    if not spec.qk_norm:
        rotary_forward_(qkv, *context.rotation, spec.num_heads, spec.num_kv_heads, spec.head_dim)
    return rstd, qkv


def _attend(qkv: Tensor, w: BlockWeights, spec: BlockSpec, context: BlockContext) -> tuple[Tensor, Tensor]:
    """``(o, lse)`` of :class:`Activations`."""
    q, k, v = _heads(qkv, w, spec, context)
    return attention_forward(
        q, k, v, context.cu_seqlens, context.max_seqlen,
        scale=spec.head_dim**-0.5, window=context.window(spec), backend=context.attention,
    )  # fmt: skip


def _project_gate_up(x: Tensor, o: Tensor, w: BlockWeights, spec: BlockSpec) -> tuple[Tensor, Tensor, Tensor]:
    """``(s, post_rstd, gate_up)`` of :class:`Activations`."""
    branch = _linear(o.flatten(1), w.o_proj, w.o_bias)
    normed, s, post_rstd = add_rms_norm_forward(branch, x, w.post_attention_layernorm, spec.norm_eps)
    del branch
    return s, post_rstd, _linear(normed, w.gate_up_proj, w.gate_up_bias)


def _recompute_gate_up(s: Tensor, w: BlockWeights, spec: BlockSpec) -> Tensor:
    """``gate_up`` where s was kept."""
    normed, _ = rms_norm_forward(s, w.post_attention_layernorm, spec.norm_eps)
    return _linear(normed, w.gate_up_proj, w.gate_up_bias)


def _heads(qkv: Tensor, w: BlockWeights, spec: BlockSpec, context: BlockContext) -> tuple[Tensor, Tensor, Tensor]:
    """``(q, k, v)`` as attention takes them."""
    sizes = spec.num_heads, spec.num_kv_heads, spec.head_dim
    if spec.qk_norm:
        return qk_norm_rotary_forward(qkv, w.q_norm, w.k_norm, spec.norm_eps, *context.rotation, *sizes)
    heads = qkv.view(len(qkv), spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
    return heads.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _linear_dx(dy: Tensor | E4M3, weight: Tensor, transposed: E4M3 | None) -> Tensor:
    """Gradient of a projection's input, in ``weight``'s dtype; in eight bits where ``weight`` has codes."""
    if transposed is None:
        return linear_dx(dy, weight)
    return linear_dx_e4m3(quantize_e4m3(dy) if isinstance(dy, Tensor) else dy, transposed, weight.dtype)


def _dbias(dy: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else linear_dbias(dy)


def _norm_linear_dw(
    dz: Tensor, x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None, spec: BlockSpec, total: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients ``(dweight, dbias, dnorm)`` of ``z = (x̂ ∘ n) Wᵀ + bias``, an RMSNorm and the projection behind it; with
    a ``total`` dweight is added to it, and dweight and dnorm are those of the sum.

    x̂ are the rows of x over their root mean square, n is the norm's weight ``[H]``, W the projection's ``[out, H]``:

        dW_oh = Σ_t dz_to x̂_th n_h
        dn_h  = Σ_t (dz W)_th x̂_th = Σ_o W_oh Σ_t dz_to x̂_th = Σ_o W_oh dW_oh / n_h

    So dn = colsum(W ∘ dW) / n (`linear_dscale`) needs neither the product dz W nor a sum over tokens.

    The division needs an n that is not 0. So elements nearer to 0 than sqrt(tiny) of their dtype (1e-19 in float32) are
    taken for sqrt(tiny) here. Their own gradient does not depend on n and stays exact. Their column of dW is off by at
    most 2 sqrt(tiny) · Σ_t |dz_to x̂_th|, too little for a weight.
    """
    least = torch.finfo(norm.dtype).tiny ** 0.5
    floored = torch.where(norm.abs() < least, least, norm)
    normed, _ = rms_norm_forward(x, floored, spec.norm_eps)
    dweight = linear_dw(dz, normed, out=total)
    del normed
    return dweight, _dbias(dz, bias), linear_dscale(weight, dweight, floored)


class Block(nn.Module):
    """A decoder block.

    Args:
        spec: its shape.
        tensors: our parameter names (:meth:`BlockSpec.shapes`) -> packed tensors of any float dtype.
        block_class: prefix, frozen or trained.
        compute_dtype: of the activations, ``x`` among them, and of frozen weights. A trained block needs at least
            float32's range of exponents (bf16, fp32, fp64): float16 loses small gradients. Autocast is not for it.
        recompute: what is recomputed in backward; under ``BLOCK`` there are no low-precision copies either.
        eight_bits: whether a frozen block makes backward's products in e4m3; of no concern to other classes. A matrix
            whose sides are no multiples of 16 stays as it is.

    Attributes:
        accumulates: whether backward adds to the gradients of matrices and of the norms before them itself. Only for
            ``backward()``: `torch.autograd.grad` would be given nothing.
    """

    def __init__(
        self,
        spec: BlockSpec,
        tensors: dict[str, Tensor],
        *,
        block_class: BlockClass,
        compute_dtype: torch.dtype,
        recompute: Recompute = Recompute.NONE,
        eight_bits: bool = False,
    ) -> None:
        super().__init__()
        trained = block_class is BlockClass.TRAINED
        assert not (trained and compute_dtype == torch.float16), "a trained block does not compute in float16"
        self.spec = spec
        self.block_class = block_class
        self.recompute = recompute
        self.accumulates = False
        how = {"trained": trained, "compute_dtype": compute_dtype}
        for name in NORMS:
            weight = tensors.get(f"{name}.weight")
            setattr(self, name, None if weight is None else RMSNorm(weight, spec.norm_eps, **how))
        for name in PROJECTIONS:
            weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
            kept = {
                "keep_low_precision": recompute is not Recompute.BLOCK,
                "keep_transposed": eight_bits and block_class is BlockClass.FROZEN,
            }
            setattr(self, name, Linear(weight, bias, **how, **kept))

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """``x`` ``[T, H]`` in the compute dtype -> ``[T, H]`` in the same."""
        weights = BlockWeights(
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
        copies = {name: getattr(self, name).low_precision for name in PROJECTIONS}
        low_precision = {name: copy for name, copy in copies.items() if copy is not None}
        sums = {name: getattr(weights, name) for name in _SUMMED} if self.accumulates else {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.block_class is not BlockClass.PREFIX):
            arguments = x, self.spec, context, self.recompute, low_precision, sums, self.transposed
            return _DecoderBlock.apply(*arguments, *weights)

    @property
    def transposed(self) -> dict[str, E4M3]:
        """Name of a matrix -> its transpose in codes, where backward reads that."""
        if self.block_class is not BlockClass.FROZEN:
            return {}
        found = {name: getattr(self, name).transposed for name in PROJECTIONS}
        return {name: codes for name, codes in found.items() if codes is not None}
