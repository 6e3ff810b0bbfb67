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

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llama_pro_fast.hf.families import hf_parts
from llama_pro_fast.model.block import BlockClass, Recompute
from llama_pro_fast.model.spec import BlockSpec
from llama_pro_fast.planning.cost import activation_bytes, kept_bytes, matrices, num_parameters
from llama_pro_fast.planning.job import Job
from llama_pro_kernels import accumulation_dtype, rows_per_chunk
from llama_pro_kernels.attention_selection import BACKENDS
from llama_pro_kernels.reference import DSCALE_ROWS

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
        "weights", "masters", "low_precision", "moments", "gradients", "kept_frozen", "kept_trained", "logits",
        "transient",
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
        transient = _backward_peak(
            spec, kind, recompute[index], need_dx, job.dtype, job.triton, job.attention, tokens, micro_batch_size,
            job.documents(micro_batch_size), job.shards > 1, accumulating and job.shards == 1,
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
    block += _together(spec, BlockClass.TRAINED, acc) if job.shards > 1 else 0
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


def _together(spec: BlockSpec, block_class: BlockClass, acc: int, blocks: int = 2) -> int:
    """Of a sharded block, beside what any has: its weights put together, and as much again that is gathered into them;
    in backward as much of the block before it, gathered ahead, and of the one behind it, whose gradients are sent."""
    return blocks * acc * spec.num_parameters() if block_class is BlockClass.TRAINED else 0


def has_low_precision(block_class: BlockClass, dtype: torch.dtype) -> bool:
    """Whether products are made of a low-precision copy, kept or not."""
    return block_class is BlockClass.TRAINED and dtype != accumulation_dtype(dtype)


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
        "masters": acc * job.held(trained),
        "low_precision": low_precision,
        "moments": acc * job.held(job.num_moments),
    }


@functools.lru_cache(maxsize=4096)
def _backward_peak(
    spec: BlockSpec,
    block_class: BlockClass,
    recompute: Recompute,
    need_dx: bool,
    dtype: torch.dtype,
    triton: bool,
    attention: str,
    tokens: int,
    sequences: int,
    documents: int,
    sharded: bool,
    summed: bool,
) -> int:
    """Bytes that a block's backward needs at its fullest, beyond what the blocks up to it keep.

    It follows `block._DecoderBlock.backward` line by line: the incoming gradient, then each product with what is alive
    beside it. Per-token sizes first, weights' gradients behind.
    """
    element, acc = dtype.itemsize, accumulation_dtype(dtype).itemsize
    trained, copied = block_class is BlockClass.TRAINED, not triton and element != acc
    H, I, Q, KV = spec.hidden_size, spec.intermediate_size, spec.q_size, spec.kv_size
    hidden, inner, q, kv = element * H, element * I, element * Q, element * KV
    qkv = q + 2 * kv
    sizes = activation_bytes(spec, dtype)

    def recomputed(*names: str) -> int:
        return sum(sizes[name] for name in names if name not in recompute.kept)

    def cast(name: str) -> int:
        # The copy of a master that keeps none, around its products. Of down_proj and o_proj it is never the fullest.
        made = has_low_precision(block_class, dtype) and (recompute is Recompute.BLOCK or sharded)
        return element * matrices(spec)[f"{name}.weight"] if made else 0

    # Gradients of the weights, each alive until the block is done, but for those that are added to what is there; and
    # scratch on the way to a norm's.
    def dw(*names: str) -> int:
        return acc * sum(matrices(spec)[f"{name}.weight"] for name in names) if trained and not summed else 0

    def dscale(rows: int) -> int:
        # The reference casts the weight's rows as well; the kernel's sums are a megabyte.
        return acc * H * min(rows, DSCALE_ROWS) * (2 if copied else 1) if trained and not triton else 0

    # Temporaries of the reference; a Triton kernel has none.
    norm_forward = 2 * acc * H if copied else 0
    norm_backward = 0 if triton else (4 * acc * H - hidden if copied else 2 * acc * H)
    swiglu_backward = 0 if triton else acc * I * (6 if copied else 3)
    rotation = 0 if triton else 3 * acc * max(Q, KV) // 2 + 2 * acc * spec.head_dim
    head_norms = 0 if triton else 4 * acc * Q
    upcast = acc if copied and trained else 0  # of rows, for a weight's gradient

    # (bytes a token, bytes), from dy to d(gate, up) and ds
    mlp = hidden + recomputed("s", "post_rstd", "gate_up")
    if "o" not in recompute.kept:
        mlp += recomputed("rstd", "qkv", "o", "lse")
    normed = hidden + max(norm_forward, upcast * (H + 2 * I))
    made = dw("down_proj", "gate_up_proj")
    copy = cast("gate_up_proj")
    phases = [
        (mlp + (hidden + norm_forward if recomputed("gate_up") else 0), copy),
        (mlp + inner + (inner if trained else 0) + swiglu_backward, 0),
        (mlp + inner + (inner if trained else 0) + upcast * (H + I), dw("down_proj")),
        (mlp + (normed if trained else 0), made + copy),
        (mlp, made + copy + dscale(2 * I)),
        (mlp + 2 * hidden + norm_backward, made + copy),
    ]
    # from ds to d(q, k, v) and dx
    branch = 2 * hidden + recomputed("rstd", "qkv")
    if "o" not in recompute.kept:
        branch += recomputed("o", "lse")
    scratch, scores = _attention_scratch(attention, spec, element, acc, tokens, sequences, documents)
    phases += [
        (branch + (hidden + norm_forward if recomputed("qkv") else 0), made),
        (branch + q + (q + kv if spec.qk_norm else 0) + qkv + scratch, made + scores),
        (branch + 2 * qkv + (head_norms if spec.qk_norm else rotation), made),
    ]
    after = branch - recomputed("qkv") + qkv
    normed = hidden + max(norm_forward, upcast * (H + Q + 2 * KV))
    made = dw("down_proj", "gate_up_proj", "o_proj", "qkv_proj") + cast("qkv_proj")
    phases += [
        (after + upcast * (H + Q), made - dw("qkv_proj")),
        (after + (normed if trained else 0), made),
        (after, made + dscale(Q + 2 * KV)),
    ]
    if need_dx:
        phases.append((after + 2 * hidden + norm_backward, made))
    fullest = max(tokens * per_token + constant for per_token, constant in phases)
    return fullest + (_together(spec, block_class, acc, blocks=3) if sharded else 0)


def _attention_scratch(
    backend: str, spec: BlockSpec, element: int, acc: int, tokens: int, sequences: int, documents: int
) -> tuple[int, int]:
    """What a backend's backward allocates beside its results: bytes a token, and bytes.

    A backend for the CPU takes one document at a time; the longest is a sequence.
    """
    q, kv = spec.q_size, spec.kv_size
    grouped = spec.num_kv_heads < spec.num_heads
    # dq is summed in float32, in rows of heads rounded up, beside a number a head and row. Each document has a block of
    # rows more than it has tokens.
    head = -(-spec.head_dim // 32) * 32 if spec.head_dim <= 128 else -(-spec.head_dim // 64) * 64
    if backend in ("flash", "flash_attn"):
        row = 4 * spec.num_heads * (head + 1)
        # dk and dv are made for every query head where heads share them.
        return row + (2 * element * q if grouped else 0), 128 * documents * row
    if backend in ("flash_3", "flash_4"):
        # Two numbers beside dq: o·do and lse. Where heads share dk and dv, these are summed in float32 as well, in
        # blocks of their own. Blocks are capability 9's; on 10 flash_4 has up to 128 and 256 rows.
        if backend == "flash_3":
            head = max(head, 64)
        queries, keys = 128 if head <= 64 else 64, 128 if head <= 128 else 96 if head <= 192 else 80
        row, shared = 4 * spec.num_heads * (head + 2), 2 * 4 * spec.num_kv_heads * head if grouped else 0
        return row + shared, documents * (queries * row + keys * shared)
    if backend == "cudnn":  # copies of q, k, v, o and do besides
        return 4 * q + 3 * element * q + 2 * element * kv, 0
    if backend == "reference":
        length = tokens // sequences
        document = acc * (5 * q + 4 * kv) if element != acc else 2 * element * (q + kv)
        return document // sequences, 2 * acc * spec.num_heads * length * length
    assert backend == "cpu_flash", backend
    document = element * (3 * q + 2 * kv) + (3 * acc * q if element != acc else 0)
    return document // sequences, 0
