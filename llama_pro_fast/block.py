"""One decoder block: what it is (`BlockSpec`), what a batch gives it (`BlockContext`), what it computes (`Block`).

    x ── input_layernorm ── qkv_proj ── rotary ── attention ── o_proj ──┐
    └────────────────────────────────────────────────────────────────── + ── s
    s ── post_attention_layernorm ── gate_up_proj ── SwiGLU ── down_proj ─┐
    └────────────────────────────────────────────────────────────────── + ── y

Weights are packed: q, k and v in one matrix, gate and up in another, so that a block is four products. A block is of
one of three classes, set by where it lies and whether it trains:

    prefix    below the first trained block: runs without a graph, keeps nothing
    frozen    above it: the gradient passes through, no weight gets one
    trained   its float32 weights are Parameters; products run on a narrow copy (the shadow) that is refreshed after
              each optimizer step, and every gradient stays float32

A new block starts as an identity because `o_proj` and `down_proj` are zero (paper, section 3.2): both branches add 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn

from llama_pro_fast.batch import PackedBatch
from llama_pro_kernels import add_rms_norm, attention, rms_norm, rotary, swiglu, trainable_linear


class BlockClass(Enum):
    """What backward asks of a block."""

    PREFIX = "prefix"
    FROZEN = "frozen"
    TRAINED = "trained"


@dataclass(frozen=True)
class BlockSpec:
    """The shape of a block; families of models differ by this data."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def from_config(cls, config) -> BlockSpec:
        """From a `transformers.LlamaConfig`."""
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            norm_eps=config.rms_norm_eps,
            attention_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
        )

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def tensors(self) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
        """Our parameter -> the Hugging Face tensors stacked in it along dimension 0, with their shapes.

        The one place where the two namings meet.
        """
        H, I, Q, K = self.hidden_size, self.intermediate_size, self.q_size, self.kv_size
        packed = {
            "qkv_proj": ([("self_attn.q_proj", Q), ("self_attn.k_proj", K), ("self_attn.v_proj", K)], H),
            "o_proj": ([("self_attn.o_proj", H)], Q),
            "gate_up_proj": ([("mlp.gate_proj", I), ("mlp.up_proj", I)], H),
            "down_proj": ([("mlp.down_proj", H)], I),
        }
        biased = {
            "qkv_proj": self.attention_bias,
            "o_proj": self.attention_bias,
            "gate_up_proj": self.mlp_bias,
            "down_proj": self.mlp_bias,
        }
        tensors = {name: [(f"{name}.weight", (H,))] for name in ("input_layernorm", "post_attention_layernorm")}
        tensors = {f"{name}.weight": rows for name, rows in tensors.items()}
        for name, (parts, in_features) in packed.items():
            tensors[f"{name}.weight"] = [(f"{part}.weight", (rows, in_features)) for part, rows in parts]
            if biased[name]:
                tensors[f"{name}.bias"] = [(f"{part}.bias", (rows,)) for part, rows in parts]
        return tensors

    def num_parameters(self) -> int:
        return sum(torch.Size(shape).numel() for parts in self.tensors().values() for _, shape in parts)


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

    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    cos: torch.Tensor
    sin: torch.Tensor
    attention: str

    @classmethod
    def for_batch(
        cls, batch: PackedBatch, *, rotary_tables: tuple[torch.Tensor, torch.Tensor], attention: str
    ) -> BlockContext:
        cos, sin = rotary_tables
        return cls(batch.position_ids, batch.cu_seqlens, batch.max_seqlen, cos, sin, attention)


class Linear(nn.Module):
    """A weight ``[out, in]``, perhaps a bias, and while it trains in a wider dtype than it computes in, a shadow."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, trained: bool, compute_dtype: torch.dtype):
        super().__init__()
        self.weight = parameter(weight, trained=trained, compute_dtype=compute_dtype)
        self.bias = None if bias is None else parameter(bias, trained=trained, compute_dtype=compute_dtype)
        needs_shadow = self.weight.dtype != compute_dtype
        self.register_buffer("shadow", self.weight.detach().to(compute_dtype) if needs_shadow else None, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return trainable_linear(x, self.weight, self.bias, shadow=self.shadow)


class RMSNorm(nn.Module):
    """The weight ``[H]`` of an RMSNorm; the op computes in float32, so it needs no shadow."""

    def __init__(self, weight: torch.Tensor, eps: float, *, trained: bool, compute_dtype: torch.dtype):
        super().__init__()
        self.weight = parameter(weight, trained=trained, compute_dtype=compute_dtype)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class Block(nn.Module):
    """A decoder block.

    Args:
        spec: its shape.
        tensors: our parameter names (:meth:`BlockSpec.tensors`) -> packed tensors of any float dtype.
        block_class: prefix, frozen or trained.
        compute_dtype: of the activations and of frozen weights.
    """

    def __init__(
        self,
        spec: BlockSpec,
        tensors: dict[str, torch.Tensor],
        *,
        block_class: BlockClass,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.block_class = block_class
        how = {"trained": block_class is BlockClass.TRAINED, "compute_dtype": compute_dtype}
        self.input_layernorm = RMSNorm(tensors["input_layernorm.weight"], spec.norm_eps, **how)
        self.post_attention_layernorm = RMSNorm(tensors["post_attention_layernorm.weight"], spec.norm_eps, **how)
        for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            setattr(self, name, Linear(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), **how))

    def forward(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        """``[T, H]`` -> ``[T, H]``, in the dtype of ``x``."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.block_class is not BlockClass.PREFIX):
            return self._forward(x, context)

    def _forward(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        spec = self.spec
        qkv = self.qkv_proj(self.input_layernorm(x))
        q, k, v = rotary(
            qkv, context.cos, context.sin, context.position_ids, spec.num_heads, spec.num_kv_heads, spec.head_dim
        )
        o = attention(
            q,
            k,
            v,
            context.cu_seqlens,
            context.max_seqlen,
            scale=spec.head_dim**-0.5,
            backend=context.attention,
        )
        normed, s = add_rms_norm(
            self.o_proj(o.flatten(1)), x, self.post_attention_layernorm.weight, self.post_attention_layernorm.eps
        )
        return s + self.down_proj(swiglu(self.gate_up_proj(normed), consume=True))


def parameter(tensor: torch.Tensor, *, trained: bool, compute_dtype: torch.dtype) -> nn.Parameter:
    """A trained tensor is its float32 master (float64 under a float64 computation), a frozen one the only copy."""
    dtype = torch.promote_types(compute_dtype, torch.float32) if trained else compute_dtype
    return nn.Parameter(tensor.detach().to(dtype), requires_grad=trained)


@torch.no_grad()
def refresh_shadows(module: nn.Module) -> None:
    """Bring the narrow copies in line with their masters; once after each optimizer step."""
    pairs = [(m.shadow, m.weight) for m in module.modules() if getattr(m, "shadow", None) is not None]
    if pairs:
        torch._foreach_copy_([shadow for shadow, _ in pairs], [weight for _, weight in pairs])
