"""What the tests of the block share: specs of every kind, random weights, ragged documents, a block in plain PyTorch.

`plain_block` is the definition the hand-written backward is held to: each operation as autograd knows it, a document at
a time, Hugging Face's names for the weights. It shares no line with the block.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional as F

from llama_pro_fast.hf.families import hf_parts
from llama_pro_fast.model.batch import BlockContext, PackedBatch
from llama_pro_fast.model.block import Block
from llama_pro_fast.model.layers import Linear
from llama_pro_fast.model.policy import BlockClass, Recompute
from llama_pro_fast.model.spec import BlockSpec
from llama_pro_kernels import (
    add_rms_norm,
    attention,
    rms_norm,
    rotary,
    select_attention_backend,
    swiglu,
    trainable_linear,
)

GQA = BlockSpec(hidden_size=24, intermediate_size=40, num_heads=4, num_kv_heads=2, head_dim=8, norm_eps=1e-5)
BIASES = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
SPECS = {
    "gqa": GQA,
    "mha": dataclasses.replace(GQA, num_kv_heads=4),
    "mqa": dataclasses.replace(GQA, num_kv_heads=1),
    "wide heads": dataclasses.replace(GQA, head_dim=12),
    "qkv bias": dataclasses.replace(GQA, qkv_bias=True),
    "biases": dataclasses.replace(GQA, **BIASES),
    "qk norm": dataclasses.replace(GQA, qk_norm=True),
    "window": dataclasses.replace(GQA, window=5),
    "qk norm, window": dataclasses.replace(GQA, qk_norm=True, window=5),
    "biases, qk norm": dataclasses.replace(GQA, qk_norm=True, **BIASES),
    "biases, window": dataclasses.replace(GQA, window=5, **BIASES),
    "all": dataclasses.replace(GQA, qk_norm=True, window=5, **BIASES),
}
LENGTHS = (19, 1, 7, 0, 24, 2)
"""Ragged documents: a single token and an empty one among them, and some longer than the window."""


def make_tensors(spec: BlockSpec, seed: int = 0) -> dict[str, torch.Tensor]:
    """Packed weights by our names; norms around 1, of either sign, one element 0 and one near it."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in spec.shapes().items():
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        if "norm" in name:
            tensor = 1 + 0.3 * tensor
            tensor[1], tensor[3], tensor[5] = -tensor[1], 0.0, 1e-9
        else:
            tensor = 0.3 * tensor
        made[name] = tensor
    return made


def make_block(
    spec: BlockSpec,
    block_class: BlockClass,
    dtype: torch.dtype,
    seed: int = 0,
    recompute: Recompute = Recompute.NONE,
    eight_bits: bool = False,
) -> Block:
    """On the default device; of weights that bf16 can hold, so that a low-precision copy is exact."""
    tensors = {name: tensor.bfloat16() for name, tensor in make_tensors(spec, seed).items()}
    how = {"block_class": block_class, "compute_dtype": dtype, "recompute": recompute, "eight_bits": eight_bits}
    block = Block(spec, tensors, **how)
    return block.to(torch.get_default_device())


def make_context(spec: BlockSpec, dtype: torch.dtype, lengths=LENGTHS, attention: str | None = None) -> BlockContext:
    device = torch.get_default_device()
    batch = PackedBatch.from_documents([[0] * n for n in lengths], cu_seqlens_length=len(lengths) + 5).to(device)
    frequency = 100.0 ** (-torch.arange(0, spec.head_dim, 2, dtype=torch.float64) / spec.head_dim)
    angles = torch.arange(max(lengths) + 1, dtype=torch.float64)[:, None] * frequency
    attention = attention or select_attention_backend(device, dtype, window=spec.window, head_dim=spec.head_dim)
    return BlockContext.for_batch(
        batch, rotary_tables=(angles.cos().float(), angles.sin().float()), attention=attention
    )


def make_rows(spec: BlockSpec, dtype: torch.dtype, lengths=LENGTHS, seed: int = 1) -> torch.Tensor:
    """``[T, H]`` that bf16 can hold, on the default device."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(lengths), spec.hidden_size, generator=generator, device="cpu")
    return rows.bfloat16().to(torch.get_default_device(), dtype)


def hf_weights(spec: BlockSpec, block: Block, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """A block's weights unpacked to leaves under Hugging Face's names."""
    return {
        name: part.detach().to(dtype).requires_grad_() for name, part in unpack(spec, dict(block.named_parameters()))
    }


def unpack(spec: BlockSpec, packed: dict[str, torch.Tensor]):
    for name, parts in hf_parts(spec).items():
        pieces = packed[name].split([shape[0] for _, shape in parts])
        yield from ((hf_name, piece) for (hf_name, _), piece in zip(parts, pieces, strict=True))


def trainable(x: torch.Tensor, projection: Linear) -> torch.Tensor:
    return trainable_linear(x, projection.weight, projection.bias, low_precision_weight=projection.low_precision)


def autograd_block(block: Block, x: torch.Tensor, context: BlockContext, linear=trainable) -> torch.Tensor:
    """The block of differentiable operations, each of which keeps and computes what it needs by itself."""
    spec = block.spec

    qkv = linear(rms_norm(x, block.input_layernorm.weight, spec.norm_eps), block.qkv_proj)
    if spec.qk_norm:
        heads = qkv.view(len(qkv), -1, spec.head_dim)
        q, k, v = heads.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
        q, k = rms_norm(q, block.q_norm.weight, spec.norm_eps), rms_norm(k, block.k_norm.weight, spec.norm_eps)
        qkv = torch.cat([q, k, v], 1).flatten(1)
    q, k, v = rotary(
        qkv, context.cos, context.sin, context.position_ids, spec.num_heads, spec.num_kv_heads, spec.head_dim
    )
    lengths = context.cu_seqlens, context.max_seqlen
    o = attention(q, k, v, *lengths, scale=spec.head_dim**-0.5, window=spec.window, backend=context.attention)
    branch = linear(o.flatten(1), block.o_proj)
    normed, s = add_rms_norm(branch, x, block.post_attention_layernorm.weight, spec.norm_eps)
    return s + linear(swiglu(linear(normed, block.gate_up_proj)), block.down_proj)


def plain_block(
    x: torch.Tensor, weights: dict[str, torch.Tensor], spec: BlockSpec, lengths, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """``[T, H]`` -> ``[T, H]``; ``cos`` and ``sin`` ``[positions, D/2]``."""
    cos, sin = (torch.cat([table, table], -1).to(x.dtype) for table in (cos, sin))
    heads, kv_heads, dim, eps = spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.norm_eps

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x, name):
        return F.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"], eps)

    def rotate(x):
        first, second = x.chunk(2, -1)
        return x * cos[: x.shape[1]] + torch.cat([-second, first], -1) * sin[: x.shape[1]]

    def attend(x):
        length = len(x)
        q, k, v = (
            linear(x, f"self_attn.{name}_proj").view(length, n, dim).transpose(0, 1)
            for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        if spec.qk_norm:
            q, k = norm(q, "self_attn.q_norm"), norm(k, "self_attn.k_norm")
        q = rotate(q)
        k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (rotate(k), v))
        distance = torch.arange(length)[:, None] - torch.arange(length)
        visible = (distance >= 0) & (distance < (spec.window or length))
        scores = (q @ k.transpose(1, 2) / dim**0.5).masked_fill(~visible, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)

    h = norm(x, "input_layernorm")
    x = x + linear(torch.cat([attend(part) for part in h.split(list(lengths)) if len(part)]), "self_attn.o_proj")
    h = norm(x, "post_attention_layernorm")
    return x + linear(F.silu(linear(h, "mlp.gate_proj")) * linear(h, "mlp.up_proj"), "mlp.down_proj")
