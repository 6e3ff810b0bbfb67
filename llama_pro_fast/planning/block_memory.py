"""What one block's backward needs at its fullest, from the shapes alone: block.py, read as bytes."""

from __future__ import annotations

import functools

import torch

from llama_pro_fast.model.policy import BlockClass, Recompute
from llama_pro_fast.model.spec import BlockSpec
from llama_pro_fast.planning.cost import activation_bytes, matrices
from llama_pro_kernels import accumulation_dtype
from llama_pro_kernels.linear import fits_e4m3
from llama_pro_kernels.reference import DSCALE_ROWS


def together(spec: BlockSpec, block_class: BlockClass, acc: int, blocks: int = 2) -> int:
    """Of a sharded block, beside what any has: its weights put together, and as much again that is gathered into them;
    in backward as much of the block before it, gathered ahead, and of the one behind it, whose gradients are sent."""
    return blocks * acc * spec.num_parameters() if block_class is BlockClass.TRAINED else 0


def has_low_precision(block_class: BlockClass, dtype: torch.dtype) -> bool:
    """Whether products are made of a low-precision copy, kept or not."""
    return block_class is BlockClass.TRAINED and dtype != accumulation_dtype(dtype)


@functools.lru_cache(maxsize=4096)
def backward_peak(
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
    eight_bits: bool,
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
    head_norms = 0 if triton else acc * (4 * Q + 3 * spec.num_heads)
    upcast = acc if copied and trained else 0  # of rows, for a weight's gradient

    # In eight bits: codes with a scale a token, in place of a gradient or beside dy and ds. The reference makes
    # them when its other temporaries are gone, and multiplies in the accumulation dtype.
    def in_codes(name: str) -> bool:
        return eight_bits and fits_e4m3(spec.shapes()[f"{name}.weight"])

    def codes(name: str, width: int) -> int:
        return width + 4 if in_codes(name) else 0

    def product(name: str) -> tuple[int, int]:
        rows, columns = spec.shapes()[f"{name}.weight"]
        reference = in_codes(name) and not triton
        return (acc * rows + (acc - element) * columns, acc * rows * columns) if reference else (0, 0)

    def with_codes(scratch: int, then: int, beside: int) -> int:
        return scratch + beside if triton else max(scratch, then + beside)

    wide = Q + 2 * KV
    dy_codes, ds_codes = codes("down_proj", H), codes("o_proj", H)
    dgate_up, dqkv = codes("gate_up_proj", 2 * I), codes("qkv_proj", wide) or qkv
    upcast_rows = acc * H if copied else 0
    ds_backward = with_codes(norm_backward + (upcast_rows if ds_codes else 0), acc * H + 2 * upcast_rows, ds_codes)
    if dgate_up:
        scratch = 0 if triton else acc * I * (8 if copied else 5)
        swiglu_backward = with_codes(scratch, 4 * acc * I, dgate_up)
    turn_back = qkv + (head_norms if spec.qk_norm else rotation)
    if in_codes("qkv_proj"):
        made_wide = 0 if triton else acc * wide
        copies = made_wide if copied else 0
        scratch = copies + made_wide + (head_norms if spec.qk_norm else rotation)
        turn_back = with_codes(scratch, copies + 2 * made_wide, dqkv)

    # (bytes a token, bytes), from dy to d(gate, up) and ds
    mlp = hidden + recomputed("s", "post_rstd", "gate_up")
    if "o" not in recompute.kept:
        mlp += recomputed("rstd", "qkv", "o", "lse")
    # d(gate, up) has gate_up's place, or is in codes and gate_up is gone, if it was recomputed.
    behind = mlp + (dgate_up - recomputed("gate_up") if dgate_up else 0)
    normed = hidden + max(norm_forward, upcast * (H + 2 * I))
    made = dw("down_proj", "gate_up_proj")
    copy = cast("gate_up_proj")
    phases = [
        (mlp + (hidden + norm_forward if recomputed("gate_up") else 0), copy),
        (mlp + dy_codes + inner + product("down_proj")[0], product("down_proj")[1]),
        (mlp + inner + (inner if trained else 0) + swiglu_backward, 0),
        (mlp + inner + (inner if trained else 0) + upcast * (H + I), dw("down_proj")),
        (mlp + (normed if trained else 0), made + copy),
        (mlp, made + copy + dscale(2 * I)),
        (behind + hidden + product("gate_up_proj")[0], product("gate_up_proj")[1]),
        (behind + 2 * hidden + ds_backward, made + copy),
    ]
    # from ds to d(q, k, v) and dx
    branch = 2 * hidden + recomputed("rstd", "qkv")
    if "o" not in recompute.kept:
        branch += recomputed("o", "lse")
    scratch, scores = attention_scratch(attention, spec, element, acc, tokens, sequences, documents)
    phases += [
        (branch + (hidden + norm_forward if recomputed("qkv") else 0), made),
        (branch + ds_codes + q + product("o_proj")[0], product("o_proj")[1]),
        (branch + q + (q + kv if spec.qk_norm else 0) + qkv + scratch, made + scores),
        (branch + qkv + turn_back, made),
    ]
    after = branch - recomputed("qkv") + dqkv
    normed = hidden + max(norm_forward, upcast * (H + Q + 2 * KV))
    made = dw("down_proj", "gate_up_proj", "o_proj", "qkv_proj") + cast("qkv_proj")
    phases += [
        (after + upcast * (H + Q), made - dw("qkv_proj")),
        (after + (normed if trained else 0), made),
        (after, made + dscale(Q + 2 * KV)),
    ]
    if need_dx:
        phases.append((after + hidden + product("qkv_proj")[0], made + product("qkv_proj")[1]))
        phases.append((after + 2 * hidden + norm_backward, made))
    fullest = max(tokens * per_token + constant for per_token, constant in phases)
    return fullest + (together(spec, block_class, acc, blocks=3) if sharded else 0)


def attention_scratch(
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
