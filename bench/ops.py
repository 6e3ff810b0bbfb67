"""The kernels one by one: what they compile to, and on a GPU how fast they are.

    PYTHONPATH=.:kernels python bench/ops.py --compile-only
    PYTHONPATH=.:kernels python bench/ops.py

`--compile-only` needs no GPU. Every kernel of a training step is compiled for sm_80, sm_90 and sm_100 at the shapes of
four models in bf16, specialised as Triton would for these very arguments, and its machine code is read: registers,
stack, spilled registers, and how wide each access to a stream is. A stream is a tensor with a row for every token,
`[T, ·]`; 128 bits are the widest access a thread can make. Every tensor is held to be one but those named below: what
has one number a token (rstd, a label, a position) or none at all (a norm's weight, its gradient) is listed, not judged.
Those that write e4m3 are compiled for sm_89 in place of sm_80; eight codes make 64 bits, and they must come of PTX's
own conversion, which rounds to the nearest. A row fails by stack or a spill on sm_90, where the kernels are at home, or
anywhere by a narrow stream or another conversion; exit code 1 if one does.

Otherwise each op is timed beside the others in kernel_bench/op.py, by `triton.testing.do_bench`: CUDA events around
single calls, the L2 cache flushed before each, the median. GB/s and TFLOP/s are of the work no kernel can avoid; their
share is of a large copy, or of a large product, measured in the same run. Before anybody is timed its result is held
against ours; who is wrong, missing or fails is a row that says so. `--device cpu` tries the bench: the reference in
place of the kernels, fp32, a tiny model; it says nothing about speed.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import common
import torch
from kernel_bench.elementwise import elementwise_ops
from kernel_bench.machine_code import MachineCode, compile_for, disassemble
from kernel_bench.op import MODELS, TINY, Op, Setting
from kernel_bench.products import product_ops

HOME = 90
"""The target on which nothing may spill."""

COMPILED = Setting(shape=TINY, tokens=4096, sequence=4096, dtype=torch.bfloat16, device="meta")
"""The setting that is compiled for, at each model's shape."""

NO_STREAM = {"rstd_ptr", "label_ptr", "position_ptr", "loss_ptr", "correct_ptr", "divergence_ptr", "scale_ptr",
             "weight_ptr", "dweight_ptr", "partial_ptr", "correction_ptr", "divisor_ptr", "left_out_ptr"}  # fmt: skip
"""Arguments with one number a row or fewer: nothing to make wide, or nothing that counts."""

SINGLE = {(f"_cross_entropy{kl}_kernel", "logits_ptr"): 1 for kl in ("", "_kl")}
"""Accesses to a stream that are one number a row by nature: the logit of the label."""

TOLERANCE = 2**-5
"""Largest error relative to our largest number: a few roundings of bf16 (2⁻⁸ each), far from any mistake."""


# Machine code


def recorded(op: Op) -> list[Any]:
    """The launches of ours, on tensors without data."""
    from llama_pro_kernels.triton_kernels.launch import recorded_launches

    call = op.contestants["ours"](*op.inputs())
    with recorded_launches() as launches:
        call()
    return launches


def streams(launch: Any) -> list[str]:
    """Names of the arguments that hold a row for every token."""
    arguments = zip(launch.kernel.arg_names, launch.arguments, strict=False)
    return [name for name, argument in arguments if isinstance(argument, torch.Tensor) and name not in NO_STREAM]


def writes_e4m3(launch: Any) -> bool:
    return any(isinstance(a, torch.Tensor) and a.dtype == torch.float8_e4m3fn for a in launch.arguments)


def narrow_streams(launch: Any, code: MachineCode) -> list[str]:
    """Streams with an access below 128 bits, or with none that was seen."""
    allowed = {name: SINGLE.get((launch.name, name), 0) for name in streams(launch)}
    of_launch = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    wide = {name: 64 if of_launch[name].itemsize == 1 else 128 for name in allowed}
    return [
        name for name, count in allowed.items() if code.narrow(name, wide[name]) > count or name not in code.accesses
    ]


def compile_model(model: str) -> list[dict[str, Any]]:
    """One row for every kernel of a model's ops and every target."""
    from llama_pro_kernels import triton_kernels

    rows = []
    for op in elementwise_ops(replace(COMPILED, shape=MODELS[model]), triton_kernels):
        for launch in recorded(op):
            for target in op.targets:
                code = disassemble(compile_for(target, launch))
                narrow = narrow_streams(launch, code)
                cast = code.casts > 0 or not writes_e4m3(launch)
                rows.append({
                    "model": model,
                    "case": op.name,
                    "kernel": launch.name,
                    "target": f"sm_{target}",
                    "warps": launch.options["num_warps"],
                    "registers": code.registers,
                    "shared": code.shared,
                    "stack": code.stack,
                    "spills": code.spills,
                    "casts": code.casts,
                    "accesses": {name: dict(widths) for name, widths in code.accesses.items()},
                    "streams": streams(launch),
                    "narrow_streams": narrow,
                    "failed": bool(narrow) or not cast or (target == HOME and bool(code.stack or code.spills)),
                })  # fmt: skip
    return rows


def compile_all() -> list[dict[str, Any]]:
    # Spawned: a process that compiles has its own Triton, and a fork of PyTorch's threads may hang.
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        return [row for rows in pool.map(compile_model, MODELS) for row in rows]


def compile_only(out: Path | None) -> int:
    start = time.monotonic()
    rows = compile_all()
    shown = ("model", "case", "kernel", "target", "warps", "registers", "stack", "spills", "failed")
    print(common.table(shown, [[str(row[key]) for key in shown] for row in rows]))
    failed = [row for row in rows if row["failed"]]
    for row in failed:
        what = f"stack {row['stack']}, spills {row['spills']}, narrow {row['narrow_streams']}, casts {row['casts']}"
        print(f"FAILED: {row['model']}, {row['case']}, {row['kernel']}, {row['target']}: {what}")
    facts = {"commit": common.commit(), "versions": common.versions(), "command": common.command()}
    if out is not None:
        common.write_json(out, {**facts, "rows": rows})
    spills = sum(bool(row["spills"] or row["stack"]) for row in rows)
    narrow = sum(len(row["narrow_streams"]) for row in rows)
    print(f"\ntriton {facts['versions']['triton']}, {time.monotonic() - start:.0f} s")
    print(f"rows {len(rows)}, rows with spills or stack {spills}, narrow streams {narrow}")
    return 1 if failed else 0


# Speed


def leading(op: Op, out: Any) -> list[torch.Tensor]:
    """The results that all must agree on; none of a contestant that only computes."""
    out = [] if out is None else [out] if isinstance(out, torch.Tensor) else out
    return [tensor.detach().clone() for tensor in out[: op.results]]


def max_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest difference relative to the largest number expected, over all results; NaN if one is NaN."""
    errors = [
        ((theirs.float() - ours.float()).abs().max() / ours.float().abs().max()).item()
        for theirs, ours in zip(found, expected, strict=True)
    ]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def time_op(op: Op, model: str, device: str, best: tuple[float, float]) -> Iterator[dict[str, Any]]:
    """A row for each contestant; rates are in 10⁹ bytes (GB/s) or 10¹² FLOPs (TFLOP/s) a second."""
    unit, scale, limit = ("GBps", 1e9, best[0]) if op.unit == "bytes" else ("TFLOPs", 1e12, best[1])
    expected: list[torch.Tensor] = []
    for name, setup in op.contestants.items():
        work = op.work if name == "ours" or op.rivals_work is None else op.rivals_work
        row = {"op": op.name, "model": model, "contestant": name, "status": "ok", op.unit: work, "max_error": None}
        row |= dict.fromkeys(("median_us", unit, "share"))
        try:
            torch.manual_seed(0)  # equal inputs for all
            call = setup(*op.inputs())
            results = leading(op, call())
            expected = expected or results
            if results:
                row["max_error"] = max_error(results, expected)
            if results and not row["max_error"] <= TOLERANCE:
                row |= {"status": f"wrong: differs from ours by {row['max_error']:.2g}", "max_error": None}
            else:
                taken = common.seconds(call, device)
                rate = float(f"{work / taken / scale:.5g}")
                row |= {"median_us": round(taken * 1e6, 3), unit: rate, "share": round(work / taken / limit, 4)}
        except Exception as error:
            said = (str(error).strip().splitlines() or [""])[0]
            row["status"] = f"missing: {said}" if isinstance(error, ImportError) else f"failed: {said}"
        yield row
        call = results = None
        if device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def show(rows: list[dict[str, Any]]) -> str:
    columns = ["op", "contestant", "us", "rate", "share", "max error"]
    lines = []
    for row in rows:
        if row["status"] != "ok":
            lines.append([row["op"], row["contestant"], row["status"], "-", "-", "-"])
            continue
        rate = f"{row['GBps']:,.0f} GB/s" if "GBps" in row else f"{row['TFLOPs']:,.4g} TFLOP/s"
        error = "-" if row["max_error"] is None else f"{row['max_error']:.1e}"
        figures = [f"{row['median_us']:,.1f}", rate, f"{row['share']:.1%}", error]
        lines.append([row["op"], row["contestant"], *figures])
    return common.table(columns, lines)


def time_all(options: argparse.Namespace) -> int:
    device, cuda = options.device, options.device == "cuda"
    if cuda:
        from llama_pro_kernels import triton_kernels as kernels
    else:
        from llama_pro_kernels import reference as kernels
    tokens = 16384 if cuda else 256
    shape, dtype = (MODELS[options.model], torch.bfloat16) if cuda else (TINY, torch.float32)
    setting = Setting(shape=shape, tokens=tokens, sequence=tokens // 4, dtype=dtype, device=device)
    best = common.ceilings(device)
    facts = common.provenance(device) | {
        "model": options.model if cuda else "tiny",
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "copy_GBps": round(best[0] / 1e9, 2),
        "product_TFLOPs": round(best[1] / 1e12, 4),
    }
    facts["versions"]["liger-kernel"] = common.version_of("liger-kernel")
    out = options.out or common.result_file("kernels", facts["device"])
    rows: list[dict[str, Any]] = []
    for op in (*elementwise_ops(setting, kernels), *product_ops(setting)):
        if options.ops in op.name:
            rows += time_op(op, facts["model"], device, best)
            common.write_json(out, {**facts, "rows": rows})
    print(show(rows))
    print(f"copy {facts['copy_GBps']:,.0f} GB/s, product {facts['product_TFLOPs']:,.3g} TFLOP/s; written to {out}")
    return 0


def main() -> int:
    parser = common.parser(__doc__, out="kernels-DEVICE")
    parser.add_argument("--compile-only", action="store_true", help="read the machine code; written only with --out")
    parser.add_argument("--model", choices=list(MODELS), default="llama-2-7b", help="whose shapes are timed on a GPU")
    parser.add_argument("--ops", default="", metavar="PART", help="only those with this in their name")
    options = parser.parse_args()
    return compile_only(options.out) if options.compile_only else time_all(options)


if __name__ == "__main__":
    sys.exit(main())
