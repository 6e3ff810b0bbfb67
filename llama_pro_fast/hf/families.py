"""How each family of models says in its config, and by the names of its tensors, what its blocks are (`FAMILIES`).

Families differ by data: a row here and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llama_pro_fast.errors import UserError
from llama_pro_fast.model.spec import BlockSpec


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


def block_spec(config: Any, index: int) -> BlockSpec:
    """What block ``index`` of a model is, from its transformers config.

    Raises:
        UserError: the block attends in a way that is not known.
    """
    family = FAMILIES[config.model_type]
    return BlockSpec(
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


HF_MODULES = {
    "input_layernorm": ("input_layernorm",),
    "post_attention_layernorm": ("post_attention_layernorm",),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
    "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}
"""A block's modules here, and those of Hugging Face whose tensors are stacked in each. The one place where the two
namings meet."""


def hf_parts(spec: BlockSpec) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Our parameter -> the Hugging Face tensors stacked in it along dimension 0, with their shapes."""
    stacked = {"qkv_proj": (spec.q_size, spec.kv_size, spec.kv_size), "gate_up_proj": 2 * (spec.intermediate_size,)}
    parts = {}
    for name, shape in spec.shapes().items():
        module, kind = name.split(".")
        rows = stacked.get(module, shape[:1])
        parts[name] = [(f"{hf}.{kind}", (n, *shape[1:])) for hf, n in zip(HF_MODULES[module], rows, strict=True)]
    return parts


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
    windows = (block_spec(config, index).window for index in range(config.num_hidden_layers))
    return next((window for window in windows if window is not None and window < length), None)
