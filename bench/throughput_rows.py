"""The rows of bench/throughput.py: what they hold, and as a table."""

from __future__ import annotations

import math
import statistics
from typing import Any

import common

CONVENTION = "frozen-aware; causal attention, its backward 2x its forward; recomputation not counted"
MEASURED = (
    *(
        "tokens_per_s",
        "peak_gib",
        "first_loss",
        "loss",
        "gflop_per_token",
        "tflops",
        "tflops_flash",
        "share_of_product",
        "share_of_peak",
    ),
    *("parameters", "trained_parameters", "threads", "attention", "trained_dtype", "weights_digest", "flop_convention"),
    *("step_s", "round_tokens_per_s"),
)
"""Keys of a row that are null where it was not measured."""


def make_row(name: str, trains: str, results: list[dict[str, Any]], shared: dict[str, Any]) -> dict[str, Any]:
    """What the rounds of a contestant come to; what is measured is null where one did not end well."""
    bad = next((result for result in results if "error" in result), None)
    row = {"contestant": name, "trains": trains, "status": "measured", **shared, "rounds": len(results), "error": None}
    row |= dict.fromkeys(MEASURED)
    if bad is not None:
        return row | {"status": bad["status"], "error": bad["error"]}
    tokens = shared["seq"] * shared["micro_batch"]
    times = sorted(second for result in results for second in result["seconds"])
    median = statistics.median(times)
    p10, p90 = (times[round(share * (len(times) - 1))] for share in (0.1, 0.9))
    # Losses and counts are the same in every round.
    last = {key: value for key, value in results[-1].items() if key != "seconds"}
    tflops, tflops_flash = (tokens / median * last[key] / 1e3 for key in ("gflop_per_token", "gflop_per_token_flash"))
    return row | last | {
        "tokens_per_s": round(tokens / median, 1),
        "peak_gib": round(max(result["peak_gib"] for result in results), 4),
        "step_s": {"p10": round(p10, 6), "median": round(median, 6), "p90": round(p90, 6)},
        "round_tokens_per_s": [round(tokens / statistics.median(result["seconds"]), 1) for result in results],
        "flop_convention": CONVENTION,
        "tflops": round(tflops, 6),
        "tflops_flash": round(tflops_flash, 6),
        "share_of_product": round(tflops / shared["product_tflops"], 4),
        "share_of_peak": round(tflops / shared["peak_tflops"], 4) if shared["peak_tflops"] else None,
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a table, then what it cannot hold in words."""
    ours = next((row["tokens_per_s"] for row in rows if row["contestant"] == "ours"), None)
    columns = [
        "contestant",
        "tokens/s",
        "x ours",
        "step ms p10",
        "median",
        "p90",
        "peak GiB",
        "TFLOP/s",
        "% product",
        "% peak",
    ]
    steps = rows[0]["warmup"] + rows[0]["steps"]
    columns += ["loss step 1", f"step {steps}"]
    cells = []
    for row in rows:
        if row["status"] == "missing":
            continue
        if row["status"] != "measured":
            cells.append([row["contestant"], row["status"], *["-"] * (len(columns) - 2)])
            continue
        speed = row["tokens_per_s"]
        cells.append([
            row["contestant"],
            f"{speed:,.0f}",
            "-" if ours is None else f"{speed / ours:.3f}",
            *(f"{1e3 * row['step_s'][name]:,.1f}" for name in ("p10", "median", "p90")),
            f"{row['peak_gib']:.2f}",
            f"{row['tflops']:.3g}",
            f"{row['share_of_product']:.1%}",
            "-" if row.get("share_of_peak") is None else f"{row['share_of_peak']:.1%}",
            f"{row['first_loss']:.5f}",
            f"{row['loss']:.5f}",
        ])  # fmt: skip
    lines = [common.table(columns, cells)]
    by_error: dict[str, list[str]] = {}
    for row in rows:
        if row["error"]:
            by_error.setdefault(f"{row['status']}: {row['error']}", []).append(row["contestant"])
    lines += [f"{', '.join(names)}: {error}" for error, names in by_error.items()]
    return "\n".join(lines + intervals(rows) + aims(rows) + incomparable(rows))


def intervals(rows: list[dict[str, Any]]) -> list[str]:
    """Of speeds over ours, and of ours in eight bits over the best other, round by round: the mean, and how far off it
    may be with 95 %. A round that one of the two has not had does not count."""
    rounds = {r["contestant"]: r.get("round_tokens_per_s") or [] for r in rows if r["status"] == "measured"}
    pairs = [(name, "ours") for name in rounds if name != "ours"]
    if "ours-fp8" in rounds and (best := best_rival(rows)) is not None:
        pairs.append(("ours-fp8", best["contestant"]))
    lines = []
    for name, other in pairs:
        ratios = [a / b for a, b in zip(rounds[name], rounds.get(other, []), strict=False)]
        if len(ratios) in common.T_95:
            half = common.T_95[len(ratios)] * statistics.stdev(ratios) / math.sqrt(len(ratios))
            lines.append(
                f"{name}: {statistics.mean(ratios):.4f} +- {half:.4f} of {other} in {len(ratios)} rounds (95 %)"
            )
    return lines


def best_rival(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest other who trains new blocks, all in bf16 or better."""
    rivals = [
        row
        for row in rows
        if row["status"] == "measured" and row["trains"] == "new blocks"
        and not row["contestant"].startswith("ours") and "fp8" not in row["contestant"]
    ]  # fmt: skip
    return max(rivals, key=lambda row: row["tokens_per_s"], default=None)


AIMS = {"ours": 15_200, "ours-fp8": 1.12}
"""Of size 7b on an H200: tokens/s, and times the best other."""


def aims(rows: list[dict[str, Any]]) -> list[str]:
    """Whether they are met, where they are meant."""
    if not rows or rows[0]["size"] != "7b" or rows[0]["device"] != "NVIDIA H200":
        return []
    found = {row["contestant"]: row["tokens_per_s"] for row in rows if row["status"] == "measured"}
    best = best_rival(rows)
    if best is None:
        found.pop("ours-fp8", None)
    elif "ours-fp8" in found:
        found["ours-fp8"] /= best["tokens_per_s"]
    return [
        f"aim of {name}: {aim:g}, found {found[name]:g}: {'MET' if found[name] >= aim else 'NOT MET'}"
        for name, aim in AIMS.items()
        if name in found
    ]


def incomparable(rows: list[dict[str, Any]]) -> list[str]:
    """Who did not start where the others did: base and expansion are one function, so the first loss is one too."""
    measured = [row for row in rows if row["status"] == "measured"]
    lines = []
    for expanded in (True, False):
        if len({row["weights_digest"] for row in measured if (row["trains"] == "new blocks") is expanded}) > 1:
            lines.append("NOT COMPARABLE: contestants started from different weights")
    for row in measured[1:]:
        first, other = measured[0]["first_loss"], row["first_loss"]
        if abs(other / first - 1) > (1e-5 if row["compute_dtype"] == "float32" else 2e-3):
            who = f"of {row['contestant']} is {other:.6f}, that of {measured[0]['contestant']} {first:.6f}"
            lines.append(f"NOT COMPARABLE: the first loss {who}")
    return lines
