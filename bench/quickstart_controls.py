"""Does the quickstart's gain come from the method? Its budget spent in other ways, on the same text.

    python bench/quickstart_controls.py

    expansion   the quickstart: three new blocks in the packaged base, the rest frozen; at several learning rates
    full        full fine-tuning of that base, nothing added; at several learning rates
    random      the quickstart on a base of the same shape whose weights are random: what new blocks alone can learn
    scratch     the random base, every parameter trained: what the text alone teaches in this budget

All see as many tokens in as many steps, through the same trainer (`python -m llama_pro_fast.train --config quickstart`
with options); runs of one seed see them in the same order. What is compared is the loss on held-out code (the domain)
and on held-out prose (the general text) after the last step. The methods are compared over learning rates, since each
has its own best one; the two on a random base, which end far behind, have one rate. Every pair of method and rate is
trained with three seeds, which decide the order of the text (the random base is one).

Writes a row per run to the JSON, and a picture: domain gain against general loss, and the domain loss each ended with.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import common
import torch

from llama_pro_fast.cost import step_cost
from llama_pro_fast.model_folder import write_random_model
from llama_pro_fast.pretrained import PretrainedFolder, resolve
from llama_pro_fast.recipe import load_config

BASE = "builtin:prose-3m"
RATES = {
    "expansion": (1e-3, 3e-3, 1e-2),
    "full": (3e-4, 1e-3, 3e-3),
    "random": (6e-3,),
    "scratch": (6e-3,),
}
SEEDS = (0, 1, 2)
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


def measure(method: str, rate: float, seed: int, *, random_base: Path, work: Path, extra: list[str]) -> dict[str, Any]:
    """One run, and its row."""
    output = work / f"{method}-{rate:g}-{seed}"
    command = [sys.executable, "-m", "llama_pro_fast.train", "--config", "quickstart", "--optim.lr", str(rate)]
    command += ["--train.seed", str(seed), "--output", str(output), *options(method, random_base), *extra]
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
    losses = {
        result["role"]: {when: result[when]["loss"] for when in ("before", "after")} for result in summary["results"]
    }
    return {
        "method": method,
        "lr": rate,
        "seed": seed,
        "steps": summary["steps"],
        "tokens": summary["tokens"],
        "parameters": summary["parameters"],
        "trained_parameters": summary["trained_parameters"],
        "gflop_per_token": round(cost.total / 1e9, 5),
        **losses,
        "device": common.device_name("cuda" if torch.cuda.is_available() else "cpu"),
        "dtype": summary["dtype"],
        "threads": summary["threads"],
        "commit": common.commit(),
        "versions": common.versions(),
        "command": common.command(),
    }


def groups(rows: list[dict[str, Any]]) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """The rows of each method and rate, one per seed, in the order of the table."""
    found = {
        (method, rate): [row for row in rows if (row["method"], row["lr"]) == (method, rate)]
        for method, rates in RATES.items()
        for rate in rates
    }
    return {key: of_seeds for key, of_seeds in found.items() if of_seeds}


def change(row: dict[str, Any], role: str) -> float:
    return row[role]["after"] - row[role]["before"]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Left: what a method paid in general loss for what it gained, rate by rate. Right: where each ended."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    by_group = groups(rows)
    for method in ("expansion", "full"):
        of_method = {rate: of_seeds for (name, rate), of_seeds in by_group.items() if name == method}
        line = []
        for rate, of_seeds in of_method.items():
            points = [(change(row, "general"), -change(row, "domain")) for row in of_seeds]
            left.scatter(*zip(*points, strict=True), s=12, color=COLORS[method], alpha=0.5)
            line.append([mean(values) for values in zip(*points, strict=True)])
            offset = (7, -12) if method == "expansion" else (-14, 9)
            left.annotate(f"{rate:g}", line[-1], xytext=offset, textcoords="offset points", color=COLORS[method])
        left.plot(*zip(*line, strict=True), "o-", color=COLORS[method], label=LABELS[method])
    left.plot(0, 0, "k*", markersize=11, clip_on=False, zorder=3)
    left.annotate("base", (0, 0), xytext=(9, 4), textcoords="offset points")
    left.set_xlim(left=0)
    left.set_ylim(0, 1.08 * left.get_ylim()[1])
    left.set_xlabel("forgetting: rise of the loss on held-out prose, nats per token")
    left.set_ylabel("gain: fall of the loss on held-out code, nats per token")
    title = "A large dot for each learning rate: the mean of three seeds (small dots)\nUp is better, left is better"
    left.set_title(title, fontsize=10)
    left.legend(loc="lower right")
    left.grid(alpha=0.3)

    best = {}
    for (method, rate), of_seeds in by_group.items():
        end = (mean(row["domain"]["after"] for row in of_seeds), rate)
        best[method] = min(best.get(method, end), end)
    names = [f"{LABELS[method]}\nlr {rate:g}" for method, (_, rate) in best.items()]
    ends = [end for end, _ in best.values()]
    bars = right.barh(names, ends, color=[COLORS[method] for method in best], height=0.6)
    right.bar_label(bars, [f"{end:.2f}" for end in ends], padding=-32, color="w")
    start = rows[0]["domain"]["before"]
    right.axvline(start, color="k", linewidth=1, linestyle="--")
    title = f"Loss on held-out code at the end\nDashed: the pretrained base, {start:.2f}"
    right.set_title(title, fontsize=10)
    right.set_xlabel("nats per token")
    right.invert_yaxis()
    figure.savefig(path)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The README's table: nats per token on held-out code and prose; ends are mean ± standard deviation over seeds."""
    lines = [
        "| way | rate | trained | MFLOP per token | code before | after | prose before | after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (method, rate), of_seeds in groups(rows).items():
        row, cells = of_seeds[0], []
        for role in ("domain", "general"):
            ends = [other[role]["after"] for other in of_seeds]
            deviation = f" ± {stdev(ends):.2f}" if len(ends) > 1 else ""
            cells.append(f"{row[role]['before']:.2f} | {mean(ends):.2f}{deviation}")
        lines.append(
            f"| {LABELS[method]} | {rate:g} | {row['trained_parameters'] / row['parameters']:.0%} "
            f"| {row['gflop_per_token'] * 1000:.1f} | {cells[0]} | {cells[1]} |"
        )
    return "\n".join(lines)


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"quickstart-controls-{common.slug(common.device_name(device))}"
    parser = argparse.ArgumentParser(description="The quickstart's budget, spent in other ways.")
    parser.add_argument("--out", type=Path, default=common.RESULTS / f"{name}.json")
    parser.add_argument("--picture", type=Path, default=common.ROOT / "docs" / "pictures" / "quickstart-controls.png")
    parser.add_argument("--draw", action="store_true", help="draw the picture from --out again, without measuring")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the CPU's threads")
    parser.add_argument("--smoke", action="store_true", help="three steps, one rate and seed each, nothing kept")
    arguments = parser.parse_args()
    if arguments.smoke:
        kept = tempfile.TemporaryDirectory()
        arguments.out, arguments.picture = Path(kept.name, "rows.json"), Path(kept.name, "picture.png")
    if not arguments.draw:
        threads = max(1, torch.get_num_threads() // arguments.jobs)
        extra = ["--train.threads", str(threads), "--eval.every", "1000000"]
        extra += ["--train.steps", "3", "--eval.tokens", "2048"] if arguments.smoke else []
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
            work = Path(folder)
            write_random_model(PretrainedFolder(resolve(BASE)), work / "random-base", seed=0)
            runs = [
                pool.submit(measure, method, rate, seed, random_base=work / "random-base", work=work, extra=extra)
                for method, rates in RATES.items()
                for rate in (rates[-1:] if arguments.smoke else rates)
                for seed in (SEEDS[:1] if arguments.smoke else SEEDS)
            ]
            rows: list[dict[str, Any]] = []
            for run in runs:
                try:
                    rows.append(run.result())
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
                print(markdown(rows[-1:]).splitlines()[-1], flush=True)
                common.write_json(arguments.out, rows)
    rows = json.loads(arguments.out.read_text())
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(rows, arguments.picture)
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
