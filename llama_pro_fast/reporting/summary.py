"""What a run leaves to read at its end: a summary for people and for programs, its page, and loss.png."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama_pro_fast.files import sync, writing_to
from llama_pro_fast.reporting import dial
from llama_pro_fast.reporting.curves import draw_loss
from llama_pro_fast.reporting.markup import change, figure
from llama_pro_fast.reporting.page import PAGE, write_page
from llama_pro_fast.reporting.record import Record, number, results
from llama_pro_fast.runs.metrics import read_metrics
from llama_pro_fast.runs.run_folder import SUMMARY


def summarise(run: Path, references: dict[tuple[str, str], dict[str, float]]) -> dict[str, Any]:
    """What the run's metrics say.

    Args:
        references: by (role, source) the figures to hold the model's against (see `evaluation.baselines`).

    Returns:
        Part of ``summary.json``: time and speed and memory, and for each source its first and last evaluation (see
        :func:`~llama_pro_fast.reporting.record.results`) with these references.
    """
    rows = read_metrics(run)
    train = [row for row in rows if row["kind"] == "train"]

    def known(key: str) -> list[float]:
        return [value for row in train if (value := number(row.get(key))) is not None]

    speeds = known("tokens_per_second")
    found = [result | references.get((result["role"], result["source"]), {}) for result in results(rows)]
    return {
        "seconds_of_steps": round(sum(known("seconds")), 1),
        "median_tokens_per_second": round(statistics.median(speeds), 1) if speeds else None,
        "peak_memory_gib": round(max(known("peak_memory_gib"), default=0.0), 3),
        "results": found,
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
        record = Record.read(run)
        draw_loss(record, folder / "loss.png", title=summary["title"])
        if summary["dial"]:
            dial.png(summary["dial"], folder / "dial.png", title=summary["title"])
        else:  # of before the run was resumed
            (folder / "dial.png").unlink(missing_ok=True)
        write_page([replace(record, summary=summary if complete else None)], run / PAGE)
        if complete:
            partial = run / (SUMMARY + ".new")
            partial.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
            sync(partial)
            partial.replace(run / SUMMARY)


def _markdown(summary: dict[str, Any]) -> str:
    lines = [f"# {summary['title']}", "", "| | |", "|---|---|"]
    for name, value in summary.items():
        if name in ("title", "results", "sample", "dial_said"):
            continue
        if name == "export_check":
            value = value["said"]
        elif name == "dial":
            value = summary["dial_said"] or "see below"
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

    for row in summary["results"]:
        before, after = row["before"] or {}, row["after"]
        lines.append(
            f"| {row['source']} | {row['role']} | {figure(before.get('loss'))} | {figure(after['loss'])} "
            f"| {change(before.get('loss'), after['loss'])} | {figure(after['base_loss'])} | {figure(after['kl'])} |"
        )
    lines += [
        "",
        "The same in bits per byte of text, beside a unigram model of the training side's tokens and gzip -9.",
        "",
        "| source | role | before | after | unigram | gzip |",
        "|---|---|---|---|---|---|",
    ]
    for row in summary["results"]:
        figures = ((row["before"] or {}).get("bits_per_byte"), row["after"]["bits_per_byte"])
        figures += (row.get("unigram_bits_per_byte"), row.get("gzip_bits_per_byte"))
        lines.append(f"| {row['source']} | {row['role']} | {' | '.join(map(figure, figures))} |")
    if summary["dial"]:
        columns, rows = dial.lines(summary["dial"])
        table = [columns, ["---"] * len(columns), *rows]
        lines += [
            "",
            f"The dial, {dial.title(summary['dial'])}.",
            "",
            *(f"| {' | '.join(line)} |" for line in table),
            "",
            "![dial](dial.png)",
        ]
    if summary["sample"]:
        lines += ["", "How a held-out document goes on, greedily:"]
        for name, said in (("prompt", "Prompt"), ("base", "Base"), ("now", "Now")):
            if summary["sample"][name] is not None:
                lines += ["", f"{said}:", "", *(f"    {line}" for line in summary["sample"][name].splitlines())]
    return "\n".join([*lines, "", "![loss](loss.png)", ""])
