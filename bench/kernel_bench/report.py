"""What a timing of the kernels says: its tables, the targets it reached, its picture. Needs no GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import common

__all__ = ["brief", "draw", "headline", "judge", "read", "summary", "table"]

Row = dict[str, Any]

SHARE_TARGETS = {
    "add_rms_norm": (0.85, "of the copy bandwidth"),
    "swiglu": (0.85, "of the copy bandwidth"),
    "rotary": (0.85, "of the copy bandwidth"),
    "linear_cross_entropy": (0.90, "of the speed of its bare products"),
    "attention": (0.97, "of the speed of the fastest backend"),
}
"""By the first word of an op's name, the share that ours should have, and of what."""

RIVALS = ("torch.compile", "liger")
"""Whom ours should be ahead of in every row they are in: by the rate of the work each has to do."""

PANELS = {"copy": "% of the copy bandwidth", "bare products": "% of the speed of the bare products",
          "fastest backend": "% of the speed of the fastest backend"}  # fmt: skip

COLORS = {"ours": "C0", "eager": "0.75", "torch.compile": "C1", "liger": "C2", "quack": "C4", "bare products": "0.45"}
OTHERS = ("C5", "C6", "C8", "C9", "C3", "C7")
"""Colours of attention's backends, in the order they come."""


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def groups(rows: list[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """The rows of each model and op by contestant."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["model"], row["op"]), {})[row["contestant"]] = row
    return found


def rate(row: Row) -> float | None:
    return row.get("GBps", row.get("TFLOPs"))


def judge(rows: list[Row]) -> list[dict[str, Any]]:
    """Every target of the ops timed; ``reached`` is None where a rival could not be measured."""
    targets = []
    for (model, op), by_name in groups(rows).items():
        ours = by_name["ours"]
        at_least, what = SHARE_TARGETS.get(op.split()[0], (None, ""))
        if at_least is not None:
            # Without a yardstick there is nothing to judge; without ours there is nothing to show.
            unknown = ours["share"] is None and ours["status"] == "ok"
            reached = None if unknown else ours["share"] is not None and ours["share"] >= at_least
            target = f"at least {at_least:.0%} {what}"
            targets.append({"model": model, "op": op, "target": target, "reached": reached, "measured": ours["share"]})
        for name in RIVALS:
            if name not in by_name:
                continue
            rival = rate(by_name[name])
            ahead = rate(ours) and rival and round(rate(ours) / rival, 4)
            reached = None if rival is None else ahead is not None and ahead > 1
            targets.append(
                {"model": model, "op": op, "target": f"ahead of {name} by rate", "reached": reached, "measured": ahead}
            )
    return targets


def headline(result: dict[str, Any]) -> str:
    return (
        f"{result['model']} at {result['tokens']:,} tokens, {result['dtype']}, on {result['device']}: "
        f"a copy {result['copy_GBps']:,.0f} GB/s, a product {result['product_TFLOPs']:,.3g} TFLOP/s"
    )


def brief(rows: list[Row]) -> str:
    """One line for the rows of one op, while the others are still to come."""
    said = ", ".join(
        f"{row['contestant']} {row['median_us']:,.1f} us" if row["status"] == "ok" else f"{row['contestant']} -"
        for row in rows
    )
    return f"{rows[0]['op']}, {rows[0]['model']}: {said}"


def table(rows: list[Row]) -> str:
    """The rows by model and op; last stands what one must know to understand the figures, or why there are none."""
    columns = ["contestant", "us median", "p10", "p90", "rate", "share", "of", "max error", "graph", ""]
    tables = []
    for (model, op), by_name in groups(rows).items():
        lines = []
        for name, row in by_name.items():
            error = "-" if row["max_error"] is None else f"{row['max_error']:.1e}"
            if row["status"] != "ok":
                lines.append([name, *["-"] * 6, error, "-", row["status"]])
                continue
            lines.append([
                name,
                *(f"{row[key]:,.1f}" for key in ("median_us", "p10_us", "p90_us")),
                f"{rate(row):,.4g} {'GB/s' if 'GBps' in row else 'TFLOP/s'}",
                "-" if row["share"] is None else f"{row['share']:.1%}",
                row["share_of"],
                error,
                "yes" if row["graph"] else "no",
                row["note"],
            ])  # fmt: skip
        first = next(iter(by_name.values()))
        tables.append(f"{op}, {model}: {first['count']}\n{common.table(columns, lines)}")
    return "\n\n".join(tables)


def summary(result: dict[str, Any]) -> str:
    """All tables, and the targets."""
    lines = ["", table(result["rows"]), ""]
    if result["device"].startswith("cpu"):
        return "\n".join([*lines, "a CPU runs the reference and not the kernels: no target is judged"])
    judged = [target for target in result["targets"] if target["reached"] is not None]
    missed = [target for target in judged if not target["reached"]]
    unknown = len(result["targets"]) - len(judged)
    lines.append(
        f"targets reached {len(judged) - len(missed)} of {len(judged)}"
        + (f"; {unknown} more could not be judged" if unknown else "")
    )
    for target in missed:
        measured = "nothing measured" if target["measured"] is None else f"{target['measured']:.3f}"
        lines.append(f"missed: {target['op']}, {target['model']}: {target['target']}: {measured}")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars for every op and contestant that was timed, a panel for each yardstick; the line is the target."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [row for row in result["rows"] if row["share"] is not None]
    panels = {
        yardstick: groups([row for row in timed if row["share_of"] == yardstick])
        for yardstick in PANELS
        if any(row["share_of"] == yardstick for row in timed)
    }
    if not panels:
        raise ValueError("nothing was timed, so there is nothing to draw")
    names = list(dict.fromkeys(row["contestant"] for row in timed))
    others = (name for name in names if name not in COLORS)
    colors = COLORS | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}

    # In units of a bar: a gap after each op, and room for a panel's title and axis.
    heights = [sum(len(by_name) + 1 for by_name in ops.values()) for ops in panels.values()]
    figure = Figure(figsize=(10, 0.2 * sum(heights) + 0.9 * len(panels) + 0.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    several_models = "," in result["model"]
    for axis, (yardstick, ops) in zip(axes, panels.items(), strict=True):
        place, ticks = 0.0, {}
        for (model, op), by_name in ops.items():
            ticks[f"{op}\n{model}" if several_models else op] = place + (len(by_name) - 1) / 2
            for name, row in by_name.items():
                bar = axis.barh(place, 100 * row["share"], height=0.85, color=colors[name])
                axis.bar_label(bar, [f"{100 * row['share']:.0f}"], padding=2, fontsize=7)
                at_least, _ = SHARE_TARGETS.get(op.split()[0], (None, ""))
                if name == "ours" and at_least is not None:
                    axis.plot([100 * at_least] * 2, [place - 0.5, place + 0.5], color="k", linewidth=1.5)
                place += 1
            place += 1
        axis.set_yticks(list(ticks.values()), list(ticks), fontsize=8)
        axis.set_ylim(place - 1.5, -1)
        axis.set_xlim(0, max(105, 110 * max(row["share"] for by_name in ops.values() for row in by_name.values())))
        axis.set_xlabel(PANELS[yardstick])
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    handles = [axes[0].barh(0, 0, color=colors[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 6), fontsize=8)
    figure.suptitle(headline(result) + "\nblack: the target for ours", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
