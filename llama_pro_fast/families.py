"""What a decoder block is (`BlockSpec`), and how each family of models says it in its config (`FAMILIES`).

Families differ by data: a row here and nothing else. The rotary angles are not part of a block: all blocks of these
families share one table, which transformers computes from the config (`model.rotary_tables`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llama_pro_fast.errors import UserError


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

    @classmethod
    def from_config(cls, config, index: int) -> BlockSpec:
        """Of block ``index`` of a model, from its transformers config.

        Raises:
            UserError: the block attends in a way that is not known.
        """
        family = FAMILIES[config.model_type]
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            norm_eps=config.rms_norm_eps,
            qkv_bias=family.qkv_bias(config),
            o_bias=family.o_bias(config),
            mlp_bias=family.mlp_bias(config),
            qk_norm=family.qk_norm,
            window=family.window(config, index),
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
        H, I, D, Q, K = self.hidden_size, self.intermediate_size, self.head_dim, self.q_size, self.kv_size
        norms = {"input_layernorm": ("input_layernorm", H), "post_attention_layernorm": ("post_attention_layernorm", H)}
        if self.qk_norm:
            norms |= {"q_norm": ("self_attn.q_norm", D), "k_norm": ("self_attn.k_norm", D)}
        packed = {
            "qkv_proj": ([("self_attn.q_proj", Q), ("self_attn.k_proj", K), ("self_attn.v_proj", K)], H, self.qkv_bias),
            "o_proj": ([("self_attn.o_proj", H)], Q, self.o_bias),
            "gate_up_proj": ([("mlp.gate_proj", I), ("mlp.up_proj", I)], H, self.mlp_bias),
            "down_proj": ([("mlp.down_proj", H)], I, self.mlp_bias),
        }
        tensors = {f"{ours}.weight": [(f"{theirs}.weight", (width,))] for ours, (theirs, width) in norms.items()}
        for name, (parts, in_features, has_bias) in packed.items():
            tensors[f"{name}.weight"] = [(f"{part}.weight", (rows, in_features)) for part, rows in parts]
            if has_bias:
                tensors[f"{name}.bias"] = [(f"{part}.bias", (rows,)) for part, rows in parts]
        return tensors

    def num_parameters(self) -> int:
        return sum(math.prod(shape) for parts in self.tensors().values() for _, shape in parts)


def _never(config: Any) -> bool:
    return False


def _attention_bias(config: Any) -> bool:
    return config.attention_bias


def _full_attention(config: Any, index: int) -> None:
    return None


def _window(config: Any, index: int) -> int | None:
    if config.sliding_window is not None and config.sliding_window < 1:
        raise UserError(
            f"sliding_window {config.sliding_window}: a query sees itself, so at least 1 (null for no window)"
        )
    return config.sliding_window


def _window_by_layer_type(config: Any, index: int) -> int | None:
    windows = {"full_attention": None, "sliding_attention": _window(config, index)}
    kind = config.layer_types[index]
    if kind not in windows:
        raise UserError(
            f"layer_types: block {index} is {kind}, which is not supported; supported: {', '.join(windows)}"
        )
    if kind == "sliding_attention" and windows[kind] is None:
        raise UserError(
            f"layer_types: block {index} is {kind} and there is no window; set use_sliding_window and "
            "sliding_window, or full_attention"
        )
    return windows[kind]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family's config tells what its blocks are; a default is what the first Llama had.

    A row does for a family whose blocks are Llama's but for what a :class:`BlockSpec` says. Multipliers on the branches
    or the embedding, blocks without a rotation, norms elsewhere: none of these would be noticed.

    Attributes:
        architecture: its causal language model in transformers.
        qkv_bias, o_bias, mlp_bias: of the config, whether these projections have biases.
        qk_norm: whether q and k are normed per head.
        window: of the config and a block's index, the block's sliding window.
    """

    architecture: str
    qkv_bias: Callable[[Any], bool] = _never
    o_bias: Callable[[Any], bool] = _never
    mlp_bias: Callable[[Any], bool] = _never
    qk_norm: bool = False
    window: Callable[[Any, int], int | None] = _full_attention


FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        mlp_bias=lambda config: config.mlp_bias,
    ),
    "mistral": Family(architecture="MistralForCausalLM", window=_window),
    "qwen2": Family(architecture="Qwen2ForCausalLM", qkv_bias=lambda config: True, window=_window_by_layer_type),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        qk_norm=True,
        window=_window_by_layer_type,
    ),
}
"""By transformers' ``model_type``."""


ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def check_rope(config: Any) -> None:
    """The angles must be one table for all blocks, turning the whole of each head.

    Raises:
        UserError: they are not, or are told in a way that is not known.
    """
    rope = config.rope_parameters
    kind, theta = rope.get("rope_type"), rope.get("rope_theta")
    if kind not in ROPE_TYPES:
        raise UserError(f"rope_parameters: rope_type {kind} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if not isinstance(theta, int | float) or not theta > 0:
        raise UserError(f"rope_parameters: rope_theta {theta} is not a number above 0; 10000 is Llama's")
    if (share := rope.get("partial_rotary_factor")) not in (None, 1):
        raise UserError(
            f"rope_parameters: partial_rotary_factor {share} is not supported; these families turn whole heads"
        )


def window_within(config: Any, length: int) -> int | None:
    """The sliding window of a model's blocks, if any has one that a sequence of ``length`` tokens is longer than: what
    the run's attention backend must be able to do."""
    windows = (BlockSpec.from_config(config, index).window for index in range(config.num_hidden_layers))
    return next((window for window in windows if window is not None and window < length), None)
