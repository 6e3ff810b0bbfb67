"""What a run leaves to read at its end: a summary for people and for programs, and loss.png."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama_pro_fast.files import sync, writing_to
from llama_pro_fast.training.metrics import read_metrics
from llama_pro_fast.training.run_folder import SUMMARY


def summarise(run: Path, references: dict[tuple[str, str], dict[str, float]]) -> dict[str, Any]:
    """What the run's metrics say.

    Args:
        references: by (role, source) the figures to hold the model's against (see `evaluation.baselines`).

    Returns:
        Part of ``summary.json``: time and speed and memory, and for each source its first and last evaluation, with
        these references. Where the held-out text changed on the way, the first is the first on the text of the last.
    """
    rows = read_metrics(run)
    results = []
    for source, mine in _by_source(row for row in rows if row["kind"] == "eval").items():
        keep = ("step", "loss", "bits_per_byte", "base_loss", "kl")
        last = mine[-1]
        text = last.get("measured")  # rows of older versions do not say it
        first = next(row for row in mine if row.get("measured", text) == text)
        before, after = ({key: row.get(key) for key in keep} for row in (first, last))
        compared = references.get(source, {})
        results.append({"source": source[1], "role": source[0], "before": before, "after": after, **compared})
    train = [row for row in rows if row["kind"] == "train"]
    speeds = [row["tokens_per_second"] for row in train if row["tokens_per_second"] is not None]
    return {
        "seconds_of_steps": round(sum(row["seconds"] for row in train), 1),
        "median_tokens_per_second": round(statistics.median(speeds), 1) if speeds else None,
        "peak_memory_gib": round(max(row["peak_memory_gib"] for row in train), 3),
        "results": results,
    }


def write_report(run: Path, summary: dict[str, Any], *, complete: bool = True) -> None:
    """Write ``report/``, its ``summary.json`` last.

    Args:
        summary: what :func:`summarise` gave, and what the trainer knows of the run and the metrics do not say (model,
            sizes, folders, what came of reading the export back).
        complete: the run is; without it there is no ``summary.json``.

    Raises:
        UserError: no space is left.
    """
    folder = run / "report"
    with writing_to(folder):
        folder.mkdir(exist_ok=True)
        (folder / "summary.md").write_text(_markdown(summary), encoding="utf-8")
        draw_loss(read_metrics(run), folder / "loss.png", title=summary["title"])
        if complete:
            partial = run / (SUMMARY + ".new")
            partial.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
            sync(partial)
            partial.replace(run / SUMMARY)


def _by_source(evaluations: Iterable[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(role, source) -> its rows in order; one text may be both what is learned and what is not to be forgotten."""
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in evaluations:
        grouped.setdefault((row["role"], row["source"]), []).append(row)
    return grouped


def _markdown(summary: dict[str, Any]) -> str:
    lines = [f"# {summary['title']}", "", "| | |", "|---|---|"]
    for name, value in summary.items():
        if name in ("title", "results", "sample"):
            continue
        if name == "export_check":
            value = value["said"]
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        text = f"{value:,}" if isinstance(value, int) else "–" if value is None else str(value)
        lines.append(f"| {name.replace('_', ' ')} | {text} |")
    lines += [
        "",
        "Held-out text, nats per token (lower is better); base: the same model with its new blocks skipped.",
        "",
        "| source | role | loss before | loss after | change | base now | KL(base‖now) |",
        "|---|---|---|---|---|---|---|",
    ]

    def figure(value: float | None) -> str:
        return "–" if value is None else f"{value:.4f}"

    for row in summary["results"]:
        before, after = row["before"], row["after"]
        lines.append(
            f"| {row['source']} | {row['role']} | {figure(before['loss'])} | {figure(after['loss'])} "
            f"| {after['loss'] - before['loss']:+.4f} | {figure(after['base_loss'])} | {figure(after['kl'])} |"
        )
    lines += [
        "",
        "The same in bits per byte of text, beside a unigram model of the training side's tokens and gzip -9.",
        "",
        "| source | role | before | after | unigram | gzip |",
        "|---|---|---|---|---|---|",
    ]
    for row in summary["results"]:
        figures = (row["before"]["bits_per_byte"], row["after"]["bits_per_byte"])
        figures += (row.get("unigram_bits_per_byte"), row.get("gzip_bits_per_byte"))
        lines.append(f"| {row['source']} | {row['role']} | {' | '.join(map(figure, figures))} |")
    if summary["sample"]:
        lines += ["", "How a held-out document goes on, greedily:"]
        for name, said in (("prompt", "Prompt"), ("base", "Base"), ("now", "Now")):
            if summary["sample"][name] is not None:
                lines += ["", f"{said}:", "", *(f"    {line}" for line in summary["sample"][name].splitlines())]
    return "\n".join([*lines, "", "![loss](loss.png)", ""])


def draw_loss(rows: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Training loss, held-out loss of every source, and the base's on the general ones."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    train = [row for row in rows if row["kind"] == "train"]
    if train:
        axes.plot(
            [row["step"] for row in train],
            [row["loss"] for row in train],
            color="0.75",
            linewidth=1,
            label="training batches",
        )
    evaluations = [row for row in rows if row["kind"] == "eval"]
    for index, ((role, source), mine) in enumerate(_by_source(evaluations).items()):
        steps, color = [row["step"] for row in mine], f"C{index}"
        label = f"{source} ({role}, held out)"
        axes.plot(steps, [row["loss"] for row in mine], "o-", color=color, markersize=3, label=label)
        if mine[0].get("base_loss") is not None:
            base = [row["base_loss"] for row in mine]
            axes.plot(steps, base, "--", color=color, linewidth=1, label=f"{source}: base")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)
