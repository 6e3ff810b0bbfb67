"""The kernels one by one: what they compile to, and on a GPU how fast they are.

    PYTHONPATH=.:kernels python bench/ops.py --compile-only
    PYTHONPATH=.:kernels python bench/ops.py

`--compile-only` needs no GPU. Every kernel of a training step is compiled for sm_80, sm_90 and sm_100 at the shapes of
four models in bf16, specialised as Triton would for these very arguments, and its machine code is read: registers,
stack, spilled registers, and how wide each access to a stream is. A stream is a tensor with a row for every token,
`[T, ·]`; 128 bits are the widest access a thread can make. Every tensor is held to be one but those named below: what
has one number a token (rstd, a label, a position) or none at all (a norm's weight, its gradient) is listed, not judged.
A row fails by stack or a spill on sm_90, where the kernels are at home, or by a narrow stream anywhere; exit code 1 if
one does.

Without the option the kernels are timed on the GPU: see kernel_bench/timing.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import common
import torch
from kernel_bench import timing
from kernel_bench.machine_code import MachineCode, compile_for, disassemble
from kernel_bench.shapes import MODELS, Case, cases

TARGETS = (80, 90, 100)
HOME = 90
"""The target on which nothing may spill."""

TOKENS = 4096

NO_STREAM = {"rstd_ptr", "label_ptr", "position_ptr", "loss_ptr", "correct_ptr", "divergence_ptr", "scale_ptr",
             "weight_ptr", "dweight_ptr", "partial_ptr"}  # fmt: skip
"""Arguments with one number a row or fewer: nothing to make wide, or nothing that counts."""

SINGLE = {("_cross_entropy_kernel", "logits_ptr"): 1}
"""Accesses to a stream that are one number a row by nature: the logit of the label."""


def recorded(case: Case) -> list[Any]:
    """The launches of a case on tensors without data."""
    from llama_pro_kernels.triton_kernels.launch import recorded_launches

    with torch.device("meta"), recorded_launches() as launches:
        case.run()
    return launches


def streams(launch: Any) -> list[str]:
    """Names of the arguments that hold a row for every token."""
    arguments = zip(launch.kernel.arg_names, launch.arguments, strict=False)
    return [name for name, argument in arguments if isinstance(argument, torch.Tensor) and name not in NO_STREAM]


def narrow_streams(launch: Any, code: MachineCode) -> list[str]:
    """Streams with an access below 128 bits, or with none that was seen."""
    allowed = {name: SINGLE.get((launch.name, name), 0) for name in streams(launch)}
    return [name for name, count in allowed.items() if code.narrow(name) > count or name not in code.accesses]


def compile_model(model: str) -> list[dict[str, Any]]:
    """One row for every kernel of a model's cases and every target."""
    rows = []
    for case in cases(MODELS[model], TOKENS):
        for launch in recorded(case):
            for target in TARGETS:
                code = disassemble(compile_for(target, launch))
                narrow = narrow_streams(launch, code)
                rows.append(
                    {
                        "model": model,
                        "case": case.name,
                        "kernel": launch.name,
                        "target": f"sm_{target}",
                        "warps": launch.options["num_warps"],
                        "registers": code.registers,
                        "shared": code.shared,
                        "stack": code.stack,
                        "spills": code.spills,
                        "accesses": {name: dict(widths) for name, widths in code.accesses.items()},
                        "streams": streams(launch),
                        "narrow_streams": narrow,
                        "failed": bool(narrow) or (target == HOME and bool(code.stack or code.spills)),
                    }
                )
    return rows


def compile_all() -> list[dict[str, Any]]:
    # Spawned: a process that compiles has its own Triton, and a fork of PyTorch's threads may hang.
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        return [row for rows in pool.map(compile_model, MODELS) for row in rows]


def print_compiled(rows: list[dict[str, Any]]) -> None:
    """A table a model: one line a kernel, the targets side by side."""
    for model in MODELS:
        lines = []
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in rows:
            if row["model"] == model:
                groups.setdefault((row["case"], row["kernel"]), []).append(row)
        for (case, kernel), group in groups.items():
            widths: Counter[str] = Counter()
            for row in group:
                for name, counts in row["accesses"].items():
                    if name in row["streams"]:
                        for bits, count in counts.items():
                            single = SINGLE.get((kernel, name)) == count
                            widths["one number a row" if single else f"{bits}-bit"] += count
            alone = sorted({f"{name.removesuffix('_ptr')}" for row in group for name in row["accesses"]} - {
                name.removesuffix("_ptr") for row in group for name in row["streams"]
            })  # fmt: skip
            lines.append([
                case + (" (sum)" if kernel == "_sum_rows_kernel" else ""),
                str(group[0]["warps"]),
                " / ".join(f"{row['registers']:3d}" for row in group),
                " / ".join(str(row["stack"]) for row in group),
                " / ".join(str(row["spills"]) for row in group),
                "FAILED" if any(row["failed"] for row in group) else "ok",
                ", ".join(f"{count // len(group)} x {width}" for width, count in sorted(widths.items())) or "-",
                " ".join(alone),
            ])  # fmt: skip
        columns = ["kernel", "warps", "registers", "stack", "spills", "", "accesses to [T, .] streams", "not judged"]
        print(f"\n{model}, bf16, " + " / ".join(f"sm_{target}" for target in TARGETS))
        print(common.table(columns, lines))


def compile_only(out: Path | None) -> int:
    start = time.monotonic()
    rows = compile_all()
    print_compiled(rows)
    failed = [row for row in rows if row["failed"]]
    for row in failed:
        what = f"stack {row['stack']}, spills {row['spills']}, narrow {row['narrow_streams']}"
        print(f"FAILED: {row['model']}, {row['case']}, {row['kernel']}, {row['target']}: {what}")
    if out is not None:
        facts = {"commit": common.commit(), "versions": common.versions(), "command": common.command()}
        common.write_json(out, {**facts, "rows": rows}, row_per_line="rows")
    spills = sum(bool(row["spills"] or row["stack"]) for row in rows)
    narrow = sum(len(row["narrow_streams"]) for row in rows)
    versions = common.versions()
    print(f"\ntriton {versions['triton']}, {time.monotonic() - start:.0f} s")
    print(f"rows {len(rows)}, rows with spills or stack {spills}, narrow streams {narrow}")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=[timing.options()])
    parser.add_argument(
        "--compile-only",
        action="store_true",
        help="compile and read the machine code instead; needs no GPU, takes only --out and writes nothing without it",
    )
    arguments = parser.parse_args()
    if not arguments.compile_only:
        return timing.main(sys.argv[1:])
    for name, value in vars(timing.options().parse_args([])).items():
        if name != "out" and getattr(arguments, name) != value:
            parser.error("--compile-only takes only --out")
    return compile_only(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
