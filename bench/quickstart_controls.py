"""Does the quickstart's gain come from the method? Its budget spent in other ways, on the same text in the same order.

    python bench/quickstart_controls.py

    expansion   the quickstart: three new blocks in the packaged base, the rest frozen; at several learning rates
    full        full fine-tuning of that base, nothing added; at several learning rates
    random      the quickstart on a base of the same shape whose weights are random: what new blocks alone can learn
    scratch     the random base, every parameter trained: what the text alone teaches in this budget

All see the same tokens in the same number of steps, through the same trainer (`python -m llama_pro_fast.train --config
quickstart` with options); each runs in a process of its own, one at a time. What is compared is the loss on held-out
code (the domain) and on held-out prose (the general text) at every evaluation of a run. Expansion and full
fine-tuning are run at several learning rates, since each has its own best one; all with one seed.

Writes a row per run to the JSON, and a picture: domain gain against general loss, and the domain loss each ended with.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import torch

from llama_pro_fast.cost import step_cost
from llama_pro_fast.prepare import write_random_model
from llama_pro_fast.pretrained import PretrainedFolder, resolve
from llama_pro_fast.recipe import load_config
from llama_pro_fast.report import read_metrics

BASE = "builtin:prose-3m"
RATES = {
    "expansion": (1e-3, 3e-3, 6e-3),
    "full": (3e-4, 1e-3, 3e-3),
    "random": (6e-3,),
    "scratch": (6e-3,),
}
COLORS = {"expansion": "C0", "full": "C3", "random": "0.55", "scratch": "0.3"}
LABELS = {
    "expansion": "block expansion",
    "full": "full fine-tuning",
    "random": "block expansion of a random base",
    "scratch": "random base, all parameters",
}


def options(method: str, random_base: Path) -> list[str]:
    """What a method says differently from the quickstart."""
    model = ["--model.path", str(random_base)] if method in ("random", "scratch") else []
    return model + (["--expand.groups", "null", "--train.parameters", "all"] if method in ("full", "scratch") else [])


def measure(method: str, rate: float, random_base: Path, work: Path, extra: list[str]) -> dict[str, Any]:
    """One run, and its row."""
    output = work / f"{method}-{rate:g}"
    command = [sys.executable, "-m", "llama_pro_fast.train", "--config", "quickstart", "--optim.lr", str(rate)]
    command += ["--output", str(output), *options(method, random_base), *extra]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{method} at {rate:g} failed:\n{result.stdout[-2000:]}")
    summary = json.loads((output / "report" / "summary.json").read_text())
    trained_folder = next(path for path in (output / "expanded", resolve(BASE)) if path.exists())
    config = load_config(output)
    train_all = method in ("full", "scratch")
    cost = step_cost(
        PretrainedFolder(trained_folder).config,
        () if train_all else summary["trained_blocks"],
        seq_len=config.train.seq_len,
        train_all=train_all,
    )
    path: dict[int, dict[str, float]] = {}
    for row in read_metrics(output):
        if row["kind"] == "eval":
            path.setdefault(row["step"], {"step": row["step"]})[row["role"]] = row["loss"]
    device = common.device_name("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "method": method,
        "lr": rate,
        "steps": summary["steps"],
        "tokens": summary["tokens"],
        "parameters": summary["parameters"],
        "trained_parameters": summary["trained_parameters"],
        "gflop_per_token": round(cost.total / 1e9, 5),
        "tokens_per_s": summary["median_tokens_per_second"],
        "peak_gib": summary["peak_memory_gib"],
        "evaluations": list(path.values()),
        "device": device,
        "dtype": summary["dtype"],
        "threads": summary["threads"],
        "commit": common.commit(),
        "versions": common.versions(),
        "command": common.command(),
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Left: what a method paid in general loss for what it gained, evaluation by evaluation. Right: where it ended."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    pretrained = [row for row in rows if row["method"] in ("expansion", "full")]
    start = pretrained[0]["evaluations"][0]
    for row in pretrained:
        gain = [start["domain"] - point["domain"] for point in row["evaluations"]]
        general = [point["general"] - start["general"] for point in row["evaluations"]]
        rates = RATES[row["method"]]
        style = (":", "--", "-")[rates.index(row["lr"])] if row["lr"] in rates else "-"
        label = f"{LABELS[row['method']]}, lr {row['lr']:g}"
        left.plot(general, gain, style, color=COLORS[row["method"]], marker="o", markersize=3, label=label)
    left.plot(0, 0, "k*", markersize=11)
    left.annotate("base", (0, 0), xytext=(7, -2), textcoords="offset points")
    left.set_xlabel("forgetting: rise of the loss on held-out prose (nats per token)")
    left.set_ylabel("gain: fall of the loss on held-out code (nats per token)")
    left.set_title("Same tokens, same steps: up is better, left is better", fontsize=10)
    left.legend(fontsize=8, loc="center right")
    left.grid(alpha=0.3)

    names = [f"{LABELS[row['method']]}\nlr {row['lr']:g}" for row in rows]
    ends = [row["evaluations"][-1]["domain"] for row in rows]
    bars = right.barh(names, ends, color=[COLORS[row["method"]] for row in rows], height=0.7)
    right.bar_label(bars, [f"{end:.2f}" for end in ends], padding=-30, fontsize=9, color="w")
    right.axvline(start["domain"], color="k", linewidth=1, linestyle="--")
    right.set_title(f"Loss on code at the end (dashed: the base's {start['domain']:.2f})", fontsize=10)
    right.set_xlim(0, max(*ends, start["domain"]) * 1.12)
    right.tick_params(axis="y", labelsize=8)
    right.invert_yaxis()
    figure.savefig(path)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The README's table: nats per token on held-out code and prose, before and after."""
    lines = [
        "| way | rate | trained | MFLOP per token | code before | after | prose before | after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        first, last = row["evaluations"][0], row["evaluations"][-1]
        lines.append(
            f"| {LABELS[row['method']]} | {row['lr']:g} | {row['trained_parameters'] / row['parameters']:.0%} "
            f"| {row['gflop_per_token'] * 1000:.1f} | {first['domain']:.2f} | {last['domain']:.2f} "
            f"| {first['general']:.2f} | {last['general']:.2f} |"
        )
    return "\n".join(lines)


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"quickstart-controls-{common.slug(common.device_name(device))}"
    parser = argparse.ArgumentParser(description="The quickstart's budget, spent in other ways.")
    parser.add_argument("--out", type=Path, default=common.RESULTS / f"{name}.json")
    parser.add_argument("--picture", type=Path, default=common.ROOT / "docs" / "pictures" / "quickstart-controls.png")
    parser.add_argument("--draw", action="store_true", help="draw the picture from --out again, without measuring")
    parser.add_argument("--smoke", action="store_true", help="three steps, one rate each, nothing kept: does it work?")
    arguments = parser.parse_args()
    if arguments.smoke:
        kept = tempfile.TemporaryDirectory()
        arguments.out, arguments.picture = Path(kept.name, "rows.json"), Path(kept.name, "picture.png")
    if not arguments.draw:
        extra = ["--train.steps", "3", "--eval.tokens", "2048"] if arguments.smoke else []
        rows: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            base = PretrainedFolder(resolve(BASE))
            write_random_model(base, work / "random-base", seed=0)
            for method, rates in RATES.items():
                for rate in rates[-1:] if arguments.smoke else rates:
                    rows.append(measure(method, rate, work / "random-base", work, extra))
                    print(markdown(rows[-1:]).splitlines()[-1], flush=True)
                    common.write_json(arguments.out, rows)
    rows = json.loads(arguments.out.read_text())
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(rows, arguments.picture)
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
