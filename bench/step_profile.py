"""Where a training step's time goes: its kernels by time, the gaps between them, and whether the host ever waits.

    PYTHONPATH=.:kernels python bench/step_profile.py --size 7b

A few whole optimizer steps of ours (bench/contestants.py, as in bench/throughput.py: forward, loss, backward, clipping,
AdamW) under PyTorch's profiler, after a warm-up.

    kinds     device time by what a kernel is for. Products and attention stand beside their FLOPs
              (`llama_pro_fast.cost`, flash attention's backward with its five products) as TFLOP/s
    gaps      share of the span from the first kernel's start to the last one's end in which none runs
    waits     calls by which the host waited for the device, and copies to the host, by name; a step should have none
    launches  kernels, copies and fills of a step

A profiled step is slower than one that is not, most where the host is the bottleneck; for speed see throughput.py. On a
CPU the operators' own time is listed instead, which shows that the bench works and where a CPU spends its time.

Written: a JSON with all kernels, and with `--trace` a gzipped trace for chrome://tracing or ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import common
import torch
from contestants import CONTESTANTS
from throughput import probe
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from workload import OPTIM, SIZES, Workload

from llama_pro_fast.cost import step_cost
from llama_pro_fast.optimizer import Optimizer

KINDS = {
    "attention": r"flash|fmha|attention|attn",
    "products": r"gemm|nvjet|xmma|cutlass|cublas|\bmm\b|addmm|matmul",
    "norms": r"rms_norm|_sum_rows|dscale",
    "rotary": r"rotary",
    "SwiGLU": r"swiglu",
    "loss": r"cross_entropy",
    "optimizer": r"multi_tensor|adam|foreach",
    "copies and fills": r"memcpy|memset|copy|fill|zero_",
}
"""Kind of a kernel -> what its name holds; the first that fits. Others are "element-wise and the rest"."""
REST = "element-wise and the rest"
WAITS = re.compile(
    r"cu(da)?\w*Synchronize|cudaMemcpy$|cuda(Malloc|Free)|cuMem(Create|Unmap)|Memcpy DtoH|_local_scalar_dense"
)
LIKE_OURS = ("hf", "hf-bf16", "hf-liger", "hf-liger-bf16", "hf-compile", "hf-compile-bf16")
"""Contestants that make the same products, and none twice."""
STEP = "optimizer step under the profiler"


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), REST)


def busy(intervals: list[tuple[float, float]]) -> float:
    """Length of the union."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def profiled(workload: Workload, contestant: str, trace: Path | None) -> Any:
    """The profiler's events of ``workload.steps`` steps."""
    runner = CONTESTANTS[contestant].build(workload)
    optimizer = Optimizer(runner.model, runner.trained, OPTIM, workload.warmup + workload.steps)
    batches = [runner.prepare(tokens) for tokens in workload.token_batches()]

    def step(index: int) -> None:
        runner.loss(batches[index]).backward()
        optimizer.step(index)

    def wait() -> None:
        if workload.device == "cuda":
            torch.cuda.synchronize()

    for index in range(workload.warmup):
        step(index)
    wait()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if workload.device == "cuda" else [])
    with profile(activities=activities) as profiler:
        for index in range(workload.warmup, len(batches)):
            with record_function(STEP):
                step(index)
        wait()
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    return profiler.events()


def summarise(events: Any, workload: Workload) -> dict[str, Any]:
    """Times in milliseconds and counts, each of one step."""
    steps = workload.steps
    spans = [e.time_range for e in events if e.name == STEP and e.device_type == DeviceType.CPU]
    on_device = workload.device == "cuda"
    if on_device:
        # What a host's annotation spans on the device stands among the kernels, but is none.
        annotations = {e.name for e in events if e.device_type == DeviceType.CPU}
        work = [e for e in events if e.device_type == DeviceType.CUDA and e.name not in annotations]
        times = [(e.name, e.time_range.elapsed_us()) for e in work]
        intervals = [(e.time_range.start, e.time_range.end) for e in work]
        span = max(end for _, end in intervals) - min(start for start, _ in intervals)
        gaps = 1 - busy(intervals) / span
    else:
        work = [e for e in events if e.device_type == DeviceType.CPU and e.name != STEP]
        times = [(e.name, e.self_cpu_time_total) for e in work]
        span, gaps = sum(s.elapsed_us() for s in spans), None
    waits: dict[str, int] = defaultdict(int)
    for event in events:
        inside = any(s.start <= event.time_range.start < s.end for s in spans)
        # A copy to the host is the device's, and may come after the host has left the step.
        if WAITS.search(event.name) and (inside or event.device_type == DeviceType.CUDA):
            waits[event.name] += 1
    kernels: dict[str, list[float]] = defaultdict(list)
    for name, microseconds in times:
        kernels[name].append(microseconds)
    rows = [
        {"kernel": name, "kind": kind_of(name), "calls": len(each) / steps, "ms": sum(each) / 1e3 / steps}
        for name, each in kernels.items()
    ]
    rows.sort(key=lambda row: -row["ms"])
    by_kind: dict[str, float] = defaultdict(float)
    for row in rows:
        by_kind[row["kind"]] += row["ms"]
    cost = step_cost(workload.config, workload.trained_blocks, seq_len=workload.seq)
    tokens = workload.micro_batch * workload.seq
    # Of causal attention: forward everywhere, backward counted by cost as twice the forward, and 2.5 times with flash.
    forward_only = step_cost(workload.config, (), seq_len=workload.seq).attention
    flops = {
        "products": tokens * (cost.forward + cost.dx + cost.dw),
        "attention": tokens * (forward_only + (cost.attention - forward_only) * 1.25),
    }
    return {
        "step_ms": span / 1e3 / steps,
        "gaps": gaps,
        "launches": len(work) / steps,
        "waits": dict(waits),
        "kinds": [
            {
                "kind": kind,
                "ms": ms,
                "share": ms / sum(by_kind.values()),
                "tflops": flops[kind] / ms / 1e9 if kind in flops and ms else None,
            }
            for kind, ms in sorted(by_kind.items(), key=lambda pair: -pair[1])
        ],
        "kernels": rows,
    }


def show(result: dict[str, Any]) -> str:
    def short(name: str) -> str:
        # Arguments and namespaces of C++ names say little and fill the line.
        bare = re.sub(r"\(anonymous namespace\)::|at::native::|void |std::", "", name)
        return bare if len(bare) <= 70 else bare[:67] + "..."

    kinds = [
        [
            row["kind"],
            f"{row['ms']:.2f}",
            f"{row['share']:.1%}",
            "-" if row["tflops"] is None else f"{row['tflops']:.3g}",
        ]
        for row in result["kinds"]
    ]
    kernels = [
        [short(row["kernel"]), row["kind"], f"{row['calls']:g}", f"{row['ms']:.3f}"] for row in result["kernels"][:24]
    ]
    gaps = "" if result["gaps"] is None else f", nothing runs in {result['gaps']:.1%} of it"
    waits = ", ".join(f"{count} x {name}" for name, count in result["waits"].items()) or "none"
    return "\n".join([
        common.table(["kernel", "kind", "calls", "ms a step"], kernels),
        "",
        common.table(["kind", "ms a step", "share", "TFLOP/s"], kinds),
        f"{result['step_ms']:.1f} ms a step{gaps}; {result['launches']:.0f} launches; waits of the host: {waits}",
    ])  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    # Of others the FLOPs are not those of the table.
    parser.add_argument("--contestant", choices=[n for n in CONTESTANTS if n in ("ours", *LIKE_OURS)], default="ours")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--attention", default="auto", help="backend of ours")
    parser.add_argument("--seq", type=int)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--steps", type=int, default=2, help="under the profiler")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--out", type=Path, help="default: bench/results/step-profile-SIZE-DEVICE.json")
    parser.add_argument("--trace", type=Path, help="where a trace is to go, NAME.json.gz")
    options = parser.parse_args(argv)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    size = SIZES[options.size]
    workload = Workload(
        size=options.size,
        seq=options.seq or size.seq,
        micro_batch=options.micro_batch or size.micro_batch,
        steps=options.steps,
        warmup=options.warmup,
        device=options.device,
        attention=options.attention,
    )
    facts = probe(options.device)
    result = {
        **facts,
        "contestant": options.contestant,
        "size": options.size,
        "seq": workload.seq,
        "micro_batch": workload.micro_batch,
        "dtype": str(workload.dtype).removeprefix("torch."),
        "steps": options.steps,
        "commit": common.commit(),
        "command": common.command(),
        **summarise(profiled(workload, options.contestant, options.trace), workload),
    }
    out = options.out or common.RESULTS / f"step-profile-{options.size}-{common.slug(facts['device'])}.json"
    common.write_json(out, result, row_per_line="kernels")
    print(f"{options.contestant}, {options.size}, {workload.micro_batch} x {workload.seq} tokens on {facts['device']}")
    print(show(result))
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
