"""Where a training step's time goes: its kernels by time, the gaps between them, and whether the host ever waits.

    PYTHONPATH=.:kernels python bench/step_profile.py --size 7b

A few whole optimizer steps of ours (forward, loss, backward, clipping, AdamW, as in throughput.py) under PyTorch's
profiler, after a warm-up.

    kernels   device time of each, with copies and fills
    gaps      share of the span from the first kernel's start to the last one's end in which none runs
    waits     calls by which the host waited for the device, and copies to the host, by name; a step should have none

A profiled step is slower than one that is not, most where the host is the bottleneck. On a CPU the operators' own time
is listed instead, which shows that the bench works. `--trace` writes a trace for chrome://tracing or ui.perfetto.dev.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import common
import torch
from contestants import CONTESTANTS
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from workload import OPTIM, SIZES, Workload

from llama_pro_fast.training.optimizer import Optimizer

WAITS = re.compile(
    r"cu(da)?\w*Synchronize|cudaMemcpy$|cuda(Malloc|Free)|cuMem(Create|Unmap)|Memcpy DtoH|_local_scalar_dense"
)
STEP = "optimizer step under the profiler"


def busy(intervals: list[tuple[float, float]]) -> float:
    """Length of the union."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def profiled(workload: Workload, trace: Path | None, contestant: str) -> Any:
    """The profiler's events of ``workload.steps`` steps."""
    runner = CONTESTANTS[contestant].build(workload)
    optimizer = Optimizer(runner.model, runner.trained, OPTIM, workload.warmup + workload.steps)
    batches = [runner.prepare(tokens) for tokens in workload.token_batches()]
    cuda = workload.device == "cuda"

    def steps(indices: range) -> None:
        for index in indices:
            with record_function(STEP):
                runner.loss(batches[index]).backward()
                optimizer.step(index)
        if cuda:
            torch.cuda.synchronize()

    steps(range(workload.warmup))
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        steps(range(workload.warmup, len(batches)))
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    return profiler.events()


def summarise(events: Any, workload: Workload) -> dict[str, Any]:
    """Times in milliseconds and counts, each of one step."""
    steps, host = workload.steps, [event for event in events if event.device_type == DeviceType.CPU]
    spans = [event.time_range for event in host if event.name == STEP]
    if workload.device == "cuda":
        # What a host's annotation spans on the device stands among the kernels, but is none.
        annotations = {event.name for event in host}
        work = [e for e in events if e.device_type == DeviceType.CUDA and e.name not in annotations]
        times = [(event.name, event.time_range.elapsed_us()) for event in work]
        intervals = [(event.time_range.start, event.time_range.end) for event in work]
        span = max(end for _, end in intervals) - min(start for start, _ in intervals)
        gaps = 1 - busy(intervals) / span
    else:
        times = [(event.name, event.self_cpu_time_total) for event in host if event.name != STEP]
        span, gaps = sum(span.elapsed_us() for span in spans), None
    # A copy to the host is the device's, and may come after the host has left the step.
    waits = Counter(
        event.name
        for event in events
        if WAITS.search(event.name)
        and (event.device_type == DeviceType.CUDA or any(s.start <= event.time_range.start < s.end for s in spans))
    )
    calls, kernels = Counter(name for name, _ in times), Counter()
    for name, microseconds in times:
        kernels[name] += microseconds / 1e3 / steps
    return {
        "step_ms": span / 1e3 / steps,
        "gaps": gaps,
        "launches": len(times) / steps,
        "waits": dict(waits),
        "kernels": [
            {"kernel": name, "calls": calls[name] / steps, "ms": ms, "share": ms / kernels.total()}
            for name, ms in kernels.most_common()
        ],
    }


def main(argv: list[str] | None = None) -> int:
    parser = common.parser(__doc__, out="step-profile-SIZE-DEVICE")
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument(
        "--contestant", choices=[name for name in CONTESTANTS if name.startswith("ours")], default="ours"
    )
    parser.add_argument("--attention", default="auto", help="backend")
    parser.add_argument("--trace", type=Path, metavar="NAME.json.gz")
    options = parser.parse_args(argv)
    size = SIZES[options.size]
    length = {"seq": size.seq, "micro_batch": size.micro_batch, "steps": 2, "warmup": 3}
    workload = Workload(size=options.size, **length, device=options.device, attention=options.attention)
    result = common.provenance(options.device) | {"size": options.size, **length, "dtype": str(workload.dtype)}
    result |= {"contestant": options.contestant}
    result |= summarise(profiled(workload, options.trace, options.contestant), workload)
    out = options.out or common.result_file(f"step-profile-{options.size}", result["device"])
    common.write_json(out, result)
    rows = [
        [k["kernel"][:80], f"{k['calls']:g}", f"{k['ms']:.3f}", f"{k['share']:.1%}"] for k in result["kernels"][:30]
    ]
    print(common.table(["kernel", "calls", "ms a step", "share"], rows))
    gaps = "" if result["gaps"] is None else f", nothing runs in {result['gaps']:.1%} of it"
    waits = ", ".join(f"{count} x {name}" for name, count in result["waits"].items()) or "none"
    print(f"{result['step_ms']:.1f} ms a step{gaps}; {result['launches']:.0f} launches; waits of the host: {waits}")
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
