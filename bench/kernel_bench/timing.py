"""Every op of a training step by the clock, beside what else there is: a part of ops.py, which says how to call it.

What is timed is in contestants.py, how in clocks.py. A row is one contestant in one op of one model.

On a GPU the calls over several input sets, together beyond three times the L2 cache, are captured in one CUDA graph,
results kept apart, so that no call finds its inputs or its output's lines in the cache and no launch gap is timed. A
sample is one replay between two events, divided by the number of calls. Work that is not timed goes before it, so that
the GPU is busy when the replay is queued: a replay more, or, where inputs are overwritten, their restoration; so
in-place ops read the same random numbers every time and never what they wrote. Contestants take turns, round by round,
each round begun by another one. A contestant that waits for the device (Liger's loss reads a count) or cannot be
captured is timed without a graph and its row says so: `"graph": false`; its launch gaps then count, as they do in a
training step.

Before anybody is timed, its result is held against ours: `max_error` is the largest difference relative to our largest
number; beyond `TOLERANCE`, or NaN, the contestant is `wrong` and not timed. A contestant that is missing or fails is a
row with that status, and the others go on.

Bandwidth of a copy and speed of a bf16 product are measured in the same run, at its start: samples of the same kind,
random numbers. On a CPU the code path is the same with the reference in place of the kernels, fp32, tiny sizes and
time.perf_counter; it shows that the bench works and nothing about speed.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from kernel_bench import report
from kernel_bench.clocks import Clock, CpuClock, CudaClock, first_line
from kernel_bench.contestants import ops
from kernel_bench.ops import Inputs, Missing, Op, Run, Setting, Tensors
from kernel_bench.shapes import MODELS, ModelShape

TOLERANCE = 2**-5
"""Largest error relative to our largest number: a few roundings of bf16 (2⁻⁸ each), far from any mistake."""

REPLAY_BYTES = 2 << 30
"""What the calls of one replay of a memory-bound op move at least: half a millisecond, a hundred times an event."""

SLOW = 2.0
"""Seconds of samples after which a contestant has had its turn, if it has three."""

TINY = ModelShape(hidden=64, intermediate=160, heads=4, kv_heads=2, head_dim=16, vocab=384)
SHAPES = MODELS | {"tiny": TINY}
SEQUENCE = 4096

DEFAULTS = {
    "cuda": {"model": "llama-2-7b", "tokens": 16384, "rounds": 20, "compile": True},
    "cpu": {"model": "tiny", "tokens": 256, "rounds": 3, "compile": False},
}


class Wrong(Exception):
    """A contestant whose result is not ours."""


@dataclass(kw_only=True)
class Entry:
    """One contestant in one op, from its set-up to its row.

    Attributes:
        runs: one for each input set; empty when it is out of the race.
        status: "ok", or what is wrong.
        lead, run: of a sample, see :class:`CudaClock`.
        no_graph: why ``run`` is not a graph; None where it is.
        max_error: against ours; None where there is nothing to compare.
        seconds: per call, a sample each.
    """

    runs: list[Run] = field(default_factory=list)
    status: str = "ok"
    lead: Callable[[], Any] = lambda: None
    run: Callable[[], Any] = lambda: None
    no_graph: str | None = None
    max_error: float | None = None
    seconds: list[float] = field(default_factory=list)

    def out(self, status: str) -> None:
        self.status = status
        self.runs, self.lead, self.run = [], lambda: None, lambda: None


def max_error(found: Tensors, expected: Tensors) -> float:
    """Largest difference relative to the largest number expected, over all results; NaN if one is NaN."""
    errors = []
    for ours, theirs in zip(expected, found, strict=True):
        if ours.shape != theirs.shape:
            raise ValueError(f"results of shape {tuple(theirs.shape)}, ours {tuple(ours.shape)}")
        wide = ours.to(torch.float32)
        errors.append(((theirs.to(torch.float32) - wide).abs().max() / wide.abs().max()).item())
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def prepare(
    entry: Entry, setup: Callable[[Inputs], Run], sets: Sequence[Inputs], clock: Clock, expected: Tensors | None
) -> Tensors | None:
    """Set up, warm up, hold against ``expected`` and capture one contestant; returns a copy of its results."""
    runs = [setup(inputs) for inputs in sets]
    # All sets are restored from copies of the first one's: what matters is where they lie.
    pristine = [tensor.clone() for tensor in runs[0].overwrites]

    def restore() -> None:
        for run in runs:
            for tensor, source in zip(run.overwrites, pristine, strict=True):
                tensor.copy_(source)

    output, results = runs[0].call(), None
    if runs[0].result is not None:
        results = tuple(result.detach().clone() for result in runs[0].result(output))
        # Against itself where there is nothing else: NaN is wrong from anybody.
        error = max_error(results, results if expected is None else expected)
        entry.max_error = error if expected is not None and math.isfinite(error) else None
        if not error <= TOLERANCE:
            raise Wrong(f"differs from ours by {error:.2g}")
    del output
    entry.runs = runs
    entry.run, entry.no_graph = clock.replay([run.call for run in runs])
    entry.lead = restore if pristine else entry.run
    clock.sample(entry.lead, entry.run)
    return results


def guarded(entry: Entry, action: Callable[..., Any], *arguments: Any) -> Any:
    """``action(*arguments)``; an exception puts the contestant out of the race and goes no further."""
    try:
        return action(*arguments)
    except (Missing, ImportError) as error:
        entry.out(f"missing: {(str(error).splitlines() or [''])[0]}")
    except Wrong as error:
        entry.out(f"wrong: {error}")
    except Exception as error:
        entry.out(f"failed: {first_line(error)}")
    gc.collect()
    return None


def number_of_sets(op: Op, set_bytes: int, clock: Clock) -> int:
    """Enough to leave the cache and to make a replay long; never one, which would find itself in the cache."""
    wanted = 3 * clock.cache_bytes / set_bytes
    if op.unit == "bytes" and clock.device.type == "cuda":
        wanted = max(wanted, REPLAY_BYTES / op.work)
    return max(2, math.ceil(wanted))


def race(op: Op, entries: dict[str, Entry], clock: Clock, rounds: int) -> None:
    """Prepare all contestants of one op, then time them in turns."""
    sets = [op.inputs()]
    set_bytes = sum(tensor.nbytes for tensor in sets[0].values())
    sets += [op.inputs() for _ in range(number_of_sets(op, set_bytes, clock) - 1)]
    expected = None
    for name, entry in entries.items():
        results = guarded(entry, prepare, entry, op.contestants[name], sets, clock, expected)
        if name == "ours":
            expected = results
    for round_ in range(rounds):
        racing = [entry for entry in entries.values() if entry.runs and not has_had_its_turn(entry, len(sets))]
        turn = round_ % max(1, len(racing))
        for entry in racing[turn:] + racing[:turn]:
            seconds = guarded(entry, clock.sample, entry.lead, entry.run)
            if seconds is not None:
                entry.seconds.append(seconds / len(sets))


def has_had_its_turn(entry: Entry, calls: int) -> bool:
    return len(entry.seconds) >= 3 and sum(entry.seconds) * calls > SLOW


def make_rows(op: Op, model: str, entries: dict[str, Entry], copy_rate: float) -> list[dict[str, Any]]:
    """The rows of one op. Rates are in 10⁹ bytes (GB/s) or 10¹² FLOPs (TFLOP/s) a second."""
    rate_name, unit = ("GBps", 1e9) if op.unit == "bytes" else ("TFLOPs", 1e12)
    timed = {name: entry for name, entry in entries.items() if entry.status == "ok"}
    median = {name: float(np.median(entry.seconds)) for name, entry in timed.items()}
    work = {name: op.work if entry.runs[0].work is None else entry.runs[0].work for name, entry in timed.items()}
    # Dense attention by eager PyTorch does not serve packed rows, so it is no backend.
    backends = [median[name] for name in median if name != "eager"]
    best = {"bare products": median.get("bare products"), "fastest backend": min(backends, default=None)}

    def share(name: str) -> float | None:
        if op.yardstick == "copy":
            return round(work[name] / median[name] / 1e9 / copy_rate, 4)
        return best[op.yardstick] and round(best[op.yardstick] / median[name], 4)

    def measured(name: str, entry: Entry) -> dict[str, Any]:
        p10, p50, p90 = (round(float(value) * 1e6, 3) for value in np.percentile(entry.seconds, [10, 50, 90]))
        return {
            "graph": entry.no_graph is None,
            "median_us": p50,
            "p10_us": p10,
            "p90_us": p90,
            rate_name: float(f"{work[name] / median[name] / unit:.5g}"),
            "share": share(name),
            "calls": len(entry.runs),
            "samples": len(entry.seconds),
            "note": "; ".join(filter(None, [entry.runs[0].note, entry.no_graph])),
        }

    nothing = dict.fromkeys(("graph", "median_us", "p10_us", "p90_us", rate_name, "share", "calls", "samples", "note"))
    return [
        {"op": op.name, "model": model, "contestant": name, "status": entry.status, "max_error": entry.max_error}
        | {op.unit: work.get(name, op.work), "count": op.count, "share_of": op.yardstick}
        | (measured(name, entry) if name in timed else nothing)
        for name, entry in entries.items()
    ]


def ceilings(setting: Setting, clock: Clock) -> tuple[float, float]:
    """GB/s of a large copy, read and written, and TFLOP/s of a large product."""
    small = clock.device.type == "cpu"
    source = setting.draw((1 << 24) if small else (1 << 30))
    target = torch.empty_like(source)
    copying = functools.partial(target.copy_, source)
    copy = np.median([clock.sample(copying, copying) for _ in range(10)])
    n = 256 if small else 8192
    a, b = setting.draw(n, n), setting.draw(n, n)
    multiplying = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
    product = np.median([clock.sample(multiplying, multiplying) for _ in range(10)])
    return float(2 * source.nbytes / copy / 1e9), float(2 * n**3 / product / 1e12)


def run(options: argparse.Namespace, clock: Clock, out: Path) -> dict[str, Any]:
    """Time everything and return what was written to ``out``."""
    generator = torch.Generator(clock.device)
    generator.manual_seed(0)
    settings = {
        model: Setting(
            shape=SHAPES[model],
            tokens=options.tokens,
            sequence=row_length(options.tokens),
            dtype=clock.dtype,
            device=clock.device,
            generator=generator,
        )
        for model in options.model
    }
    copy_rate, product_rate = ceilings(next(iter(settings.values())), clock)
    result = {
        "device": common.device_name(clock.device.type),
        "dtype": str(clock.dtype).removeprefix("torch."),
        "model": ",".join(options.model),
        "tokens": options.tokens,
        "rounds": options.rounds,
        "copy_GBps": round(copy_rate, 2),
        "product_TFLOPs": round(product_rate, 4),
        "commit": common.commit(),
        "versions": common.versions() | rival_versions(),
        "command": common.command(),
        "rows": [],
        "targets": [],
    }
    print(report.headline(result), flush=True)
    for model, setting in settings.items():
        for op in ops(setting):
            if options.ops and not any(part in op.name for part in options.ops):
                continue
            entries = {name: Entry() for name in op.contestants if options.compile or name != "torch.compile"}
            try:
                race(op, entries, clock, options.rounds)
            except Exception as error:  # not even the inputs could be made
                for entry in entries.values():
                    entry.out(f"failed: {first_line(error)}")
            rows = make_rows(op, model, entries, copy_rate)
            result["rows"] += rows
            result["targets"] = report.judge(result["rows"])
            common.write_json(out, result)
            print(report.brief(rows), flush=True)
            del entries
            gc.collect()
            if options.compile:
                torch.compiler.reset()
            clock.free_memory()
    return result


def rival_versions() -> dict[str, str | None]:
    """Of what competes, where it is installed."""
    packages = ("liger-kernel", "quack-kernels", "flash-attn", "flash-attn-4")
    return {name: common.version_of(name) for name in packages} | {"cudnn": torch.backends.cudnn.version()}


def row_length(tokens: int) -> int:
    """Length of a packed row: at least four rows, so that documents end somewhere."""
    return min(SEQUENCE, tokens // 4)


def options() -> argparse.ArgumentParser:
    """The options of a timing, for ops.py to have as its own."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out", type=Path, help="where the JSON goes, by default bench/results/kernels-DEVICE.json")
    group = parser.add_argument_group("timing")
    group.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu is a trial of the bench itself")
    group.add_argument("--model", help=f"comma-separated, of {', '.join(SHAPES)}; default llama-2-7b, on a CPU tiny")
    group.add_argument("--tokens", type=int, help="tokens per call; default 16384, on a CPU 256")
    group.add_argument("--ops", help="comma-separated parts of names; only ops with one of them")
    group.add_argument("--rounds", type=int, help="samples of each contestant; default 20, on a CPU 3")
    group.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile too; default on a GPU only"
    )
    group.add_argument("--picture", type=Path, help="where the picture goes, by default beside the JSON, as .png")
    group.add_argument("--from", type=Path, dest="source", metavar="JSON", help="table and picture of it; no timing")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ops.py", description=__doc__.splitlines()[0], parents=[options()])
    arguments = parser.parse_args(argv)
    for name, value in DEFAULTS[arguments.device].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.model = arguments.model.split(",")
    arguments.ops = arguments.ops.split(",") if arguments.ops else []
    for model in arguments.model:
        if model not in SHAPES:
            parser.error(f"--model: there is no {model}; there are {', '.join(SHAPES)}")
    nowhere = Setting(
        shape=TINY, tokens=64, sequence=16, dtype=torch.float32, device=torch.device("cpu"), generator=torch.Generator()
    )
    names = [op.name for op in ops(nowhere)]
    for part in arguments.ops:
        if not any(part in name for name in names):
            parser.error(f"--ops: no op has {part!r} in its name; there are {', '.join(names)}")
    if arguments.rounds < 1:
        parser.error(f"--rounds: {arguments.rounds} is below 1")
    if arguments.tokens < 64 or arguments.tokens % row_length(arguments.tokens):
        multiple = max(16, row_length(arguments.tokens))
        parser.error(f"--tokens: {arguments.tokens} is below 64 or no multiple of {multiple}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.source is not None:
        out, result = arguments.source, report.read(arguments.source)
    else:
        if arguments.device == "cuda" and not torch.cuda.is_available():
            print("kernels are timed on a GPU, and PyTorch finds none; --device cpu tries the bench", file=sys.stderr)
            return 2
        clock = CudaClock() if arguments.device == "cuda" else CpuClock()
        device = common.device_name(arguments.device)
        out = arguments.out or common.RESULTS / f"kernels-{common.slug(device)}.json"
        with clock.running():
            result = run(arguments, clock, out)
        print(f"written to {out}")
    print(report.summary(result))
    picture = arguments.picture or out.with_suffix(".png")
    report.draw(result, picture)
    print(f"drawn in {picture}")
    return 0
