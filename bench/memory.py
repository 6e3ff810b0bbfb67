"""Memory of a training step, ours against Hugging Face: bytes kept for backward, peak, and what saving them costs.

    PYTHONPATH=.:kernels python bench/memory.py             the comparison: table, JSON, picture
    PYTHONPATH=.:kernels python bench/memory.py --check     our blocks against their formulas (bench/block_counts.py)

The model is LLaMA-2-7B with 8 new blocks (40 layers; 4, 9, … 39 train), a micro-batch 4 sequences of 4,096 tokens. All
contestants hold the same weights, train the same ones and see the same tokens: frozen weights bf16, trained ones
float32 with products in bf16 (ours by narrow copies, Hugging Face under autocast), AdamW's moments float32.

    ours, …                    llama_pro_fast's decoder; every block with a backward makes nothing, its MLP, all but
                               attention, or the whole block again
    HF eager, HF SDPA          stock LlamaForCausalLM
    HF SDPA + Liger            with Liger's kernels; they need a GPU
    HF …, trained layers c.    checkpoints every layer that has a trained parameter: LLaMA-Factory's rule, here with
                               transformers' own checkpoint function
    HF …, all layers c.        checkpoints every layer, by the model's own switch. The switch makes the embedding's
                               output need a gradient, so that the layers below the first new one keep their inputs and
                               make a backward too

On a GPU the model is measured as it is. A CPU measures it in the small (bench/miniature.py), at its full depth: at
three widths, which give for each count of bytes the a + b·k + c·k² that goes through them; at a fourth, where every
count must be equal to the last byte, or the bench ends with 1; and reads the full size from that. So bytes a token,
entry and FLOPs are exact, for they are sums of tensors' sizes. The full-size peak is exact for what runs on a CPU, if
the fullest moment of a step is the same there as in the small. A GPU runs other kernels: ours then makes none of the
float32 temporaries of the reference implementations (what `llama_pro_fast.memory` expects for it stands in the JSON,
and is not measured); Hugging Face's element-wise operations make the same ones. Contestants run in processes of their
own.

Extra work is beyond what `llama_pro_fast.cost` says the step needs, attention causal, in %.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from fractions import Fraction
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import block_counts
import common
import pictures
import torch
from child import in_child
from contestants import build_ours
from hugging_face import build_hf
from miniature import FULL, LOWEST, Miniature, layer_classes, measure, miniature, needed_work

from llama_pro_fast.block import Recompute, block_classes
from llama_pro_fast.devices import DEVICES, GIB
from llama_pro_fast.memory import Job, step_memory

OURS = {
    "ours": Recompute.NONE,
    "ours, MLP again": Recompute.MLP,
    "ours, all but attention again": Recompute.ALL_BUT_ATTENTION,
    "ours, block again": Recompute.BLOCK,
}
CONTESTANTS = {name: partial(build_ours, recompute=policy) for name, policy in OURS.items()} | {
    "HF eager": partial(build_hf, attention="eager"),
    "HF SDPA": build_hf,
    "HF SDPA + Liger": partial(build_hf, liger=True),
    "HF SDPA, trained layers checkpointed": partial(build_hf, checkpointing="trained"),
    "HF SDPA, all layers checkpointed": partial(build_hf, checkpointing="all"),
}
NEEDS_GPU = {"HF SDPA + Liger": "not run: Liger's kernels need a GPU"}
KS = (1, 2, 3, 4)
"""The small sizes: three for a law, one to check it."""
PARTS = {
    "frozen weights": "0.35",
    "training state": "0.6",
    "kept by frozen blocks": "C3",
    "kept by trained blocks": "C1",
    "the rest": "0.85",
}
"""Of a bar, with its colour: states in greys, activations in colours."""


def law(values: dict[int, int | Fraction], at: int) -> Fraction:
    """What goes through ``values`` (by their place), at another place: a polynomial of as many coefficients."""
    return sum(
        value * prod(Fraction(at - other, place - other) for other in values if other != place)
        for place, value in values.items()
    )


def flat(measured: dict[str, Any], k: int) -> dict[str, int | Fraction]:
    """Every count by the path to it; FLOPs by k³."""
    counts = {"peak": measured["peak"]}
    for key in ("entry", "kept a token", "kept besides"):
        counts |= {f"{key}: {name}": value for name, value in measured[key].items()}
    return counts | {f"work: {kind}": Fraction(flops, k**3) for kind, flops in measured["work"].items()}


def at_full_size(by_k: dict[int, dict[str, Any]]) -> dict[str, int | Fraction]:
    """Every count at k = :data:`FULL`, from measurements at smaller k of which the largest is the check.

    Raises:
        ValueError: a count at the largest k is not what the others say.
    """
    counts = {k: flat(measured, k) for k, measured in by_k.items()}
    if FULL in counts:
        return counts[FULL]
    *inner, check = sorted(counts)
    full = {}
    for name, found in counts[check].items():
        values = {k: counts[k][name] for k in inner}
        if law(values, check) != found:
            raise ValueError(f"NOT LAWFUL: {name} at k = {check} is {found}, and {law(values, check)} by k = {inner}")
        full[name] = law(values, FULL)
    return full


def make_row(contestant: str, full: dict[str, Any], workload: Miniature) -> dict[str, Any]:
    """Of the full size: bytes by kind, and work."""
    tokens = workload.micro_batch * workload.seq
    kept = {"frozen": 0, "trained": 0}
    copies = full["entry: copies"]
    for name in layer_classes(workload):
        kept["trained" if name in (LOWEST, "trained") else "frozen"] += tokens * full[f"kept a token: {name}"]
        copies += full[f"kept besides: {name}"]
    parts = {
        "frozen weights": full["entry: frozen weights"],
        "training state": copies + sum(full[f"entry: {name}"] for name in ("masters", "gradients", "moments")),
        "kept by frozen blocks": kept["frozen"],
        "kept by trained blocks": kept["trained"],
    }
    parts["the rest"] = full["peak"] - sum(parts.values())
    needed = sum(needed_work(workload).values())
    work = {kind: full[f"work: {kind}"] * workload.k**3 for kind in ("products", "attention")}
    row = {
        "contestant": contestant,
        "error": None,
        "kept_bytes_per_token": {name.split(": ")[1]: number(v) for name, v in full.items() if "a token" in name},
        "peak_bytes": number(full["peak"]),
        "parts_bytes": {name: number(value) for name, value in parts.items()},
        "narrow_copies_bytes": number(copies),
        "products_flop": number(work["products"]),
        "attention_flop": number(work["attention"]),
        "extra_work": float(sum(work.values())) / needed - 1,
    }
    if contestant in OURS:
        row["planned_bytes"] = {
            where: step_memory(job, [OURS[contestant]] * len(job.specs), micro_batch_size=workload.micro_batch,
                               accumulating=True).total
            for where, job in planned_jobs(workload).items()
        }  # fmt: skip
    return row


def planned_jobs(workload: Miniature) -> dict[str, Job]:
    """The planner's view of a step on a CPU, as measured here, and on a GPU."""
    common_facts = {
        "config": workload.config,
        "trained_blocks": tuple(workload.trained_blocks),
        "seq_len": workload.seq,
    }
    return {
        "cpu": Job(**common_facts, triton=False, attention="cpu_flash"),
        "gpu": Job(**common_facts, triton=True, attention="flash"),
    }


def number(value: Any) -> int | float:
    return int(value) if value == int(value) else float(value)


def show(rows: list[dict[str, Any]]) -> str:
    columns = ["contestant", "prefix", "frozen", "trained", "states", "kept", "rest", "peak GiB", "TFLOP", "extra work"]
    cells = []
    for row in rows:
        if row["error"]:
            cells.append([row["contestant"], *["-"] * (len(columns) - 1)])
            continue
        parts, kept = row["parts_bytes"], row["kept_bytes_per_token"]
        states, activations = (
            sum(parts[name] for name in names)
            for names in (("frozen weights", "training state"), ("kept by frozen blocks", "kept by trained blocks"))
        )
        cells.append([
            row["contestant"],
            *(f"{kept[name]:,.0f}" for name in ("prefix", "frozen", "trained")),
            *(f"{size / GIB:.1f}" for size in (states, activations, parts["the rest"], row["peak_bytes"])),
            f"{(row['products_flop'] + row['attention_flop']) / 1e12:,.0f}",
            f"{row['extra_work']:.1%}",
        ])  # fmt: skip
    lines = [common.table(columns, cells)]
    lines += [f"{row['contestant']}: {row['error']}" for row in rows if row["error"]]
    if planned := [f"{row['planned_bytes']['gpu'] / GIB:.1f}" for row in rows if "planned_bytes" in row]:
        lines.append(
            f"ours on a GPU, where its kernels need less scratch, as planned and not measured: {', '.join(planned)} GiB"
        )
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """A bar for each contestant that ran, what a step holds at its fullest by kind, and what cards have."""
    if not (rows := [row for row in result["rows"] if not row["error"]]):
        return
    height = 0.6 * len(rows) + 1.6
    figure = pictures.sheet(11, height)
    axes = figure.add_axes((0.2, 1.05 / height, 0.78, 1 - 1.45 / height))
    names = [row["contestant"].replace(", ", ",\n") for row in rows]
    left = [0.0] * len(rows)
    for part, color in PARTS.items():
        widths = [row["parts_bytes"][part] / GIB for row in rows]
        axes.barh(names, widths, left=left, color=color, label=part, height=0.66, zorder=2)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    cards = sorted({(device.memory / GIB, f"{device.title.split()[-2]} GB") for device in DEVICES.values()})
    # Beyond the largest card it does not matter how far.
    end = min(max(left), 1.5 * cards[-1][0]) * 1.1
    for memory, title in cards:
        axes.axvline(memory, color="k", linewidth=1, linestyle="--", zorder=3)
        axes.annotate(title, (memory, 1), xycoords=("data", "axes fraction"), xytext=(0, 4),
                      textcoords="offset points", ha="center", fontsize=10)  # fmt: skip
    for place, (row, total) in enumerate(zip(rows, left, strict=True)):
        extra = f"{row['extra_work']:+.{0 if row['extra_work'] > 0.01 else 1}%} work"
        extra = extra if row["extra_work"] else "no extra work"
        look = {"textcoords": "offset points", "va": "center", "fontsize": 9.5, "zorder": 4}
        if total < end:
            box = {"facecolor": "w", "edgecolor": "none", "pad": 1}
            axes.annotate(f"{total:.0f} GiB, {extra}", (total, place), xytext=(5, 0), bbox=box, **look)
        else:
            text = f"to {total:.0f} GiB, {extra}  \N{RIGHTWARDS ARROW}"
            axes.annotate(text, (end, place), xytext=(-6, 0), ha="right", color="w", **look)
    axes.set_xlim(0, end)
    pictures.dress(axes, f"GiB at the fullest moment of a step, {result['full_size']}")
    figure.legend(loc="lower center", ncols=len(PARTS), frameon=False, fontsize=9.5)
    pictures.save(figure, path)


def compare(options: argparse.Namespace) -> int:
    """Measure everybody, print, write, draw; 1 where a law does not hold."""
    ks = [FULL] if options.device == "cuda" else KS
    full_size = miniature(FULL, device=options.device, groups=options.groups)
    facts = in_child(options.device, provenance, options.device)
    rows, broken = [], []
    for name in options.contestants or CONTESTANTS:
        error, by_k = NEEDS_GPU.get(name) if options.device == "cpu" else None, {}
        for k in ks:
            if error is None:
                small = miniature(k, device=options.device, groups=options.groups)
                by_k[k] = in_child(options.device, measure, CONTESTANTS[name], small)
                error = by_k[k].get("error")
        if error is None:
            try:
                rows.append(make_row(name, at_full_size(by_k), full_size))
            except ValueError as wrong:
                error = str(wrong)
                broken.append(name)
        if error is not None:
            rows.append({"contestant": name, "error": error})
        print(f"{name}: {error or 'measured'}", flush=True)
    classes = [kind.value for kind in block_classes(len(full_size.plan.sources), full_size.trained_blocks)]
    result = facts | {
        "command": common.command(),
        "full_size": f"{full_size.micro_batch} x {full_size.seq:,} tokens of LLaMA-2-7B + {options.groups} blocks",
        "blocks": {name: classes.count(name) for name in ("prefix", "frozen", "trained")},
        "measured_at": [f"{k}/{FULL}" for k in ks],
        "rows": rows,
    }
    common.write_json(options.out, result)
    print(f"\n{result['full_size']}; bytes kept a token by class of block; GiB; TFLOP of a micro-batch")
    print(show(rows))
    draw(result, options.picture)
    print(f"written to {options.out} and {options.picture}")
    return 1 if broken else 0


def provenance(device: str) -> dict[str, Any]:
    """In a child, since it may start CUDA."""
    return {"device": common.device_name(device), "commit": common.commit(), "versions": common.versions()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="end with 1 unless our blocks equal their formulas")
    parser.add_argument("--tokens", type=int, nargs=2, default=[64, 160], help="of --check's two batches")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--groups", type=int, default=8, help="depth: groups of four base layers and a new one")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), metavar="NAME")
    parser.add_argument("--out", type=Path, help="default: in bench/results")
    parser.add_argument("--picture", type=Path, default=common.ROOT / "docs" / "pictures" / "memory.png")
    parser.add_argument("--draw", action="store_true", help="table and picture of --out again, without measuring")
    options = parser.parse_args(argv)
    if not 16 <= options.tokens[0] < options.tokens[1]:
        parser.error(f"--tokens: {options.tokens} are not two numbers from 16 on, the smaller first")
    if options.check:
        return block_counts.check(options)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.out is None:
        device = common.slug(common.device_name(options.device))
        options.out = common.RESULTS / f"memory-comparison-7b-{device}.json"
    if options.draw:
        result = json.loads(options.out.read_text())
        print(show(result["rows"]))
        draw(result, options.picture)
        return 0
    # The profiler writes two lines to stderr each time it is used.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    return compare(options)


if __name__ == "__main__":
    sys.exit(main())
