"""What a decoder block keeps for backward and which products a step makes, counted, beside what the shapes say.

    PYTHONPATH=.:kernels python bench/memory.py --check

One block of each class at the width of LLaMA-2-7B (hidden 4096, intermediate 11008, 32 heads), in bf16, and the frozen
head at its vocabulary, through the code a run takes, on a CPU. Nothing is timed; nothing depends on the machine.

Bytes: every storage of an operation's result that is alive between forward and backward, whether autograd holds it, a
context or anybody else (bench/live_storages.py), without parameters, rotary tables and the batch's layout. Two lengths
are run and the slope between them is the bytes a token keeps, so a constant can hide nothing. The formula is
`llama_pro_fast.cost.kept_bytes`.

Work: PyTorch's FLOP counter over forward and backward, with the formulas of our operations. Products beside
`llama_pro_fast.cost`; attention beside its pairs of a query and a key it sees in these ragged documents, 4·N·D a pair
forward and 10·N·D backward.

The check ends with 1 unless all are equal to the last byte and FLOP.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import common
import torch
from live_storages import LiveStorages
from torch.utils.flop_counter import FlopCounterMode

from llama_pro_fast.batch import PackedBatch
from llama_pro_fast.block import Block, BlockClass, BlockContext, Recompute
from llama_pro_fast.cost import kept_bytes, matrices, recomputed_matrices
from llama_pro_fast.families import BlockSpec
from llama_pro_kernels import linear_cross_entropy, select_attention_backend

SPEC = BlockSpec(hidden_size=4096, intermediate_size=11_008, num_heads=32, num_kv_heads=32, head_dim=128, norm_eps=1e-5)
VOCAB = 32_000
CLASSES = {
    "prefix": (BlockClass.PREFIX, False),
    "trained, the lowest": (BlockClass.TRAINED, False),
    "frozen": (BlockClass.FROZEN, True),
    "trained": (BlockClass.TRAINED, True),
}
"""Class, and whether the block's input needs a gradient: that of the lowest trained block needs none."""
ROWS = {
    name + (f", {policy.value} recomputed" if policy is not Recompute.NONE else ""): (*which, policy)
    for name, which in CLASSES.items()
    for policy in Recompute
    if policy is Recompute.NONE or which[0] is not BlockClass.PREFIX
}


def documents(tokens: int) -> list[int]:
    """Lengths of ragged documents that make ``tokens``."""
    first = tokens // 2 + 3
    return [first, 1, tokens - first - 1]


def count_block(
    block: Block, need_dx: bool, lengths: list[int], attention: str, dtype: torch.dtype
) -> tuple[int, dict[str, int]]:
    """Bytes kept between forward and backward, and FLOPs by kind: products and attention, forward and backward."""
    spec = block.spec
    batch = PackedBatch.from_documents([[0] * length for length in lengths])
    angles = torch.arange(max(lengths))[:, None] * 10_000.0 ** -(torch.arange(spec.head_dim // 2) * 2 / spec.head_dim)
    context = BlockContext.for_batch(batch, rotary_tables=(angles.cos(), angles.sin()), attention=attention)
    rows = torch.randn(sum(lengths), spec.hidden_size, dtype=dtype, requires_grad=need_dx)
    with FlopCounterMode(display=False) as forward, LiveStorages() as storages:
        # A copy made in here, which nobody but the block can keep.
        x = rows.clone()
        y = block(x, context)
        del x
    gc.collect()
    kept = storages.live_bytes(without=(y,))
    with FlopCounterMode(display=False) as backward:
        if y.requires_grad:
            y.backward(torch.randn_like(y))
    assert (rows.grad is not None) == need_dx
    block.zero_grad(set_to_none=True)
    return kept, by_kind(forward, "forward") | by_kind(backward, "backward")


def by_kind(counter: FlopCounterMode, direction: str) -> dict[str, int]:
    counts = {str(op): flops for op, flops in counter.get_flop_counts().get("Global", {}).items()}
    attention = sum(flops for op, flops in counts.items() if "attention" in op)
    return {f"products {direction}": sum(counts.values()) - attention, f"attention {direction}": attention}


def expected_work(
    spec: BlockSpec, block_class: BlockClass, need_dx: bool, recompute: Recompute, lengths: list[int]
) -> dict[str, int]:
    """The closed formulas: 2 FLOPs a weight and token for each product, 4·N·D a visible pair."""
    weights, tokens = matrices(spec), sum(lengths)
    every = 2 * tokens * sum(weights.values())
    passes, trains = block_class is not BlockClass.PREFIX, block_class is BlockClass.TRAINED
    below = 0 if need_dx else 2 * tokens * weights["qkv_proj.weight"]
    replayed = 2 * tokens * recomputed_matrices(spec, recompute)
    window = spec.window or max(lengths)
    pairs = sum(min(position + 1, window) for length in lengths for position in range(length))
    attention = 4 * spec.q_size * pairs
    return {
        "products forward": every,
        "attention forward": attention,
        "products backward": (every - below if passes else 0) + (every if trains else 0) + replayed,
        "attention backward": (attention * 5 // 2 if passes else 0) + (0 if "o" in recompute.kept else attention),
    }


def measure_block(
    spec: BlockSpec,
    block_class: BlockClass,
    need_dx: bool,
    recompute: Recompute,
    dtype: torch.dtype,
    tokens: tuple[int, int],
    attention: str,
) -> dict[str, Any]:
    """Counted and expected: bytes a token, and work of the longer of two batches of ``tokens``."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype).normal_(std=0.02, generator=generator)

    tensors = {
        name: draw((sum(shape[0] for _, shape in parts), *parts[0][1][1:])) for name, parts in spec.tensors().items()
    }
    block = Block(spec, tensors, block_class=block_class, compute_dtype=dtype, recompute=recompute)
    del tensors
    (short, _), (long, work) = (count_block(block, need_dx, documents(length), attention, dtype) for length in tokens)
    return {
        "bytes": (long - short) / (tokens[1] - tokens[0]),
        "bytes_formula": kept_bytes(spec, block_class, dtype, recompute),
        "work": work,
        "work_formula": expected_work(spec, block_class, need_dx, recompute, documents(tokens[1])),
    }


def measure_head(dtype: torch.dtype, tokens: int) -> dict[str, Any]:
    """The frozen head with the loss: two products, logits and dX."""
    x = torch.randn(tokens, SPEC.hidden_size, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB, SPEC.hidden_size, dtype=dtype)
    labels = torch.arange(tokens)
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(x, weight, labels, torch.tensor(1 / tokens)).backward()
    return {
        "work": {"products": sum(counter.get_flop_counts()["Global"].values())},
        "work_formula": {"products": 2 * 2 * tokens * SPEC.hidden_size * VOCAB},
    }


def show(rows: dict[str, dict[str, Any]]) -> str:
    def ratio(counted: float, formula: float) -> str:
        return "equal" if counted == formula else f"{counted / formula:.6f}" if formula else f"{counted:,.0f} for 0"

    def total(work: dict[str, int], kind: str) -> int:
        return sum(flops for name, flops in work.items() if name.startswith(kind))

    cells = []
    for name, row in rows.items():
        line = [name]
        line += [f"{row['bytes']:,.0f}", ratio(row["bytes"], row["bytes_formula"])] if "bytes" in row else ["-", "-"]
        for kind in ("products", "attention"):
            counted, formula = total(row["work"], kind), total(row["work_formula"], kind)
            line += [f"{counted / 1e9:,.3f}", ratio(counted, formula)] if counted or formula else ["0", "equal"]
        cells.append(line)
    return common.table(
        ["block", "kept B/token", "formula", "products GFLOP", "formula", "attention GFLOP", "formula"], cells
    )


def check(options: argparse.Namespace) -> int:
    """``memory.py --check``: 0 if all that is counted equals its formula, else 1."""
    dtype, tokens = torch.bfloat16, tuple(options.tokens)
    attention = select_attention_backend("cpu", dtype, head_dim=SPEC.head_dim)
    torch.manual_seed(0)
    rows = {name: measure_block(SPEC, *which, dtype, tokens, attention) for name, which in ROWS.items()}
    rows["frozen head"] = measure_head(dtype, tokens[1])
    print(show(rows))
    result = {
        "device": common.device_name("cpu"),
        "commit": common.commit(),
        "versions": common.versions(),
        "command": common.command(),
        "spec": vars(SPEC) | {"vocab_size": VOCAB},
        "dtype": "bfloat16",
        "attention": attention,
        "tokens": list(tokens),
        "rows": [{"block": name, **row} for name, row in rows.items()],
    }
    out = options.out or common.RESULTS / "memory-7b-cpu.json"
    common.write_json(out, result)
    equal = all(
        row["work"] == row["work_formula"] and row.get("bytes") == row.get("bytes_formula") for row in rows.values()
    )
    counted, formula = (sum(row.get(key, 0) for row in rows.values()) for key in ("bytes", "bytes_formula"))
    work, work_formula = (
        sum(sum(row[key][kind] for kind in row[key] if kind.startswith("products")) for row in rows.values())
        for key in ("work", "work_formula")
    )
    print(f"written to {out}")
    print(
        f"{'EQUAL' if equal else 'NOT EQUAL'}: products {work / work_formula:.4f} of the formula, kept bytes "
        f"{counted / formula:.4f} of the formula; {rows['frozen']['bytes']:,.0f} bytes a token in a frozen block, "
        f"{rows['trained']['bytes']:,.0f} in a trained one, {rows['prefix']['bytes']:,.0f} below"
    )
    return 0 if equal else 1
