"""What a token costs: parameters and FLOPs of a step, from the shape of the model and the place of the trained blocks.

Conventions: a product of an m×k by a k×n matrix is 2mkn FLOPs; attention counts only what the causal mask leaves (half)
and its backward as twice its forward; recomputation counts nothing. Elementwise work is left out.

    forward     every product, every block
    dX          from the head down to the lowest trained block, that block included
    dW          trained matrices only
    attention   forward everywhere, backward from the lowest trained block up
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from llama_pro_fast.block import BlockSpec


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
        config: a `transformers.LlamaConfig`.
        trained_blocks: indices of the trained blocks.
        seq_len: tokens per sequence; one document is assumed to fill it.
        train_all: the head trains too (the embedding is a lookup).
    """
    spec = BlockSpec.from_config(config)
    layers = config.num_hidden_layers
    block = sum(shape[0] * shape[1] for parts in spec.tensors().values() for _, shape in parts if len(shape) == 2)
    head = config.vocab_size * config.hidden_size
    trained = range(layers) if train_all else trained_blocks
    above = layers - min(trained, default=layers)
    attention = 2 * seq_len * spec.q_size
    return StepCost(
        forward=2.0 * (layers * block + head),
        dx=2.0 * (above * block + head),
        dw=2.0 * (len(trained) * block + (head if train_all else 0)),
        attention=attention * (layers + 2.0 * above),
    )


def num_parameters(config) -> int:
    """Parameters of the whole model, tied tables counted once."""
    spec = BlockSpec.from_config(config)
    tables = 1 if config.tie_word_embeddings else 2
    return (
        config.num_hidden_layers * spec.num_parameters()
        + tables * config.vocab_size * config.hidden_size
        + config.hidden_size
    )


def num_trained_parameters(config, trained_blocks: Collection[int], *, train_all: bool) -> int:
    """Parameters that train: all of them, or those of some blocks."""
    return num_parameters(config) if train_all else len(trained_blocks) * BlockSpec.from_config(config).num_parameters()
