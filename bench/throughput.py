"""Tokens per second and peak memory of training the new blocks: ours against Hugging Face, same model, same tokens.

    PYTHONPATH=.:kernels python bench/throughput.py --size tiny

Measured: whole optimizer steps (forward, loss, backward, clipping, AdamW) over one micro-batch of random tokens that
lies on the device, in steady state. The first steps are left out. A GPU's steps are timed by events between them,
without a wait, as in training; tokens/s is that of the median step of all rounds, and p10/p90 of the step times stand
beside it. Peak memory is `torch.cuda.max_memory_allocated` from the first step on (weights included, allocator slack
not); on a CPU the growth of the process's peak resident memory from before the model was built, which is coarse.

Not measured: loading and tokenising data, moving batches, logging, checkpoints, several GPUs; nor speed over hours.
Random weights and tokens: what is timed does not depend on values, except for the power a chip draws.

Fairness: contestants (bench/contestants.py) start from bit-equal weights (`weights_digest`) and see equal tokens, and
the loss of the first and of the last step is printed, so that nobody is fast by being wrong. Those who train something
else than new blocks start from the base, which is the same function: their first loss must be the same. Each runs in a
process of its own, one at a time, so none sees another's memory or fate; on a GPU the next process imports what it
needs while another runs, and touches the GPU when that one has ended. With `--rounds` above 1 they take turns, each
round in another order. Large sizes have one round (`rounds` in the JSON), since building takes longer than measuring.

Every contestant is a row, whatever became of it (`status`, and `error` if it is not `measured`): `missing`, where it
needs a GPU or a package that is not here, or time (`--budget`) ran out; `out of memory`, of the device; `failed`.

FLOPs are those of `llama_pro_fast.cost`: what the frozen-aware step needs, attention causal with a backward of twice
its forward, recomputation not counted; so TFLOP/s compares useful work, and its share is of a large product measured in
the same run. `tflops_flash` takes the 2.5 times that flash attention's backward really does. On a CPU, whose speed says
little of a GPU's, the bytes each class of block keeps for backward and the products of a step are counted as well, in
bf16 (bench/counts.py).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch
from child import Job, in_turn
from contestants import CONTESTANTS, NEW_BLOCKS
from counts import count
from pictures import draw_throughput
from throughput_rows import make_row, show, validate
from workload import OPTIM, SIZES, Workload, weights_digest

from llama_pro_fast.cost import num_parameters
from llama_pro_fast.devices import expandable_segments
from llama_pro_fast.optimizer import Optimizer

LIMIT = 120
"""Seconds a contestant's round may take, by default, before it is ended and written down as a failure."""
DEFAULTS = ("seq", "micro_batch", "steps", "warmup")


def measure(name: str, workload: Workload) -> dict[str, Any]:
    """One round of one contestant, in a process of its own."""
    contestant = CONTESTANTS[name]
    device = torch.device(workload.device)
    if device.type == "cuda":
        expandable_segments()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    runner = contestant.build(workload)
    digest = weights_digest(runner, workload.dtype)
    trained = runner.trained
    optimizer = Optimizer(runner.model, trained, OPTIM, workload.warmup + workload.steps)
    batches = [runner.prepare(tokens) for tokens in workload.token_batches()]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    marks, losses = [], []
    for index, batch in enumerate(batches):
        if index >= workload.warmup:
            marks.append(mark(workload.device))
        loss = runner.loss(batch)
        loss.backward()
        optimizer.step(index)
        losses.append(loss.detach())
        del loss
    marks.append(mark(workload.device))
    seconds = between(marks, workload.device)
    if device.type == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak, reserved = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) * unit / 2**30, None
    losses = torch.stack(losses).tolist()
    if not all(map(math.isfinite, losses)) or optimizer.skipped.item():
        raise FloatingPointError(f"a loss or a gradient is not finite; losses {losses}")
    flop, flop_flash = contestant.flops_per_token(workload)
    return runner.facts | {
        "seconds": seconds,
        "peak_gib": peak,
        "peak_reserved_gib": reserved,
        "first_loss": losses[0],
        "loss": losses[-1],
        "weights_digest": digest,
        "parameters": num_parameters(contestant.model(workload).config),
        "trained_parameters": sum(p.numel() for p in trained.values()),
        "gflop_per_token": flop / 1e9,
        "gflop_per_token_flash": flop_flash / 1e9,
        "threads": torch.get_num_threads(),
    }


def probe(device: str) -> dict[str, Any]:
    """The device's name, the versions, and what it reaches: in a large product, and in a copy (read and write)."""
    others = {name: common.version_of(name) for name in ("liger-kernel", "peft", "flash-attn-4")}
    n, dtype, copied = (8192, torch.bfloat16, 1 << 30) if device == "cuda" else (1024, torch.float32, 1 << 26)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = time_of(lambda: a @ b, device)
    source = torch.empty(copied, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copy = time_of(lambda: target.copy_(source), device)
    return {
        "device": common.device_name(device),
        "versions": common.versions() | others,
        "product_tflops": round(2 * n**3 / product / 1e12, 4),
        "copy_tb_per_s": round(2 * copied / copy / 1e12, 4),
    }


def time_of(run: Callable[[], Any], device: str) -> float:
    """Seconds one of 20 runs in a row takes, the median of them."""
    for _ in range(5):
        run()
    marks = [mark(device)]
    for _ in range(20):
        run()
        marks.append(mark(device))
    return median(between(marks, device))


def mark(device: str) -> Any:
    """A moment: on a GPU an event in its stream, which waits for nothing."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(marks: list[Any], device: str) -> list[float]:
    """Seconds from each mark to the next."""
    if device == "cpu":
        return [after - before for before, after in pairwise(marks)]
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--contestants", help=f"comma-separated, of {', '.join(CONTESTANTS)}; default: all")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    for name in (*DEFAULTS, "rounds"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="default: the size's own")
    parser.add_argument("--document", type=int, help="tokens of each document in a sequence; default: all of it")
    parser.add_argument("--attention", default="auto", help="backend of ours")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds of a round; default: {LIMIT}")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no contestant starts")
    parser.add_argument("--out", type=Path, help="default: bench/results/throughput-SIZE-DEVICE.json")
    parser.add_argument("--picture", type=Path, help="bars of speed and memory, as a PNG file")
    parser.add_argument("--draw", action="store_true", help="table and picture of --out again, without measuring")
    options = parser.parse_args(argv)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.draw and options.out is None:
        options.out = result_file(options.size, common.device_name(options.device))
    options.contestants = options.contestants.split(",") if options.contestants else list(CONTESTANTS)
    for name in options.contestants:
        if name not in CONTESTANTS:
            parser.error(f"--contestants: there is no {name}; there are {', '.join(CONTESTANTS)}")
    for name in (*DEFAULTS, "rounds"):
        least = {"seq": 2, "warmup": 0}.get(name, 1)
        if getattr(options, name) is None:
            setattr(options, name, getattr(SIZES[options.size], name))
        elif getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')}: {getattr(options, name)} is below {least}")
    if options.document is not None and (options.document < 2 or options.seq % options.document):
        parser.error(f"--document: {options.document} does not divide a sequence of {options.seq} tokens")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.draw:
        report(json.loads(options.out.read_text()), options)
        return 0
    taken = (*DEFAULTS, "document", "size", "device", "attention")
    workload = Workload(**{name: getattr(options, name) for name in taken})
    trains = {name: CONTESTANTS[name].trains for name in options.contestants}
    missing = {name: CONTESTANTS[name].missing(options.device) for name in options.contestants}
    able = [name for name, why in missing.items() if why is None]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in able}
    counts: dict[str, dict[str, Any]] = {}

    def failed(name: str) -> bool:
        """Then it would fail again."""
        return any("error" in result for result in results[name])

    def jobs() -> Iterator[Job]:
        yield Job(None, probe, (options.device,))
        for round_ in range(options.rounds):
            turn = round_ % max(len(able), 1)
            for name in able[turn:] + able[:turn]:
                modules = [package.replace("-", "_") for package in CONTESTANTS[name].packages]
                # Unsloth looks for a GPU when it is imported, so not before its turn.
                early = [module for module in modules if module != "unsloth" and find_spec(module)]
                yield Job((round_, name), measure, (name, workload), imports=early, unless=partial(failed, name))
                if options.device == "cpu" and round_ == 0 and trains[name] == NEW_BLOCKS:
                    yield Job((None, name), count, (name, workload))

    def rows(unfinished: str) -> list[dict[str, Any]]:
        made = []
        for name in options.contestants:
            done = results.get(name) or [{"status": "missing", "error": missing[name] or f"not run: {unfinished}"}]
            made.append(make_row(name, trains[name], done, shared, counts.get(name)))
        validate(made)
        return made

    deadline = time.monotonic() + options.budget
    with contextlib.closing(in_turn(jobs(), options.device, limit=options.limit, deadline=deadline)) as done:
        _, facts = next(done)
        if "error" in facts:
            print(f"{options.device}: {facts['error']}", file=sys.stderr)
            return 1
        shared = facts | {
            "size": options.size,
            "seq": options.seq,
            "document": workload.document_length,
            "micro_batch": options.micro_batch,
            "compute_dtype": str(workload.dtype).removeprefix("torch."),
            "commit": common.commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": common.command(),
            "steps": options.steps,
            "warmup": options.warmup,
        }
        options.out = options.out or result_file(options.size, facts["device"])
        print(
            f"{options.size} expanded by {len(workload.trained_blocks)} blocks on {facts['device']}, "
            f"{shared['compute_dtype']}: steps of {options.micro_batch} x {options.seq} tokens in documents of "
            f"{workload.document_length}; product {facts['product_tflops']:.3g} TFLOP/s, "
            f"copy {facts['copy_tb_per_s']:.3g} TB/s",
            flush=True,
        )
        for (round_, name), result in done:
            if round_ is None:
                said = f"counted: {result.get('error', 'bytes kept and products')}"
                counts[name] = {} if "error" in result else result
            else:
                said = result.get("error") or f"{median(result['seconds']) * 1e3:,.1f} ms a step"
                said = f"round {round_ + 1}/{options.rounds}: {said}"
                results[name].append(result)
            common.write_json(options.out, rows("the bench ended early"))
            print(f"{name}, {said}", flush=True)
    final = rows("the time budget was used up")
    common.write_json(options.out, final)
    report(final, options)
    return 0


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    print(show(rows))
    if options.picture:
        draw_throughput(rows, options.picture)
    print(f"written to {options.out}" + (f" and {options.picture}" if options.picture else ""))


def result_file(size: str, device: str) -> Path:
    return common.RESULTS / f"throughput-{size}-{common.slug(device)}.json"


if __name__ == "__main__":
    sys.exit(main())
