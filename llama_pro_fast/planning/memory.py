"""What a training step holds in memory, from the shapes alone.

A step has a few phases, each computed here, and the fullest of them is the peak:

    loss            everything kept for backward, the head's inputs and gradient, one chunk of logits
    backward of i   what the blocks up to i keep; block i's recomputed activations and scratch; gradients so far
    optimizer       all gradients, nothing kept

beside what is always there: weights, master weights, their low-precision copies, moments. Gradients come into
being from the top block down; with several micro-batches a step all are there from the second one on, and a block's new
ones are made beside them. An evaluation has neither, but two chunks of logits, of the model and of its base.

`element` and `acc` are the bytes of a number in the dtype of the computation and in the accumulation dtype.

Bytes are those PyTorch's allocator hands out, what `torch.cuda.max_memory_allocated` counts: without the CUDA context,
what lies cached or in between (`devices.Device.usable` leaves room for those), and on a CPU without the process itself.
On a CPU the reference implementations make temporaries that the Triton kernels do not; both are counted. Scratch of
the attention backends is what their sources allocate.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from llama_pro_fast.hf.families import hf_parts
from llama_pro_fast.model.policy import BlockClass, Recompute
from llama_pro_fast.model.spec import BlockSpec
from llama_pro_fast.planning.block_memory import backward_peak, has_low_precision, together
from llama_pro_fast.planning.cost import kept_bytes, matrices, num_parameters, transposed_matrices
from llama_pro_fast.planning.job import Job
from llama_pro_kernels import accumulation_dtype, rows_per_chunk
from llama_pro_kernels.attention_selection import BACKENDS

WORKSPACES = 2 << 25
"""Bytes that PyTorch gives cuBLAS: 32 MiB on a Hopper for each of the two threads that make products, of forward and of
backward. Older cards get less."""
BATCH_BYTES = 3 * 8
"""A token's id, label and position, int64 each."""


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes in the fullest phase of a step, by kind.

    Attributes:
        weights: frozen ones, the only copy.
        transposed: of frozen ones, in eight bits for backward, with their scales.
        masters: trained weights in float32.
        low_precision: their copies in the dtype of the computation, of blocks that keep them; 0 where that is the
            masters' own.
        moments: the optimizer's.
        gradients: those that are there by then.
        kept_frozen, kept_trained: activations kept for backward, by the class of the blocks that keep them.
        logits: the chunk that exists at one time, where the phase has one.
        transient: everything else: a block's recomputed activations and scratch, the batch, rotary tables.
        phase: when.
    """

    weights: int
    transposed: int
    masters: int
    low_precision: int
    moments: int
    gradients: int
    kept_frozen: int
    kept_trained: int
    logits: int
    transient: int
    phase: str

    KINDS = (
        "weights", "transposed", "masters", "low_precision", "moments", "gradients", "kept_frozen", "kept_trained",
        "logits", "transient",
    )  # fmt: skip

    @property
    def total(self) -> int:
        return sum(getattr(self, kind) for kind in self.KINDS)


def step_memory(job: Job, recompute: Sequence[Recompute], *, micro_batch_size: int, accumulating: bool) -> StepMemory:
    """The peak of a step over micro-batches of ``micro_batch_size`` sequences.

    Args:
        recompute: of each block.
        accumulating: whether a step has several micro-batches.
    """
    tokens = micro_batch_size * job.seq_len
    element, acc = job.dtype.itemsize, accumulation_dtype(job.dtype).itemsize
    config, classes = job.config, job.trained.classes
    head_size = config.vocab_size * config.hidden_size
    states = _states(job, recompute)

    # What stays over every phase of the step.
    always = _always(job, tokens)
    kept = [
        tokens * kept_bytes(spec, kind, job.dtype, policy)
        for spec, kind, policy in zip(job.specs, classes, recompute, strict=True)
    ]
    # Of each class, what all blocks below an index keep.
    kept_below = {
        which: [0, *itertools.accumulate(b * (kind is which) for b, kind in zip(kept, classes, strict=True))]
        for which in (BlockClass.FROZEN, BlockClass.TRAINED)
    }
    every = acc * job.held(job.num_trained)
    top = tokens * (element * config.hidden_size + acc)  # what the final norm keeps: the last block's output, rstd

    def phase(name: str, blocks: int, gradients: int, transient: int, logits: int = 0) -> StepMemory:
        return StepMemory(
            **states,
            gradients=gradients,
            kept_frozen=kept_below[BlockClass.FROZEN][blocks],
            kept_trained=kept_below[BlockClass.TRAINED][blocks],
            logits=logits,
            transient=always + transient,
            phase=name,
        )

    rows = min(tokens, rows_per_chunk(config.vocab_size, job.dtype))
    chunk = rows * config.vocab_size * element
    copies = 0 if job.triton or element == acc else rows * config.vocab_size * acc
    layers = len(job.specs)
    dhead = acc * head_size if job.trained.everything else 0

    # The head: its input and dX, a loss a token, and where it trains dW.
    inputs = 2 * element * config.hidden_size + acc
    if job.taught:  # at most of all tokens: the base's input, another loss, its logits; and the reference's temporaries
        inputs += element * config.hidden_size + acc
        more = 0 if job.triton else 3 * acc + (1 if element == acc else acc)
        copies = chunk + rows * config.vocab_size * more
    loss = phase(
        "the loss",
        layers,
        every if accumulating else 0,
        top + tokens * inputs + copies + dhead,
        logits=chunk,
    )
    phases = [loss]
    made = dhead  # gradients of this micro-batch so far
    for index in reversed(range(job.trained.first, layers)):
        spec, kind = job.specs[index], classes[index]
        need_dx = index > job.trained.first or job.trained.everything
        transient = backward_peak(
            spec, kind, recompute[index], need_dx, job.dtype, job.triton, job.attention, tokens, micro_batch_size,
            job.documents(micro_batch_size), job.shards > 1, accumulating and job.shards == 1,
            job.eight_bits and kind is BlockClass.FROZEN,
        )  # fmt: skip
        gradients = every if accumulating else made
        # What this micro-batch has made of the head waits for the embedding's, where they are one table.
        waiting = made if accumulating and job.trained.everything and config.tie_word_embeddings else 0
        phases.append(phase(f"backward of block {index}", index + 1, gradients, transient + waiting))
        if kind is BlockClass.TRAINED and not accumulating:
            made += acc * -(-spec.num_parameters() // job.shards)
    if job.trained.everything:
        table = acc * head_size
        tied = table if config.tie_word_embeddings else 0
        dx = tokens * (element + (acc if acc != element else 0)) * config.hidden_size
        phases.append(
            phase("backward of the embedding", 0, every if accumulating else every - table, table + tied + dx)
        )
    phases.append(phase("the optimizer's step", 0, every, _muon_bytes(job.specs[0]) if job.muon else 0))
    return max(phases, key=lambda found: found.total)


def evaluation_memory(job: Job, recompute: Sequence[Recompute], *, micro_batch_size: int) -> int:
    """Bytes at the fullest of an evaluation (`held_out.evaluate`), with its bases beside the model where they
    are kept."""
    spec, element, acc = job.specs[0], job.dtype.itemsize, accumulation_dtype(job.dtype).itemsize
    tokens = micro_batch_size * job.seq_len
    H, I, Q, KV = spec.hidden_size, spec.intermediate_size, spec.q_size, spec.kv_size
    waiting = element * H * (2 if job.trained.skip_for_first_base else 1)
    # In a block, while the MLP's product is made or its input is normed; the model's own result waits, and where the
    # first base is measured too, what the last of the three starts from or the second's result.
    upcast = 0 if job.triton or element == acc else 2 * acc
    mlp = element * (2 * H + 3 * I) + max(upcast * I, element * (2 * Q + 2 * KV)) + 2 * acc
    block = tokens * (waiting + mlp + acc * spec.num_heads)
    if any(
        casts(job, kind, policy) for kind, policy in zip(job.trained.classes, recompute, strict=True)
    ):  # a master's copy is there while its product is made, and the temporaries are not
        beside = waiting + acc * (spec.num_heads + 2)
        qkv, heads = 2 * H + Q + 2 * KV, 2 * (H + Q + KV)
        alive = {"qkv_proj": qkv, "o_proj": heads, "gate_up_proj": heads + 2 * I, "down_proj": heads + 3 * I}
        weights = matrices(spec)
        for name, width in alive.items():
            block = max(block, tokens * (beside + element * width) + element * weights[f"{name}.weight"])
    # The two chunks of logits; the reference makes three in the accumulation dtype of them.
    chunk = min(tokens, rows_per_chunk(job.config.vocab_size, job.dtype)) * job.config.vocab_size
    if job.trained.everything:  # no base: one chunk, and in the reference its copy in the accumulation dtype
        logits = chunk * (element + (0 if job.triton or element == acc else acc))
    else:
        logits = chunk * (2 * element + (0 if job.triton else 3 * acc))
    losses = logits + tokens * (element * H + waiting + 2 * acc)
    always = _always(job, tokens)
    block += together(spec, BlockClass.TRAINED, acc) if job.shards > 1 else 0
    return sum(_states(job, recompute).values()) + always + max(block, losses)


def _always(job: Job, tokens: int) -> int:
    """Beside the states: the batch, the rotary tables and, on a GPU, what cuBLAS has."""
    workspaces = WORKSPACES if BACKENDS[job.attention].device == "cuda" else 0
    return tokens * BATCH_BYTES + 2 * job.seq_len * (job.specs[0].head_dim // 2) * 4 + workspaces


def states_bytes(job: Job) -> int:
    """What a step needs whatever its batch and recomputation: weights, masters, moments and gradients; and a copy of
    the tables where these train."""
    states = _states(job, [Recompute.BLOCK] * len(job.specs))
    return sum(states.values()) + accumulation_dtype(job.dtype).itemsize * job.held(job.num_trained)


def low_precision_bytes(job: Job, spec: BlockSpec, block_class: BlockClass, recompute: Recompute) -> int:
    """Low-precision copies that a block keeps: of its matrices; norms and biases are read as they are."""
    keeps = has_low_precision(block_class, job.dtype) and not casts(job, block_class, recompute)
    return job.dtype.itemsize * sum(matrices(spec).values()) if keeps else 0


def casts(job: Job, block_class: BlockClass, recompute: Recompute) -> bool:
    """Whether a block has no copies, and casts its masters for each product."""
    return has_low_precision(block_class, job.dtype) and (recompute is Recompute.BLOCK or job.shards > 1)


def transposed_bytes(job: Job) -> int:
    """The transposes of frozen matrices in eight bits: a code an element, a float32 scale an input."""
    kinds = zip(job.specs, job.trained.classes, strict=True) if job.eight_bits else ()
    return sum(rows * columns + 4 * columns for each in kinds for rows, columns in transposed_matrices(*each))


def _muon_bytes(spec: BlockSpec) -> int:
    """Of Muon's update at its fullest: the momentum in float32, and in bf16 two matrices and two squares."""
    shapes = [shape for parts in hf_parts(spec).values() for _, shape in parts if len(shape) == 2]
    return max(8 * rows * columns + 4 * min(rows, columns) ** 2 for rows, columns in shapes)


def _states(job: Job, recompute: Sequence[Recompute]) -> dict[str, int]:
    element, acc = job.dtype.itemsize, accumulation_dtype(job.dtype).itemsize
    trained = job.num_trained
    blocks = zip(job.specs, job.trained.classes, recompute, strict=True)
    low_precision = sum(low_precision_bytes(job, *block) for block in blocks)
    if job.trained.everything and element != acc:
        tables = 1 if job.config.tie_word_embeddings else 2
        low_precision += element * tables * job.config.vocab_size * job.config.hidden_size
    return {
        "weights": element * (num_parameters(job.config) - trained),
        "transposed": transposed_bytes(job),
        "masters": acc * job.held(trained),
        "low_precision": low_precision,
        "moments": acc * job.held(job.num_moments),
    }
