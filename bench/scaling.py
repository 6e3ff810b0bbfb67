"""What a step costs as one thing at a time grows, measured beside what the planner says.

    PYTHONPATH=.:kernels python bench/scaling.py

Axes: tokens of a micro-batch (more sequences), tokens of a sequence (fewer of them, so that the micro-batch stays),
number of new blocks, where they stand, width and depth of the model. One base geometry, of which each point of an axis
changes one extent; random weights and tokens, our decoder, one micro-batch a step, nothing recomputed.

    memory   counted at the fullest moment of a whole optimizer step, everything allocated before it included
             (bench/peak_bytes.py; on a GPU `torch.cuda.max_memory_allocated`), beside `llama_pro_fast.memory`
    work     by PyTorch's FLOP counter with the formulas of our operations, as in bench/memory.py, beside
             `llama_pro_fast.cost`. Attention's count is of what is computed: backward 2.5 times forward, and a token
             sees itself, so that a sequence of S has S(S + 1)/2 pairs; the planner's S²/2 is put into these terms
    time     the median of a few steps, as a multiple of that of the axis' first point, beside the same multiple of the
             planner's prediction. The points of an axis take turns, so that drift hits all alike. On a CPU it is
             processor time of a single thread, which what else the machine does disturbs least; on a GPU the clock's

The bench ends with 1 where memory is off by more than 5 % or a FLOP is. Time is shown and not judged: a small model
on a CPU is not bound by its products alone, and the planner knows this device's speed only in name. Not measured:
evaluation, several micro-batches a step and recomputation, which the planner covers too (tests/planning).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import common
import torch
from block_counts import by_kind
from contestants import build_ours
from peak_bytes import PeakBytes
from torch.utils.flop_counter import FlopCounterMode
from workload import OPTIM, Runner, Size, Workload, base_shape

from llama_pro_fast.block import Recompute
from llama_pro_fast.devices import GIB, SHARE, cpu, present
from llama_pro_fast.expansion import ExpansionPlan
from llama_pro_fast.memory import Job
from llama_pro_fast.optimizer import Optimizer
from llama_pro_fast.planner import Fit, fit, flash_backward_flops, upper_half
from llama_pro_kernels import implementation_name, select_attention_backend

TOLERANCE = 0.05
PICTURE = common.ROOT / "docs" / "pictures" / "scaling.png"


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
        return Size(base=base, groups=0, seq=self.seq, micro_batch=self.micro_batch, steps=self.steps)

    @cached_property
    def plan(self) -> ExpansionPlan:
        return ExpansionPlan.from_after(self.layers, list(self.after))

    @cached_property
    def job(self) -> Job:
        device = torch.device(self.device)
        attention = select_attention_backend(
            device, self.dtype, head_dim=self.hidden // self.config.num_attention_heads
        )
        return Job(
            config=self.config,
            trained_blocks=tuple(self.trained_blocks),
            dtype=self.dtype,
            seq_len=self.seq,
            attention=attention,
            triton=implementation_name(device, self.dtype).startswith("triton"),
            document=self.seq,
        )

    @property
    def predicted(self) -> Fit:
        return fit(
            self.job,
            present() if self.device == "cuda" else cpu(),
            batch_size=self.micro_batch,
            micro_batch_size=self.micro_batch,
            recompute=[Recompute.NONE] * self.config.num_hidden_layers,
            share=SHARE,
        )

    def predicted_attention(self, planned: float) -> int:
        """FLOPs of a step in the counter's terms, from the planner's of a token."""
        return round(self.micro_batch * (planned + flash_backward_flops(self.job)) * (self.seq + 1))


def interleaved(layers: int, new: int) -> tuple[int, ...]:
    return tuple((group + 1) * layers // new - 1 for group in range(new))


def axes(base: Point) -> dict[str, list[tuple[str, Point]]]:
    """Name of the axis -> (name of the point, point), from small to large."""
    layers, new = base.layers, len(base.after)
    top, upper = tuple(range(layers - new, layers)), tuple(upper_half(layers, new))
    # Lengths are compared at one number of tokens, else they would repeat the axis above.
    sequences = 8 * base.micro_batch
    return {
        "tokens of a micro-batch": [
            (str(n * base.micro_batch * base.seq), replace(base, micro_batch=n * base.micro_batch))
            for n in (1, 2, 4, 8)
        ],
        "tokens of a sequence": [
            (str(n * base.seq), replace(base, seq=n * base.seq, micro_batch=sequences // n)) for n in (1, 2, 4, 8)
        ],
        "new blocks": [(str(n), replace(base, after=interleaved(layers, n))) for n in (1, 2, 4, 8)],
        "where new blocks stand": [
            ("top", replace(base, after=top)),
            ("upper half", replace(base, after=upper)),
            ("interleaved", replace(base, after=interleaved(layers, new))),
            ("bottom", replace(base, after=tuple(range(new)))),
        ],
        "width": [(str(n * base.hidden // 2), replace(base, hidden=n * base.hidden // 2)) for n in (1, 2, 3, 4)],
        "depth": [
            (str(n * layers // 2), replace(base, layers=n * layers // 2, after=interleaved(n * layers // 2, new)))
            for n in (1, 2, 3, 4)
        ],
    }


class Measured:
    """A point, built: what its step holds and computes, and how long it takes."""

    def __init__(self, point: Point) -> None:
        self.point, self.steps = point, 0
        self.runner: Runner = build_ours(point)
        self.optimizer = Optimizer(self.runner.model, self.runner.trained, OPTIM, 1000)
        self.optimizer.state()
        self.tokens = next(point.token_batches())
        self.seconds: list[float] = []

    def step(self) -> None:
        # The batch is made here, as it is part of what a step holds.
        loss = self.runner.loss(self.runner.prepare(self.tokens))
        loss.backward()
        del loss
        self.optimizer.step(self.steps)
        self.steps += 1

    def peak(self, others: int) -> int:
        """Bytes allocated at the fullest moment of a step, those before it included and the ``others`` not."""
        self.step()
        gc.collect()
        if self.point.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.step()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - others
        with PeakBytes() as peak:
            self.step()
        return self.own_bytes() + peak.bytes

    def own_bytes(self) -> int:
        """Of weights, tables and moments."""
        state = [tensor for values in self.optimizer.adamw.state.values() for tensor in values.values()]
        tensors = [*self.runner.model.parameters(), *self.runner.model.buffers(), *state]
        return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())

    def work(self) -> tuple[int, int]:
        """FLOPs of products and of attention."""
        with FlopCounterMode(display=False) as counter:
            self.step()
        counted = by_kind(counter, "made")
        return counted["products made"], counted["attention made"]

    def time(self) -> None:
        clock = time.process_time
        if self.point.device == "cuda":
            clock = time.perf_counter
            torch.cuda.synchronize()
        start = clock()
        self.step()
        if self.point.device == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(clock() - start)


def measure_axis(points: list[tuple[str, Point]], rounds: int) -> list[dict[str, Any]]:
    """A row for each point."""
    built = [Measured(point) for _, point in points]
    rows = []
    for (name, point), measured in zip(points, built, strict=True):
        tokens, predicted = point.micro_batch * point.seq, point.predicted
        cost = predicted.cost
        others = sum(other.own_bytes() for other in built if other is not measured)
        peak, (products, attention) = measured.peak(others), measured.work()
        rows.append(
            {
                "point": name,
                "tokens": tokens,
                "trained_blocks": point.trained_blocks,
                "layers": point.config.num_hidden_layers,
                "hidden": point.hidden,
                "sequences": point.micro_batch,
                "peak_bytes": peak,
                "peak_bytes_predicted": predicted.memory.total,
                "moment": predicted.memory.moment,
                "product_flops": products,
                "product_flops_predicted": round(tokens * (cost.forward + cost.dx + cost.dw)),
                "attention_flops": attention,
                "attention_flops_predicted": point.predicted_attention(cost.attention),
                "seconds_predicted": tokens * predicted.seconds,
            }
        )
    for turn in range(rounds):
        at = turn % len(built)
        for measured in built[at:] + built[:at]:
            measured.time()
    for row, measured in zip(rows, built, strict=True):
        row["seconds"] = statistics.median(measured.seconds)
    return rows


def wrong(rows: list[dict[str, Any]]) -> list[str]:
    """What is not as the planner says, in words."""
    said = []
    for row in rows:
        off = row["peak_bytes_predicted"] / row["peak_bytes"] - 1
        if abs(off) > TOLERANCE:
            said.append(f"{row['axis']} {row['point']}: the planner's memory is off by {off:+.1%}")
        for kind in ("product", "attention"):
            counted, predicted = row[f"{kind}_flops"], row[f"{kind}_flops_predicted"]
            if counted != predicted:
                said.append(f"{row['axis']} {row['point']}: {counted:,} {kind} FLOPs, the planner says {predicted:,}")
    return said


def show(rows: list[dict[str, Any]]) -> str:
    def compared(row: dict[str, Any], kind: str) -> str:
        counted, predicted = row[f"{kind}_flops"], row[f"{kind}_flops_predicted"]
        return "equal" if counted == predicted else f"{predicted / counted - 1:+.2%}"

    cells = [
        [
            row["point"],
            f"{row['peak_bytes'] / 2**20:,.1f}",
            f"{row['peak_bytes_predicted'] / 2**20:,.1f}",
            f"{row['peak_bytes_predicted'] / row['peak_bytes'] - 1:+.2%}",
            f"{(row['product_flops'] + row['attention_flops']) / 1e9:,.2f}",
            compared(row, "product"),
            compared(row, "attention"),
            f"{1e3 * row['seconds']:,.1f}",
            f"{row['seconds'] / rows[0]['seconds']:.2f}",
            f"{row['seconds_predicted'] / rows[0]['seconds_predicted']:.2f}",
        ]
        for row in rows
    ]
    columns = ["peak MiB", "planned", "off", "GFLOP", "products", "attention", "step ms", "x first", "planned"]
    return common.table([rows[0]["axis"], *columns], cells)


def draw(rows: list[dict[str, Any]], path: Path, device: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row["axis"] for row in rows))
    unit, divisor = ("GiB", GIB) if max(row["peak_bytes"] for row in rows) > GIB else ("MiB", 2**20)
    clock = "processor time, one thread" if device == "CPU" else "wall clock"
    # 84 pixels an inch in a README of 900, so that 10 points are about 12 pixels there.
    figure = plt.figure(figsize=(10.7, 9.2), layout="constrained")
    figure.suptitle(f"A step's memory, work and time, planned and measured ({device}; {clock})", fontsize=13)
    bands = [names[at : at + 3] for at in range(0, len(names), 3)]
    handles: dict[str, Any] = {}
    for band, part in zip(bands, figure.subfigures(len(bands), 1, squeeze=False).flat, strict=True):
        grid = part.subplots(2, 3, sharex="col", squeeze=False)
        for empty in grid[:, len(band) :].flat:
            empty.remove()
        for column, axis in zip(grid.T, band, strict=False):
            points = [row for row in rows if row["axis"] == axis]
            labels = [row["point"] for row in points]
            # True to scale where there is one, so that what grows in proportion is a straight line.
            numbers = all(label.isdigit() for label in labels)
            places = [int(label) for label in labels] if numbers else list(range(len(labels)))
            memory, growth = column
            planned = [row["peak_bytes_predicted"] / divisor for row in points]
            handles["planned memory, time"] = memory.plot(places, planned, color="tab:blue")[0]
            counted = [row["peak_bytes"] / divisor for row in points]
            handles["measured memory, time"] = memory.plot(places, counted, "o", color="tab:orange", markersize=7)[0]
            growth.plot(places, relative(points, "seconds_predicted"), color="tab:blue")
            work = relative(points, "product_flops", "attention_flops")
            style = {"markersize": 9, "markerfacecolor": "none", "markeredgewidth": 1.5}
            handles["FLOPs counted"] = growth.plot(places, work, "s", color="tab:gray", **style)[0]
            growth.plot(places, relative(points, "seconds"), "o", color="tab:orange", markersize=7)
            for plot in column:
                plot.grid(alpha=0.3)
                plot.margins(x=0.08)
                plot.set_ylim(0, 1.12 * plot.dataLim.y1)
                plot.tick_params(labelsize=10)
            growth.set_xticks(places, labels)
            growth.set_xlabel(axis, fontsize=12)
        grid[0, 0].set_ylabel(f"memory, {unit}", fontsize=12)
        grid[1, 0].set_ylabel("× the first point", fontsize=12)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=11, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def relative(points: list[dict[str, Any]], *keys: str) -> list[float]:
    """Of each point the sum of ``keys``, as a multiple of the first point's."""
    sums = [sum(row[key] for key in keys) for row in points]
    return [value / sums[0] for value in sums]


def base_point(device: str) -> Point:
    large = device == "cuda"
    return Point(
        size="",
        seq=1024 if large else 128,
        micro_batch=1,
        steps=1,
        warmup=0,
        device=device,
        layers=16 if large else 8,
        hidden=2048 if large else 256,
        after=interleaved(16 if large else 8, 4 if large else 2),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each point (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="default: bench/results/scaling-DEVICE.json")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds: {options.rounds} is below 1")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        # Several threads wait for each other, busily, whenever another program holds a core.
        torch.set_num_threads(1)
    name = common.device_name(device)
    out = options.out or common.RESULTS / f"scaling-{common.slug(name)}.json"
    rows: list[dict[str, Any]] = []
    for axis, points in axes(base_point(device)).items():
        found = [{"axis": axis, **row} for row in measure_axis(points, options.rounds)]
        rows += found
        result = {
            "device": name,
            "commit": common.commit(),
            "versions": common.versions(),
            "command": common.command(),
            "threads": torch.get_num_threads(),
            "clock": "processor time" if device == "cpu" else "wall clock",
            "rounds": options.rounds,
            "attention": base_point(device).job.attention,
            "tolerance": TOLERANCE,
            "rows": rows,
        }
        common.write_json(out, result, row_per_line="rows")
        print(show(found) + "\n", flush=True)
    draw(rows, options.picture, "CPU" if device == "cpu" else name)
    print(f"written to {out} and {options.picture}")
    said = wrong(rows)
    furthest = max((abs(row["peak_bytes_predicted"] / row["peak_bytes"] - 1) for row in rows), default=0.0)
    print("\n".join(said) or f"AS PLANNED: memory within {furthest:.2%} of what was counted, work equal")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
