"""What a token costs: parameters, FLOPs of a step, bytes kept for backward.

All of it follows from the shape of the model and the place of the trained blocks, before anything is loaded.

Conventions: a product of an m×k by a k×n matrix is 2mkn FLOPs; attention counts only what the causal mask leaves (half)
and its backward as twice its forward; what is recomputed counts apart. Elementwise work is left out.

    forward     every product, every block; where the base teaches, its products too
    dX          from the head down to the lowest trained block; its q/k/v projection makes none, as nothing below learns
    dW          trained matrices only
    attention   forward everywhere, backward from the lowest trained block up
    recomputed  what blocks that keep less recompute in backward; no part of the total

Products are exact: they are what PyTorch's FLOP counter counts in a step. Attention is the convention of the field's
figures; flash attention's backward recomputes the scores and does 2.5 times its forward (`llama_pro_kernels` counts
that, and documents by their own length).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llama_pro_fast.hf.families import block_spec, hf_parts
from llama_pro_fast.model.policy import BlockClass, Recompute
from llama_pro_fast.model.spec import BlockSpec
from llama_pro_fast.model.trained import Trained
from llama_pro_kernels import accumulation_dtype
from llama_pro_kernels.linear import fits_e4m3


@dataclass(frozen=True)
class StepCost:
    """FLOPs per token."""

    forward: float
    dx: float
    dw: float
    attention: float
    recomputed: float = 0.0

    @property
    def total(self) -> float:
        """Without recomputation: what the step is for."""
        return self.forward + self.dx + self.dw + self.attention


def step_cost(
    config,
    trained: Trained,
    *,
    seq_len: int,
    recompute: Sequence[Recompute] = (),
    taught: float = 0.0,
) -> StepCost:
    """FLOPs per token of one training step.

    Args:
        config: a transformers config of a known family.
        trained: what trains; of the tables only the head makes products (the embedding is a lookup).
        seq_len: tokens per sequence; one document is assumed to fill it.
        recompute: of each block; by default none.
        taught: share of the tokens that go through the base too, from the lowest trained block up.
    """
    spec = block_spec(config, 0)
    layers = config.num_hidden_layers
    block, qkv = sum(matrices(spec).values()), matrices(spec)["qkv_proj.weight"]
    head = config.vocab_size * config.hidden_size
    above = layers - trained.first
    specs = [block_spec(config, index) for index in range(layers)]
    attention = [attention_flops(spec, seq_len) for spec in specs]
    again = [index for index in range(trained.first, layers) if index not in trained.blocks]
    return StepCost(
        forward=2.0 * (layers * block + head) + 2.0 * taught * (len(again) * block + head),
        dx=2.0 * (above * block + head) - (2.0 * qkv if above and not trained.everything else 0.0),
        dw=2.0 * (len(trained.blocks) * block + (head if trained.everything else 0)),
        attention=float(
            sum(attention) + 2 * sum(attention[layers - above :]) + taught * sum(attention[index] for index in again)
        ),
        recomputed=sum(
            recomputed_flops(specs[index], policy, seq_len)
            for index, policy in enumerate(recompute)
            if index >= layers - above
        ),
    )


def matrices(spec: BlockSpec) -> dict[str, int]:
    """Elements of each of a block's weight matrices; a product with one is twice as many FLOPs per token."""
    return {name: math.prod(shape) for name, shape in spec.shapes().items() if len(shape) == 2}


def transposed_matrices(spec: BlockSpec, block_class: BlockClass) -> list[tuple[int, ...]]:
    """Shapes of the matrices whose products of backward a block makes in eight bits where that is wanted."""
    shapes = spec.shapes().values() if block_class is BlockClass.FROZEN else ()
    return [shape for shape in shapes if len(shape) == 2 and fits_e4m3(shape)]


def attention_flops(spec: BlockSpec, seq_len: int) -> float:
    """FLOPs per token of a block's attention, forward: 4·N·D for each key a query of a full sequence sees on average,
    where half of the causal square is counted."""
    window = seq_len if spec.window is None else min(spec.window, seq_len)
    return 4 * spec.q_size * (window - window * window / (2 * seq_len))


def activation_bytes(spec: BlockSpec, dtype: torch.dtype) -> dict[str, int]:
    """Bytes a token takes in each of a block's :class:`Activations`, for a computation in ``dtype``."""
    element, acc = dtype.itemsize, accumulation_dtype(dtype).itemsize
    return {
        "x": element * spec.hidden_size,
        "rstd": acc,
        "qkv": element * (spec.q_size + 2 * spec.kv_size),
        "o": element * spec.q_size,
        "lse": acc * spec.num_heads,
        "s": element * spec.hidden_size,
        "post_rstd": acc,
        "gate_up": element * 2 * spec.intermediate_size,
    }


def kept_bytes(
    spec: BlockSpec, block_class: BlockClass, dtype: torch.dtype, recompute: Recompute = Recompute.NONE
) -> int:
    """Bytes a token keeps in a block between forward and backward, for activations of ``dtype``.

    In bf16, with nothing recomputed, ``2(2H + 4) + 4(N + K)D + 4N + 4I``: x and s with one float32 each for their
    norms; q, k, v and o; lse; gate and up. A norm on q and k keeps nothing, nor does a weight that trains.
    """
    if block_class is BlockClass.PREFIX:
        return 0
    sizes = activation_bytes(spec, dtype)
    return sum(sizes[name] for name in recompute.kept)


def recomputed_matrices(spec: BlockSpec, recompute: Recompute) -> int:
    """Elements of the weights whose products a block makes a second time; twice as many FLOPs per token."""
    makes = {"qkv": "qkv_proj.weight", "s": "o_proj.weight", "gate_up": "gate_up_proj.weight"}
    weights = matrices(spec)
    return sum(weights[name] for activation, name in makes.items() if activation not in recompute.kept)


def recomputed_flops(spec: BlockSpec, recompute: Recompute, seq_len: int) -> float:
    """FLOPs per token that a block computes a second time, with ``seq_len`` tokens a document."""
    attention = 0.0 if "o" in recompute.kept else attention_flops(spec, seq_len)
    return 2.0 * recomputed_matrices(spec, recompute) + attention


def muon_flops(spec: BlockSpec) -> int:
    """FLOPs of Muon's update of a block, once a step: five iterations of three products for each matrix, which brings
    its singular values near 1."""
    shapes = [shape for parts in hf_parts(spec).values() for _, shape in parts if len(shape) == 2]
    return sum(5 * (4 * min(m, n) ** 2 * max(m, n) + 2 * min(m, n) ** 3) for m, n in shapes)


def num_parameters(config) -> int:
    """Parameters of the whole model, tied tables counted once."""
    spec = block_spec(config, 0)
    tables = 1 if config.tie_word_embeddings else 2
    return (
        config.num_hidden_layers * spec.num_parameters()
        + tables * config.vocab_size * config.hidden_size
        + config.hidden_size
    )


def num_trained_parameters(config, trained: Trained) -> int:
    """Parameters that train."""
    if trained.everything:
        return num_parameters(config)
    return len(trained.blocks) * block_spec(config, 0).num_parameters()
