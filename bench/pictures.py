"""Horizontal bars, one look for all benches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from workload import SIZES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, OTHERS, PURE = "#1f77b4", "0.55", "0.8"
"""Colours: ours; others; others in pure bf16, hatched too."""
WORDS = {
    "llama-factory": "LLaMA-Factory",
    "unsloth": "Unsloth",
    "hf": "HF",
    "lora": "LoRA on the base (HF)",
    "full": "full fine-tuning (HF)",
    "-liger": " + Liger",
    "-flash4": " + FlashAttention 4",
    "-compile": ", torch.compile",
    "-bf16": ", all bf16",
    "-checkpointing-trained": ", trained layers checkpointed",
    "-checkpointing": ", all layers checkpointed",
    "-mlp": ", MLP again",
    "-attention": ", all but attention again",
    "-block": ", block again",
    "-planned": ", as planned",
}
"""Parts of a contestant's name, a part before what it begins with."""


def sheet(width: float, height: float) -> Figure:
    """An empty figure in inches, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, label: str) -> None:
    """For bars from top to bottom: what they are long in, and nothing that is not needed."""
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.tick_params(axis="y", length=0, labelsize=10)
    axes.grid(axis="x", alpha=0.25)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


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
    """Tokens a second and peak memory side by side, of the contestants that ran or found no room."""
    if not (groups := ordered([row for row in rows if row["status"] != "failed"])):
        return
    # A place is left out between the groups.
    starts = [0, len(groups[0]) + 1]
    placed = [(first + i, row) for first, group in zip(starts, groups, strict=False) for i, row in enumerate(group)]
    last = placed[-1][0]
    height = 0.34 * (last + 1) + 1.5
    figure = sheet(13, height)
    low, tall = 0.95 / height, 0.34 * (last + 1) / height
    panels = [
        (figure.add_axes((0.3, low, 0.37, tall)), "tokens_per_s", "tokens/s", "{:,.0f}".format, "{x:,.0f}"),
        (figure.add_axes((0.705, low, 0.275, tall)), "peak_gib", "peak memory of a step, GiB", gib, "{x:g}"),
    ]
    for axes, key, label, form, ticks in panels:
        longest = max((row[key] or 0 for _, row in placed), default=0) or 1
        for place, row in placed:
            look = {"textcoords": "offset points", "xytext": (5, 0), "va": "center", "fontsize": 9.5}
            if row["status"] != "measured":
                axes.annotate(row["status"], (0, place), style="italic", color="0.35", **look)
                continue
            axes.barh(place, row[key], height=0.72, zorder=2, **fill(row))
            axes.annotate(form(row[key]), (row[key], place), zorder=4, **look)
        axes.set_xlim(0, 1.16 * longest)
        axes.set_ylim(-0.6, last + 0.6)
        axes.set_yticks([place for place, _ in placed], [])
        axes.xaxis.set_major_formatter(ticks)
        dress(axes, label)
    names = panels[0][0]
    names.set_yticklabels([in_words(row["contestant"]) for _, row in placed])
    for text, (_, row) in zip(names.get_yticklabels(), placed, strict=True):
        if ours(row):
            text.set(color=OURS, fontweight="bold")
    others = next((place for place, row in placed if row["trains"] != "new blocks"), None)
    if others:
        for axes, *_ in panels:
            axes.axhline(others - 1.15, color="0.75", linewidth=0.8, zorder=1)
        names.annotate("instead of block expansion", (0, others - 1.15), xycoords=("axes fraction", "data"),
                       xytext=(-6, -4), textcoords="offset points", ha="right", va="top", fontsize=8.5,
                       color="0.35", style="italic", annotation_clip=False)  # fmt: skip
    figure.suptitle(title(rows[0]), x=0.5, y=1 - 0.22 / height, va="top", fontsize=12)
    legend(figure, [row for _, row in placed if row["status"] == "measured"])
    save(figure, path)


def gib(size: float) -> str:
    return f"{size:.1f}" if size >= 1 else f"{size:.3f}"


def ours(row: dict[str, Any]) -> bool:
    return row["contestant"].split("-")[0] == "ours"


def fill(row: dict[str, Any]) -> dict[str, Any]:
    if ours(row):
        return {"color": OURS}
    if row["compute_dtype"] == row["trained_dtype"] == "bfloat16":
        return {"facecolor": PURE, "edgecolor": "0.55", "hatch": "///", "linewidth": 0}
    return {"color": OTHERS}


def legend(figure: Figure, rows: list[dict[str, Any]]) -> None:
    """Of the fills that there are."""
    from matplotlib.patches import Patch

    kinds = {}
    for row in rows:
        masters = "trained weights and moments " + ("bf16" if "hatch" in fill(row) else row["trained_dtype"])
        kinds.setdefault(str(fill(row)), (fill(row), f"{'ours' if ours(row) else 'others'}, {masters}"))
    handles = [Patch(**look, label=label) for look, label in kinds.values()]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=9.5)


def title(row: dict[str, Any]) -> str:
    """Device, model and tokens of a step."""
    device = "CPU" if common.slug(row["device"]) == "cpu" else row["device"]
    tokens = f"{row['micro_batch']} \N{MULTIPLICATION SIGN} {row['seq']:,} tokens a step"
    if row["document"] < row["seq"]:
        tokens += f", documents of {row['document']:,}"
    return f"{SIZES[row['size']].title} on {device}, {tokens}, {row['compute_dtype']}"
