"""The quickstart: how long it takes, and whether its gain comes from the method.

    python bench/quickstart.py
    python bench/quickstart.py --controls

By the clock, `llama-pro-fast train` runs as a user's does, in an empty folder and a process of its own, with nothing
cached: from its start to its end, imports, tokenising, expansion, proof, evaluations, export and read-back included.
Afterwards `.ci/quickstart_check.py` holds its report to what is promised of it. The time is recorded, not checked: it
is the machine's as well. Aimed at: 240 s on 2 CPU cores, 60 s on a GPU.

Its controls spend its budget in other ways, on the same text:

    expansion   the quickstart: three new blocks in the packaged base, the rest frozen; at several learning rates
    full        full fine-tuning of that base, nothing added; at several learning rates
    random      the quickstart on a base of the same shape whose weights are random: what new blocks alone can learn
    scratch     the random base, every parameter trained: what the text alone teaches in this budget

All see as many tokens in as many steps, through the same trainer (`llama-pro-fast train --config quickstart`
with options); runs of one seed see them in the same order. What is compared is the loss on held-out code (the domain)
and on held-out prose (the general text) after the last step, over learning rates, since each method has its own best
one. Every pair of method and rate is trained with three seeds, which decide the order of the text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import common
import pictures

from llama_pro_fast.hf.config import resolve
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.model.trained import Trained
from llama_pro_fast.planning.cost import step_cost
from llama_pro_fast.resume import load_config
from llama_pro_fast.training.model_folder import write_random_model

BASE = "builtin:prose-3m"
RATES = {"expansion": (1e-3, 3e-3, 1e-2), "full": (3e-4, 1e-3, 3e-3), "random": (6e-3,), "scratch": (6e-3,)}
SEEDS = (0, 1, 2)
ENDS = [(role, when) for role in ("general", "domain") for when in ("after", "before")]
COLORS = {"expansion": "C0", "full": "C3"}
LABELS = {
    "expansion": "block expansion",
    "full": "full fine-tuning",
    "random": "block expansion of a random base",
    "scratch": "random base, all parameters",
}


def by_the_clock(folder: Path) -> dict[str, Any]:
    """One quickstart in ``folder``, and its row."""
    # Read from another folder, a relative path would lead elsewhere.
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(paths)}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "llama_pro_fast.train"], cwd=folder, env=environment, check=True)
    seconds, run = time.perf_counter() - start, folder / "runs" / "quickstart"
    subprocess.run([sys.executable, str(common.ROOT / ".ci" / "quickstart_check.py"), str(run)], check=True)
    summary = json.loads((run / "report" / "summary.json").read_text())
    taken = ("seconds_of_steps", "median_tokens_per_second", "peak_memory_gib", "threads", "dtype", "attention")
    measured = {"seconds": round(seconds, 1)} | {name: summary[name] for name in taken}
    return measured | losses(summary) | common.provenance(summary["device"])


def losses(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of domain and general text, before and after, from a run's report."""
    return {
        result["role"]: {when: result[when]["loss"] for when in ("before", "after")} for result in summary["results"]
    }


def measure(method: str, rate: float, seed: int, *, work: Path, extra: list[str]) -> dict[str, Any]:
    """One run, and its row."""
    train_all = method in ("full", "scratch")
    told = ["--model.path", str(work / "random-base")] if method in ("random", "scratch") else []
    told += ["--expand.groups", "null", "--train.parameters", "all"] if train_all else []
    output = work / f"{method}-{rate:g}-{seed}"
    command = [sys.executable, "-m", "llama_pro_fast.train", "--config", "quickstart", "--optim.lr", str(rate)]
    command += ["--train.seed", str(seed), "--eval.every", "1000000", "--output", str(output), *told, *extra]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{method} at {rate:g} failed:\n{result.stdout[-2000:]}")
    summary = json.loads((output / "report" / "summary.json").read_text())
    model = PretrainedFolder(resolve(BASE) if train_all else output / "expanded").config
    layers = model.num_hidden_layers
    trained = Trained.all_of(layers) if train_all else Trained(layers, tuple(summary["trained_blocks"]))
    cost = step_cost(model, trained, seq_len=load_config(output).train.seq_len)
    taken = ("steps", "tokens", "parameters", "trained_parameters", "dtype", "threads")
    row = {"method": method, "lr": rate, "seed": seed} | {name: summary[name] for name in taken}
    row |= {"gflop_per_token": round(cost.total / 1e9, 5), **losses(summary)}
    return row | common.provenance(summary["device"])


def groups(rows: list[dict[str, Any]]) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """The rows of each method and rate, one per seed."""
    keys = dict.fromkeys((row["method"], row["lr"]) for row in rows)
    return {key: [row for row in rows if (row["method"], row["lr"]) == key] for key in keys}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """What a method paid in general loss for what it gained, rate by rate: a large dot the mean, small ones seeds."""
    figure = pictures.sheet(7, 4.6)
    axes = figure.subplots()
    for method in ("expansion", "full"):
        line = []
        for (name, rate), of_seeds in groups(rows).items():
            if name == method:
                ends = [[row[role][when] for role, when in ENDS] for row in of_seeds]
                points = [(prose - prose_before, code_before - code) for prose, prose_before, code, code_before in ends]
                axes.scatter(*zip(*points, strict=True), s=12, color=COLORS[method], alpha=0.5)
                line.append([mean(values) for values in zip(*points, strict=True)])
                offset = (7, -12) if method == "expansion" else (-14, 9)
                axes.annotate(f"{rate:g}", line[-1], xytext=offset, textcoords="offset points", color=COLORS[method])
        axes.plot(*zip(*line, strict=True), "o-", color=COLORS[method], label=LABELS[method])
    axes.plot(0, 0, "k*", markersize=11, clip_on=False, zorder=3)
    axes.annotate("base", (0, 0), xytext=(9, 4), textcoords="offset points")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    axes.set_xlabel("forgetting: rise of the loss on held-out prose, nats per token")
    axes.set_ylabel("gain: fall of the loss on held-out code, nats per token")
    axes.set_title("At several learning rates; up is better, left is better", fontsize=10)
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    pictures.save(figure, path)


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


def main() -> None:
    parser = common.parser(__doc__, out="quickstart[-controls]-DEVICE", device=False)
    parser.add_argument("--controls", action="store_true", help="in other ways too")
    parser.add_argument("--picture", type=Path, default=common.ROOT / "docs" / "pictures" / "quickstart-controls.png")
    parser.add_argument("--jobs", type=int, default=1, help="controls at a time, which divide the CPUs; default: 1")
    options = parser.parse_args()
    name = "quickstart-controls" if options.controls else "quickstart"
    out = options.out or common.result_file(name, common.device_name(common.found_device("auto")))
    with tempfile.TemporaryDirectory() as folder:
        rows = controls(Path(folder), options.jobs, out) if options.controls else [by_the_clock(Path(folder))]
    common.write_json(out, rows)
    if options.controls:
        draw(rows, options.picture)
        print(markdown(rows))
    else:
        shown = [(name, str(value)) for name, value in rows[0].items() if name not in ("versions", "command")]
        print(common.table(("quickstart", "value"), shown))


def controls(work: Path, jobs: int, out: Path) -> list[dict[str, Any]]:
    """The row of every run, written to ``out`` as they end."""
    extra = ["--train.threads", str(max(1, os.cpu_count() // jobs))] if jobs > 1 else []
    asked = [(method, rate, seed) for method, rates in RATES.items() for rate in rates for seed in SEEDS]
    write_random_model(PretrainedFolder(resolve(BASE)), work / "random-base", seed=0)
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(jobs) as pool:
        for row in pool.map(lambda run: measure(*run, work=work, extra=extra), asked):
            rows.append(row)
            print(markdown(rows[-1:]).splitlines()[-1], flush=True)
            common.write_json(out, rows)
    return rows


if __name__ == "__main__":
    main()
