"""What a token costs: parameters, FLOPs of a step, bytes kept for backward.

All of it follows from the shape of the model and the place of the trained blocks, before anything is loaded.

Conventions: a product of an m×k by a k×n matrix is 2mkn FLOPs; attention counts only what the causal mask leaves (half)
and its backward as twice its forward; recomputation counts nothing. Elementwise work is left out.

    forward     every product, every block
    dX          from the head down to the lowest trained block; its q/k/v projection makes none, as nothing below learns
    dW          trained matrices only
    attention   forward everywhere, backward from the lowest trained block up

Products are exact: they are what PyTorch's FLOP counter counts in a step. Attention is the convention of the field's
figures; flash attention's backward makes the scores again and does 2.5 times its forward (`llama_pro_kernels` counts
that, and documents by their own length).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from llama_pro_fast.block import BlockClass
from llama_pro_fast.families import BlockSpec
from llama_pro_kernels import compute_dtype


@dataclass(frozen=True)
class StepCost:
    """FLOPs per token."""

    forward: float
    dx: float
    dw: float
    attention: float

    @property
    def total(self) -> float:
        return self.forward + self.dx + self.dw + self.attention


def step_cost(config, trained_blocks: Collection[int], *, seq_len: int, train_all: bool = False) -> StepCost:
    """FLOPs per token of one training step.

    Args:
        config: a transformers config of a known family.
        trained_blocks: indices of the trained blocks.
        seq_len: tokens per sequence; one document is assumed to fill it.
        train_all: the embedding and the head train too (the embedding is a lookup).
    """
    spec = BlockSpec.from_config(config, 0)
    layers = config.num_hidden_layers
    block, qkv = sum(matrices(spec).values()), matrices(spec)["qkv_proj.weight"]
    head = config.vocab_size * config.hidden_size
    trained = range(layers) if train_all else trained_blocks
    above = layers - min(trained, default=layers)
    attention = [
        4 * spec.q_size * _mean_keys(seq_len, BlockSpec.from_config(config, index).window) for index in range(layers)
    ]
    return StepCost(
        forward=2.0 * (layers * block + head),
        dx=2.0 * (above * block + head) - (2.0 * qkv if above and not train_all else 0.0),
        dw=2.0 * (len(trained) * block + (head if train_all else 0)),
        attention=float(sum(attention) + 2 * sum(attention[layers - above :])),
    )


def matrices(spec: BlockSpec) -> dict[str, int]:
    """Elements of each of a block's weight matrices; a product with one is twice as many FLOPs per token."""
    return {
        name: sum(rows * columns for _, (rows, columns) in parts)
        for name, parts in spec.tensors().items()
        if len(parts[0][1]) == 2
    }


def _mean_keys(seq_len: int, window: int | None) -> float:
    """Keys a query of a full sequence sees on average, where half of the causal square is counted."""
    window = seq_len if window is None else min(window, seq_len)
    return window - window * window / (2 * seq_len)


def kept_bytes(spec: BlockSpec, block_class: BlockClass, dtype: torch.dtype) -> int:
    """Bytes a token keeps in a block between forward and backward, for activations of ``dtype``.

    ``2(2H + 4) + 4(N + K)D + 4N + 4I`` in bf16: x and s with one float32 each for their norms; q, k, v and o; lse; gate
    and up. A norm on q and k keeps nothing, nor does a weight that trains.
    """
    if block_class is BlockClass.PREFIX:
        return 0
    narrow, wide = dtype.itemsize, compute_dtype(dtype).itemsize
    rows = 2 * spec.hidden_size + 2 * (spec.q_size + spec.kv_size) + 2 * spec.intermediate_size
    return narrow * rows + wide * (2 + spec.num_heads)


def num_parameters(config) -> int:
    """Parameters of the whole model, tied tables counted once."""
    spec = BlockSpec.from_config(config, 0)
    tables = 1 if config.tie_word_embeddings else 2
    return (
        config.num_hidden_layers * spec.num_parameters()
        + tables * config.vocab_size * config.hidden_size
        + config.hidden_size
    )


def num_trained_parameters(config, trained_blocks: Collection[int], *, train_all: bool) -> int:
    """Parameters that train: all of them, or those of some blocks."""
    return (
        num_parameters(config) if train_all else len(trained_blocks) * BlockSpec.from_config(config, 0).num_parameters()
    )
