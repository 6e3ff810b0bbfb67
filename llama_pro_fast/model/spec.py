"""What a decoder block is (`BlockSpec`): a value, so that families of models differ by data and not by code.

The rotary angles are not part of a block: all blocks of a model share one table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """The shape of a block and what it is made of.

    Attributes:
        hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim: H, I, N, K, D.
        norm_eps: of every RMSNorm.
        qkv_bias, o_bias, mlp_bias: which projections have one.
        qk_norm: an RMSNorm over each head of q and of k before the rotation, with one weight ``[D]`` for each.
        window: how many keys a query sees, itself included; None for all before it.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: int | None = None

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A block's parameters and their shapes: q, k and v are the rows of one matrix, gate and up of another."""
        H, I, D, Q, K = self.hidden_size, self.intermediate_size, self.head_dim, self.q_size, self.kv_size
        shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (H,), "post_attention_layernorm.weight": (H,)}
        if self.qk_norm:
            shapes |= {"q_norm.weight": (D,), "k_norm.weight": (D,)}
        projections = {
            "qkv_proj": (Q + 2 * K, H, self.qkv_bias),
            "o_proj": (H, Q, self.o_bias),
            "gate_up_proj": (2 * I, H, self.mlp_bias),
            "down_proj": (H, I, self.mlp_bias),
        }
        for name, (rows, columns, has_bias) in projections.items():
            shapes[f"{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{name}.bias"] = (rows,)
        return shapes

    def num_parameters(self) -> int:
        return sum(map(math.prod, self.shapes().values()))
