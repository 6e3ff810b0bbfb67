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
the loss of the first and of the last step is printed, so that nobody is fast by being wrong. Each runs in a process of
its own, one at a time, so none sees another's memory or fate: one that fails is a row with its error. With `--rounds`
above 1 they take turns, each round in another order. Large sizes have one round (`rounds` in the JSON), since building
takes longer than measuring.

FLOPs are those of `llama_pro_fast.cost`: what the frozen-aware step needs, attention causal with a backward of twice
its forward, recomputation not counted; so TFLOP/s compares useful work, and its share of the peak is of a large bf16
product measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import resource
import signal
import statistics
import sys
import time
import traceback
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import common
import torch
from contestants import CONTESTANTS, SIZES, Workload, weights_digest

from llama_pro_fast.config import OptimConfig
from llama_pro_fast.cost import num_parameters, step_cost
from llama_pro_fast.optimizer import Optimizer

CHILD_LIMIT = 300
"""Seconds a contestant's round may take before it is ended and written down as a failure."""

OPTIM = OptimConfig(lr=1e-5, schedule="wsd", warmup_steps=0, decay_steps=0)
CONVENTION = "frozen-aware; causal attention, its backward 2x its forward; recomputation not counted"


def measure(contestant: str, workload: Workload) -> dict[str, Any]:
    """One round of one contestant, in a process of its own."""
    device = torch.device(workload.device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    runner = CONTESTANTS[contestant](workload)
    digest = weights_digest(runner, workload.dtype)
    trained = runner.trained
    optimizer = Optimizer(runner.model, trained, OPTIM, workload.warmup + workload.steps)
    batches = [runner.prepare(tokens) for tokens in workload.token_batches()]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def mark() -> Any:
        if device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    marks, losses = [], []
    for index, batch in enumerate(batches):
        if index >= workload.warmup:
            marks.append(mark())
        loss = runner.loss(batch)
        loss.backward()
        optimizer.step(index)
        losses.append(loss.detach())
        del loss
    marks.append(mark())
    if device.type == "cuda":
        torch.cuda.synchronize()
        seconds = [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
        peak, reserved = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
    else:
        seconds = [b - a for a, b in pairwise(marks)]
        unit = 1 if sys.platform == "darwin" else 1024
        peak, reserved = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) * unit / 2**30, None
    losses = torch.stack(losses).tolist()
    if not all(map(math.isfinite, losses)) or optimizer.skipped.item():
        raise FloatingPointError(f"a loss or a gradient is not finite; losses {losses}")
    config = workload.config
    return runner.facts | {
        "seconds": seconds,
        "peak_gib": peak,
        "peak_reserved_gib": reserved,
        "first_loss": losses[0],
        "loss": losses[-1],
        "weights_digest": digest,
        "parameters": num_parameters(config),
        "trained_parameters": sum(p.numel() for p in trained.values()),
        "gflop_per_token": step_cost(config, workload.trained_blocks, seq_len=workload.seq).total / 1e9,
        "threads": torch.get_num_threads(),
    }


def probe(device: str) -> dict[str, Any]:
    """The device's name, the versions, and on a GPU the rate of a bf16 product of 8192 in each direction."""
    facts = {"device": common.device_name(device), "versions": common.versions(), "product_tflops": None}
    if device == "cuda":
        n = 8192
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        events = [torch.cuda.Event(enable_timing=True) for _ in range(21)]
        for _ in range(5):
            a @ b
        for event in events:
            event.record()
            a @ b
        torch.cuda.synchronize()
        times = [first.elapsed_time(second) for first, second in pairwise(events)]
        facts["product_tflops"] = 2 * n**3 / statistics.median(times) / 1e9
    return facts


def _child(function: Any, arguments: tuple, connection: Connection) -> None:
    try:
        result = function(*arguments)
    except Exception as error:
        traceback.print_exc()
        text = (str(error).strip().splitlines() or [""])[0]
        result = {"error": f"{type(error).__name__}: {text}"}
    connection.send(result)


def in_child(device: str, function: Any, *arguments: Any) -> dict[str, Any]:
    """``function``'s result from a process of its own, or ``{"error": class and message}``, even where it dies."""
    # A forkserver has PyTorch and transformers imported already, which is most of a tiny round; but one of the imports
    # might start CUDA, and that does not survive a fork.
    context = multiprocessing.get_context("spawn" if device == "cuda" else "forkserver")
    if device != "cuda":
        llama = "transformers.models.llama.modeling_llama"
        context.set_forkserver_preload(["llama_pro_fast.model", "llama_pro_fast.optimizer", llama])
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(function, arguments, sender))
    child.start()
    sender.close()
    try:
        if not receiver.poll(CHILD_LIMIT):
            return {"error": f"TimeoutError: no result after {CHILD_LIMIT} s"}
        return receiver.recv()
    except EOFError:
        child.join()
        code = child.exitcode
        return {"error": f"ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"}
    finally:
        if child.is_alive():
            child.join(10)  # it has sent its result, and only tidies up
        if child.is_alive():
            child.kill()
        child.join()


def make_row(contestant: str, results: list[dict[str, Any]], shared: dict[str, Any]) -> dict[str, Any]:
    """What the rounds of a contestant come to; speed, memory and loss are null where one failed."""
    error = next((result["error"] for result in results if "error" in result), None)
    measured = dict.fromkeys(("tokens_per_s", "peak_gib", "loss"))
    if error is None:
        tokens = shared["seq"] * shared["micro_batch"]
        times = sorted(second for result in results for second in result["seconds"])
        median = statistics.median(times)
        p10, p90 = (times[round(share * (len(times) - 1))] for share in (0.1, 0.9))
        # Losses and counts are the same in every round.
        measured |= {key: value for key, value in results[-1].items() if key != "seconds"}
        tflops = tokens / median * measured["gflop_per_token"] / 1e3
        measured |= {
            "tokens_per_s": round(tokens / median, 1),
            "peak_gib": round(max(result["peak_gib"] for result in results), 4),
            "step_s": {"p10": round(p10, 6), "median": round(median, 6), "p90": round(p90, 6)},
            "round_tokens_per_s": [round(tokens / statistics.median(result["seconds"]), 1) for result in results],
            "tflops": round(tflops, 4),
            "flop_convention": CONVENTION,
            "share_of_product": shared["product_tflops"] and round(tflops / shared["product_tflops"], 4),
        }
    return {"contestant": contestant, **shared, "rounds": len(results), "error": error, **measured}


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a table, and the failures in words."""
    ours = next((row["tokens_per_s"] for row in rows if row["contestant"] == "ours"), None)
    columns = ["contestant", "tokens/s", "x ours", "step ms p10", "median", "p90", "peak GiB", "TFLOP/s", "% product"]
    cells = []
    for row in rows:
        speed = row["tokens_per_s"]
        if speed is None:
            cells.append([row["contestant"], "failed", *["-"] * len(columns)])
            continue
        cells.append([
            row["contestant"],
            f"{speed:,.0f}",
            "-" if ours is None else f"{speed / ours:.3f}",
            *(f"{1e3 * row['step_s'][name]:,.1f}" for name in ("p10", "median", "p90")),
            f"{row['peak_gib']:.2f}",
            f"{row['tflops']:.3g}",
            "-" if row["share_of_product"] is None else f"{row['share_of_product']:.1%}",
            f"{row['first_loss']:.5f}",
            f"{row['loss']:.5f}",
        ])  # fmt: skip
    steps = rows[0]["warmup"] + rows[0]["steps"]
    lines = [common.table([*columns, "loss step 1", f"step {steps}"], cells)]
    lines += [f"{row['contestant']}: {row['error']}" for row in rows if row["error"]]
    if len({row["weights_digest"] for row in rows if not row["error"]}) > 1:
        lines.append("NOT COMPARABLE: contestants started from different weights")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument(
        "--contestants", help=f"comma-separated, of {', '.join(CONTESTANTS)}; default: all that can run"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    for name in ("seq", "micro-batch", "steps", "warmup", "rounds"):
        parser.add_argument(f"--{name}", type=int, help="default: the size's own")
    parser.add_argument("--out", type=Path, help="default: bench/results/throughput-SIZE-DEVICE.json")
    options = parser.parse_args(argv)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    runnable = [name for name in CONTESTANTS if name != "hf-bf16" or options.device == "cuda"]
    options.contestants = options.contestants.split(",") if options.contestants else runnable
    for name in options.contestants:
        if name not in CONTESTANTS:
            parser.error(f"--contestants: there is no {name}; there are {', '.join(CONTESTANTS)}")
    for name in ("seq", "micro_batch", "steps", "warmup", "rounds"):
        least = {"seq": 2, "warmup": 0}.get(name, 1)
        if getattr(options, name) is None:
            setattr(options, name, getattr(SIZES[options.size], name))
        elif getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')}: {getattr(options, name)} is below {least}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    workload = Workload(
        size=options.size,
        seq=options.seq,
        micro_batch=options.micro_batch,
        steps=options.steps,
        warmup=options.warmup,
        device=options.device,
    )
    facts = in_child(options.device, probe, options.device)
    if "error" in facts:
        print(f"{options.device}: {facts['error']}", file=sys.stderr)
        return 1
    shared = {
        "device": facts["device"],
        "size": options.size,
        "seq": options.seq,
        "micro_batch": options.micro_batch,
        "dtype": str(workload.dtype).removeprefix("torch."),
        "commit": common.commit(),
        "versions": facts["versions"],
        "command": common.command(),
        "steps": options.steps,
        "warmup": options.warmup,
        "product_tflops": facts["product_tflops"],
    }
    out = options.out or common.RESULTS / f"throughput-{options.size}-{common.slug(facts['device'])}.json"
    product = facts["product_tflops"]
    print(
        f"{options.size} expanded by {len(workload.trained_blocks)} blocks on {facts['device']}, {shared['dtype']}: "
        f"steps of {options.micro_batch} x {options.seq} tokens"
        + (f"; bf16 product of 8192: {product:.0f} TFLOP/s" if product else ""),
        flush=True,
    )
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in options.contestants}
    for round_ in range(options.rounds):
        turn = round_ % len(options.contestants)
        for name in options.contestants[turn:] + options.contestants[:turn]:
            if results[name] and "error" in results[name][-1]:
                continue  # it would fail again
            result = in_child(options.device, measure, name, workload)
            results[name].append(result)
            rows = [make_row(other, done, shared) for other, done in results.items() if done]
            common.write_json(out, rows)
            said = result.get("error") or f"{statistics.median(result['seconds']) * 1e3:,.1f} ms a step"
            print(f"round {round_ + 1}/{options.rounds}  {name}: {said}", flush=True)
    print(show(rows))
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
