"""What a step holds and computes as one thing at a time grows, counted beside what the planner says.

    PYTHONPATH=.:kernels python bench/scaling.py

Axes: tokens of a micro-batch (more sequences), tokens of a sequence (fewer of them, so that the micro-batch stays),
number of new blocks, where they stand, width and depth of the model. One base geometry, of which each point of an axis
changes one extent; random weights and tokens, our decoder, one micro-batch a step, nothing recomputed.

    memory   at the fullest of a whole optimizer step, everything allocated before it included
             (bench/peak_bytes.py; on a GPU `torch.cuda.max_memory_allocated`), beside `planning.memory`
    work     by PyTorch's FLOP counter with the formulas of our operations, beside `planning.cost`. Attention's
             count is of what is computed: backward 2.5 times forward, and a token sees itself, so that a sequence of S
             has S(S + 1)/2 pairs; the planner's S²/2 is put into these terms

The bench ends with 1 where memory is off by more than 5 % or a FLOP is. Not here: evaluation, several micro-batches a
step and recomputation, which the planner covers too (tests/planning).
"""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import common
import torch
from contestants import build_ours, our_job
from memory import by_kind
from peak_bytes import PeakBytes
from torch.utils.flop_counter import FlopCounterMode
from workload import OPTIM, Size, Workload, base_shape

from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.model.policy import Recompute
from llama_pro_fast.planning.cost import step_cost
from llama_pro_fast.planning.memory import step_memory
from llama_pro_fast.planning.search import flash_backward_flops, upper_half
from llama_pro_fast.training.optimizer import Optimizer

TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Point(Workload):
    """A model and a micro-batch.

    Attributes:
        layers, hidden: of the base; heads are 32 wide on a CPU and 128 on a GPU, two of them to a key head.
        after: the base's blocks that are followed by a new one.
    """

    layers: int
    hidden: int
    after: tuple[int, ...]

    @property
    def shape(self) -> Size:
        heads = self.hidden // (128 if self.device == "cuda" else 32)
        base = base_shape(self.layers, self.hidden, self.hidden * 43 // 16, heads, heads // 2, 8 * self.hidden)
        return Size("", base, groups=0, seq=self.seq, micro_batch=self.micro_batch, steps=self.steps)

    @cached_property
    def plan(self) -> ExpansionPlan:
        return ExpansionPlan.from_after(self.layers, list(self.after))


def interleaved(layers: int, new: int) -> tuple[int, ...]:
    return tuple((group + 1) * layers // new - 1 for group in range(new))


def base_point(device: str) -> Point:
    layers, hidden, new, seq = (16, 2048, 4, 1024) if device == "cuda" else (8, 256, 2, 128)
    step = {"size": "", "seq": seq, "micro_batch": 1, "steps": 1, "warmup": 0, "device": device}
    return Point(**step, layers=layers, hidden=hidden, after=interleaved(layers, new))


def axes(base: Point) -> dict[str, dict[str, Point]]:
    """Name of the axis -> name of the point -> point, from small to large."""
    layers, new, seq, batch = base.layers, len(base.after), base.seq, base.micro_batch
    places = {"top": range(layers - new, layers), "upper half": upper_half(layers, new)}
    places |= {"interleaved": base.after, "bottom": range(new)}
    halves, doubled = (1, 2, 3, 4), (1, 2, 4, 8)
    return {
        "tokens of a micro-batch": {str(n * batch * seq): replace(base, micro_batch=n * batch) for n in doubled},
        # Lengths are compared at one number of tokens, else they would repeat the axis above.
        "tokens of a sequence": {
            str(n * seq): replace(base, seq=n * seq, micro_batch=8 * batch // n) for n in doubled
        },
        "new blocks": {str(n): replace(base, after=interleaved(layers, n)) for n in doubled},
        "where new blocks stand": {name: replace(base, after=tuple(after)) for name, after in places.items()},
        "width": {str(n * base.hidden // 2): replace(base, hidden=n * base.hidden // 2) for n in halves},
        "depth": {
            str(n * layers // 2): replace(base, layers=n * layers // 2, after=interleaved(n * layers // 2, new))
            for n in halves
        },
    }  # fmt: skip


def measure(point: Point) -> dict[str, int]:
    """Bytes at the fullest of a step, those before it included; FLOPs of products and of attention."""
    runner = build_ours(point)
    optimizer = Optimizer(runner.model, runner.trained, OPTIM, 3)
    tokens = next(point.token_batches())

    def step(index: int) -> None:
        # The batch is made here, as it is part of what a step holds.
        loss = runner.loss(runner.prepare(tokens))
        loss.backward()
        del loss
        optimizer.step(index)

    step(0)
    with FlopCounterMode(display=False) as counter:
        step(1)
    gc.collect()
    if point.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step(2)
        peak = torch.cuda.max_memory_allocated()
    else:
        held = [*runner.model.parameters(), *runner.model.buffers(), *optimizer.state().values()]
        with PeakBytes() as beyond:
            step(2)
        peak = sum({t.data_ptr(): t.untyped_storage().nbytes() for t in held}.values()) + beyond.bytes
    work = by_kind(counter, "made")
    return {"peak_bytes": peak, "product_flops": work["products made"], "attention_flops": work["attention made"]}


def predict(point: Point) -> dict[str, int]:
    """The same by the planner."""
    job, config = our_job(point), point.config
    cost = step_cost(config, point.trained, seq_len=point.seq)
    policies = [Recompute.NONE] * config.num_hidden_layers
    attention = point.micro_batch * (cost.attention + flash_backward_flops(job)) * (point.seq + 1)
    return {
        "peak_bytes": step_memory(job, policies, micro_batch_size=point.micro_batch, accumulating=False).total,
        "product_flops": round(point.micro_batch * point.seq * (cost.total - cost.attention)),
        "attention_flops": round(attention),
    }


def wrong(rows: list[dict[str, Any]]) -> list[str]:
    """What is not as the planner says, in words."""
    said = []
    for row in rows:
        for key in ("peak_bytes", "product_flops", "attention_flops"):
            counted, predicted = row[key], row[f"{key}_predicted"]
            if abs(predicted / counted - 1) > TOLERANCE if key == "peak_bytes" else counted != predicted:
                said.append(f"{row['axis']}, {row['point']}: {key} {counted:,}, the planner says {predicted:,}")
    return said


def main(argv: list[str] | None = None) -> int:
    options = common.parser(__doc__, out="scaling-DEVICE").parse_args(argv)
    if options.device == "cpu":
        torch.set_num_threads(1)  # attention's scratch is per thread
    facts = common.provenance(options.device) | {"attention": our_job(base_point(options.device)).attention}
    out = options.out or common.result_file("scaling", facts["device"])
    rows: list[dict[str, Any]] = []
    for axis, points in axes(base_point(options.device)).items():
        for name, point in points.items():
            predicted = {f"{key}_predicted": value for key, value in predict(point).items()}
            rows.append({"axis": axis, "point": name, **measure(point), **predicted})
            common.write_json(out, {**facts, "tolerance": TOLERANCE, "rows": rows})
    said, off = wrong(rows), [row["peak_bytes_predicted"] / row["peak_bytes"] - 1 for row in rows]
    cells = [
        [f"{row['axis']}, {row['point']}", f"{row['peak_bytes'] / 2**20:,.1f}", f"{share:+.2%}",
         *(f"{row[key] / 1e9:,.3f}" for key in ("product_flops", "attention_flops"))]
        for row, share in zip(rows, off, strict=True)
    ]  # fmt: skip
    print(common.table(["", "peak MiB", "plan off by", "GFLOP of products", "of attention"], cells))
    print(f"written to {out}")
    print("\n".join(said) or f"AS PLANNED: memory within {max(map(abs, off)):.2%} of what was counted, work equal")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
