"""Pictures of the benches, and a contestant's name in words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from workload import SIZES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORDS = {
    "hf": "HF",
    "lora": "LoRA on the base (HF)",
    "full": "full fine-tuning (HF)",
    "-liger": " + Liger",
    "-flash4": " + FlashAttention 4",
    "-compile": ", torch.compile",
    "-bf16": ", all bf16",
    "-checkpointing-trained": ", trained layers checkpointed",
    "-checkpointing": ", all layers checkpointed",
    "-mlp": ", MLP recomputed",
    "-attention": ", all but attention recomputed",
    "-block": ", block recomputed",
    "-planned": ", as planned",
}
"""Parts of a contestant's name, a part before what it begins with."""


def sheet(width: float, height: float) -> Figure:
    """An empty figure in inches, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def ordered(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Those who train new blocks, then those who train something else: each from the fastest down, missing ones not."""
    found = [row for row in rows if row["status"] != "missing"]
    groups = [[row for row in found if (row["trains"] == "new blocks") is expanded] for expanded in (True, False)]
    return [sorted(group, key=lambda row: -(row["tokens_per_s"] or 0)) for group in groups if group]


def in_words(contestant: str) -> str:
    for part, words in WORDS.items():
        contestant = contestant.replace(part, words)
    return contestant


def draw_throughput(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens a second and peak memory side by side, of those who ran or found no room; other methods below a gap."""
    groups = ordered([row for row in rows if row["status"] != "failed"])
    starts = [0, len(groups[0]) + 1]
    placed = [(first + i, row) for first, group in zip(starts, groups, strict=False) for i, row in enumerate(group)]
    figure = sheet(13, 0.34 * (placed[-1][0] + 1) + 1.5)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(4, 3))
    for axes, key, label, form in (
        (left, "tokens_per_s", "tokens/s", "{:,.0f}".format),
        (right, "peak_gib", "peak memory of a step, GiB", "{:.1f}".format),
    ):
        for place, row in placed:
            measured = row["status"] == "measured"
            if measured:
                axes.barh(place, row[key], height=0.72, **fill(row))
            said, end = (form(row[key]), row[key]) if measured else (row["status"], 0)
            axes.annotate(said, (end, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9.5)
        axes.set_xlim(0, 1.16 * max([row[key] or 0 for _, row in placed] + [1e-9]))
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    left.set_yticks([place for place, _ in placed], [in_words(row["contestant"]) for _, row in placed])
    left.invert_yaxis()
    handles, labels = left.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=len(once), frameon=False)
    figure.suptitle(title(rows[0]), fontsize=12)
    save(figure, path)


def fill(row: dict[str, Any]) -> dict[str, Any]:
    """The look of a bar: ours in blue, pure bf16 hatched."""
    if row["contestant"].split("-")[0] == "ours":
        return {"color": "#1f77b4", "label": "ours, float32 masters"}
    if row["compute_dtype"] == row["trained_dtype"] == "bfloat16":
        return {"facecolor": "0.8", "edgecolor": "0.55", "hatch": "///", "label": "others, all bf16"}
    return {"color": "0.55", "label": "others, float32 masters"}


def title(row: dict[str, Any]) -> str:
    """Device, model and tokens of a step."""
    device = "CPU" if common.slug(row["device"]) == "cpu" else row["device"]
    tokens = f"{row['micro_batch']} \N{MULTIPLICATION SIGN} {row['seq']:,} tokens a step"
    if row["document"] < row["seq"]:
        tokens += f", documents of {row['document']:,}"
    return f"{SIZES[row['size']].title} on {device}, {tokens}, {row['compute_dtype']}"
