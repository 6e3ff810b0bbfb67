"""Tokens per second and peak memory of training the new blocks: ours against Hugging Face, same model, same tokens.

    PYTHONPATH=.:kernels python bench/throughput.py --size tiny

Measured: whole optimizer steps (forward, loss, backward, clipping, AdamW) over one micro-batch of random tokens that
lies on the device, after a warm-up. A GPU's steps are timed by events between them, without a wait, as in training;
tokens/s is that of the median step of all rounds. Peak memory is `torch.cuda.max_memory_allocated` from the first step
on (weights included, allocator slack not); on a CPU the growth of the process's peak resident memory, which is coarse.
Not measured: data, logging, checkpoints, several GPUs; nor speed over hours.

Fairness: contestants (bench/contestants.py) start from bit-equal weights (`weights_digest`) and see equal tokens, and
the loss of the first and of the last step is printed, so that nobody is fast by being wrong. Those who train something
else than new blocks start from the base, which is the same function: their first loss must be the same. Each runs in a
process of its own, one at a time (bench/child.py), so none sees another's memory or fate. With `--rounds` above 1 they
take turns, each round in another order. Large sizes have one round, since building takes longer than measuring.

Every contestant is a row, whatever became of it: `measured`; `missing`, where it needs a GPU or a package that is not
here, or time (`--budget`) ran out; `out of memory`, of the device; `failed`.

FLOPs are those of `planning.cost`: what the frozen-aware step needs, attention causal with a backward of twice
its forward, recomputation not counted; so TFLOP/s compares useful work, and its share is of a large product measured in
the same run, and of the card's dense bf16 peak, whatever the products are made in. `tflops_flash` takes the 2.5 times
that flash attention's backward really does.

Who takes turns with ours has a ratio to it in every round, and of these a 95 % interval (Student's t).
"""

from __future__ import annotations

import argparse
import gc
import math
import resource
import sys
import time
from datetime import UTC, datetime
from itertools import pairwise
from statistics import median
from typing import Any

import common
import torch
from child import Children
from contestants import CONTESTANTS
from throughput_rows import make_row, show
from workload import OPTIM, SIZES, Workload, weights_digest

from llama_pro_fast.planning.cost import num_parameters
from llama_pro_fast.planning.devices import expandable_segments, peak_flops
from llama_pro_fast.training.optimizer import Optimizer

LIMIT = 120
"""Seconds a contestant's round may take, by default, before it is ended and written down as a failure."""
DEFAULTS = ("seq", "micro_batch", "steps", "warmup", "rounds")
"""Options that a size has a value for."""


def measure(name: str, workload: Workload) -> dict[str, Any]:
    """One round of one contestant, in a process of its own."""
    contestant = CONTESTANTS[name]
    cuda = workload.device == "cuda"
    if cuda:
        expandable_segments()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    runner = contestant.build(workload)
    digest = weights_digest(runner, workload.dtype)
    trained = runner.trained
    optimizer = Optimizer(runner.model, trained, OPTIM, workload.warmup + workload.steps)
    batches = [runner.prepare(tokens) for tokens in workload.token_batches()]
    gc.collect()
    if cuda:
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
    if cuda:
        peak, reserved = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak, reserved = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) * unit / 2**30, None
    losses = torch.stack(losses).tolist()
    if not all(map(math.isfinite, losses)) or optimizer.left_out.item():
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
    """Where it runs, and what the device reaches: in a large product, and in a copy (read and write)."""
    facts = common.provenance(device)
    facts["versions"] |= {name: common.version_of(name) for name in ("liger-kernel", "peft", "flash-attn-4", "torchao")}
    copy, product = common.ceilings(device)
    peak = peak_flops(torch.device(device))
    facts |= {"product_tflops": round(product / 1e12, 4), "copy_tb_per_s": round(copy / 1e12, 4)}
    return facts | {"peak_tflops": peak and peak / 1e12}


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
    parser = common.parser(__doc__, out="throughput-SIZE-DEVICE")
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--contestants", help=f"comma-separated, of {', '.join(CONTESTANTS)}; default: all")
    for name in DEFAULTS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="default: the size's own")
    parser.add_argument("--document", type=int, help="tokens of each document in a sequence; default: all of it")
    parser.add_argument("--attention", default="auto", help="backend of ours")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds of a round; default: {LIMIT}")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no contestant starts")
    options = parser.parse_args(argv)
    options.contestants = options.contestants.split(",") if options.contestants else list(CONTESTANTS)
    if unknown := [name for name in options.contestants if name not in CONTESTANTS]:
        parser.error(f"--contestants: there is no {unknown[0]}; there are {', '.join(CONTESTANTS)}")
    for name in DEFAULTS:
        least = {"seq": 2, "warmup": 0}.get(name, 1)
        if getattr(options, name) is None:
            setattr(options, name, getattr(SIZES[options.size], name))
        elif getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')}: {getattr(options, name)} is below {least}")
    if options.document is not None and (options.document < 2 or options.seq % options.document):
        parser.error(f"--document: {options.document} does not divide a sequence of {options.seq} tokens")
    return options


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every contestant's row, written after each round to ``options.out`` (and that set)."""
    names = options.contestants
    told = ("size", "seq", "document", "micro_batch", "steps", "warmup", "device", "attention")
    workload = Workload(**{name: getattr(options, name) for name in told})
    missing = {name: CONTESTANTS[name].missing(options.device) for name in names}
    able = [name for name in names if missing[name] is None]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in able}
    deadline = time.monotonic() + options.budget

    def rows(unfinished: str) -> list[dict[str, Any]]:
        made = []
        for name in names:
            done = results.get(name) or [{"status": "missing", "error": missing[name] or f"not run: {unfinished}"}]
            made.append(make_row(name, CONTESTANTS[name].trains, done, shared))
        common.write_json(options.out, made)
        return made

    with Children(options.device) as children:
        facts = children.result(probe, options.device)
        if "error" in facts:
            raise SystemExit(f"{options.device}: {facts['error']}")
        options.out = options.out or common.result_file(f"throughput-{options.size}", facts["device"])
        shared = facts | {
            "size": options.size,
            "seq": options.seq,
            "document": workload.document_length,
            "micro_batch": options.micro_batch,
            "compute_dtype": str(workload.dtype).removeprefix("torch."),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "steps": options.steps,
            "warmup": options.warmup,
        }
        print(f"{options.size} on {facts['device']}, {options.micro_batch} x {options.seq} tokens a step", flush=True)
        print(f"product {facts['product_tflops']:.3g} TFLOP/s, copy {facts['copy_tb_per_s']:.3g} TB/s", flush=True)
        for round_ in range(options.rounds):
            turn = round_ % max(len(able), 1)
            for name in able[turn:] + able[:turn]:
                failed = any("error" in result for result in results[name])  # then it would again
                if failed or time.monotonic() >= deadline:
                    continue
                result = children.result(measure, name, workload, limit=options.limit)
                results[name].append(result)
                said = result.get("error") or f"{median(result['seconds']) * 1e3:,.1f} ms a step"
                print(f"{name}, round {round_ + 1}/{options.rounds}: {said}", flush=True)
                rows("the bench ended early")
    return rows("the time budget was used up")


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    print(show(run(options)))
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
