"""What a decoder block keeps for backward and which products it makes, counted, beside what the shapes say.

    PYTHONPATH=.:kernels python bench/memory.py --check     writes no file

One block of each class at the width of LLaMA-2-7B (hidden 4096, intermediate 11008, 32 heads), in bf16, through the
code a run takes, on a CPU. Nothing is timed; nothing depends on the machine.

Bytes: all that forward has allocated and not given back when it ends, whether autograd holds it, a context or anybody
else (bench/peak_bytes.py), without its result. Two lengths are run and the slope between them is the bytes a token
keeps, so a constant can hide nothing. The formula is `planning.cost.kept_bytes`. Hugging Face's layer with SDPA is
counted in the same way, frozen in bf16, or trained in float32 under autocast.

Work: PyTorch's FLOP counter over forward and backward, with the formulas of our operations. Products beside
`planning.cost`; attention beside its pairs of a query and a key it sees in these ragged documents, 4·N·D a pair
forward and 10·N·D backward.

It ends with 1 unless all of ours are equal to the last byte and FLOP.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import common
import torch
from peak_bytes import PeakBytes
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llama_pro_fast.model.batch import BlockContext, PackedBatch
from llama_pro_fast.model.block import Block
from llama_pro_fast.model.policy import BlockClass, Recompute
from llama_pro_fast.model.spec import BlockSpec
from llama_pro_fast.planning.cost import kept_bytes, matrices, recomputed_matrices
from llama_pro_kernels import select_attention_backend

SPEC = BlockSpec(hidden_size=4096, intermediate_size=11_008, num_heads=32, num_kv_heads=32, head_dim=128, norm_eps=1e-5)
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


def rotary_tables(spec: BlockSpec, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(length)[:, None] * 10_000.0 ** -(torch.arange(spec.head_dim // 2) * 2 / spec.head_dim)
    return angles.cos(), angles.sin()


def count(forward: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> tuple[int, dict[str, int]]:
    """Bytes kept between ``forward`` of ``rows`` and its backward, and FLOPs by kind and direction."""
    with PeakBytes() as memory, FlopCounterMode(display=False) as ahead:
        # A copy made in here, which nobody but the block can keep.
        x = rows.clone()
        y = forward(x)
        del x
        gc.collect()
    kept = memory.left - y.untyped_storage().nbytes()
    with FlopCounterMode(display=False) as back:
        if y.requires_grad:
            y.backward(torch.randn_like(y))
    return kept, by_kind(ahead, "forward") | by_kind(back, "backward")


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
    recomputed = 2 * tokens * recomputed_matrices(spec, recompute)
    window = spec.window or max(lengths)
    pairs = sum(min(position + 1, window) for length in lengths for position in range(length))
    attention = 4 * spec.q_size * pairs
    return {
        "products forward": every,
        "attention forward": attention,
        "products backward": (every - below if passes else 0) + (every if trains else 0) + recomputed,
        "attention backward": (attention * 5 // 2 if passes else 0) + (0 if "o" in recompute.kept else attention),
    }


def measure_block(
    spec: BlockSpec, block_class: BlockClass, need_dx: bool, recompute: Recompute, dtype: torch.dtype,
    tokens: tuple[int, int], attention: str,
) -> dict[str, Any]:  # fmt: skip
    """Counted and expected: bytes a token, and work of the longer of two batches of ``tokens``."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape in spec.shapes().items()}
    for tensor in tensors.values():
        tensor.normal_(std=0.02, generator=generator)
    block = Block(spec, tensors, block_class=block_class, compute_dtype=dtype, recompute=recompute)
    del tensors, tensor

    def counted(length: int) -> tuple[int, dict[str, int]]:
        batch, lengths = PackedBatch.from_documents([[0] * n for n in documents(length)]), documents(length)
        tables = rotary_tables(spec, max(lengths))
        context = BlockContext.for_batch(batch, rotary_tables=tables, attention=attention)
        rows = torch.randn(length, spec.hidden_size, dtype=dtype, requires_grad=need_dx)
        found = count(lambda x: block(x, context), rows)
        assert (rows.grad is not None) == need_dx
        block.zero_grad(set_to_none=True)
        return found

    (short, _), (long, work) = map(counted, tokens)
    return {
        "bytes": (long - short) / (tokens[1] - tokens[0]),
        "bytes_formula": kept_bytes(spec, block_class, dtype, recompute),
        "work": work,
        "work_formula": expected_work(spec, block_class, need_dx, recompute, documents(tokens[1])),
    }


def hugging_face_bytes(spec: BlockSpec, *, trained: bool, tokens: tuple[int, int]) -> float:
    """Kept a token by transformers' layer with SDPA under autocast, its input needing a gradient."""
    heads = {"num_attention_heads": spec.num_heads, "num_key_value_heads": spec.num_kv_heads, "head_dim": spec.head_dim}
    sizes = {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "rms_norm_eps": spec.norm_eps,
    }
    layer = LlamaDecoderLayer(LlamaConfig(**heads, **sizes, attn_implementation="sdpa"), 0)
    layer = layer.to(torch.float32 if trained else torch.bfloat16).requires_grad_(trained).train()

    def kept(length: int) -> int:
        tables = tuple(torch.cat((t, t), dim=-1)[None].bfloat16() for t in rotary_tables(spec, length))
        rows = torch.randn(1, length, spec.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            return count(lambda x: layer(x, position_embeddings=tables), rows)[0]

    short, long = map(kept, tokens)
    return (long - short) / (tokens[1] - tokens[0])


def show(rows: dict[str, dict[str, Any]]) -> str:
    cells = []
    for name, row in rows.items():
        equal = all(row[key] == row[f"{key}_formula"] for key in ("bytes", "work"))
        work = f"{sum(row['work'].values()) / 1e9:,.3f}"
        cells.append([name, f"{row['bytes']:,.3f}", work, "equal" if equal else "DIFFERENT"])
    return common.table(["block", "kept B/token", "GFLOP", "formulas"], cells)


def main(argv: list[str] | None = None) -> int:
    parser = common.parser(__doc__, out="memory-7b-cpu", device=False)
    parser.add_argument("--check", action="store_true", help="write no file")
    parser.add_argument("--tokens", type=int, nargs=2, default=[64, 160], help="of the two batches, 16 or more")
    options = parser.parse_args(argv)
    dtype, tokens = torch.bfloat16, tuple(options.tokens)
    attention = select_attention_backend("cpu", dtype, head_dim=SPEC.head_dim)
    torch.manual_seed(0)
    rows = {name: measure_block(SPEC, *which, dtype, tokens, attention) for name, which in ROWS.items()}
    theirs = {
        name: hugging_face_bytes(SPEC, trained=name == "trained", tokens=tokens) for name in ("frozen", "trained")
    }
    print(show(rows))
    if not options.check:
        result = common.provenance("cpu") | {
            "spec": vars(SPEC),
            "dtype": "bfloat16",
            "attention": attention,
            "tokens": list(tokens),
            "hugging_face_bytes": theirs,
            "rows": [{"block": name, **row} for name, row in rows.items()],
        }
        out = options.out or common.RESULTS / "memory-7b-cpu.json"
        common.write_json(out, result)
        print(f"written to {out}")
    for name, size in theirs.items():
        ours = rows[name]["bytes"]
        print(f"a {name} block keeps {ours:,.0f} bytes a token, Hugging Face's {size:,.0f}: {ours / size:.3f} of it")
    different = [
        f"{name}: {key}" for name, row in rows.items() for key in ("bytes", "work") if row[key] != row[f"{key}_formula"]
    ]
    print(
        "NOT EQUAL: " + "; ".join(different) if different else "EQUAL: kept bytes and FLOPs are those of the formulas"
    )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
