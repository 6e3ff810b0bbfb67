"""What a page says of several runs: how they differ first, then their results, the best marked, and their curves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from llama_pro_fast.config import options
from llama_pro_fast.console import amount
from llama_pro_fast.reporting import curves
from llama_pro_fast.reporting.markup import UNKNOWN, Html, as_html, change, figure, median, pictures, plain, section
from llama_pro_fast.reporting.page_of_run import state, warnings
from llama_pro_fast.reporting.record import Record, by_source, number, results

OF_THE_MACHINE = ("output", "data.cache", "train.memory")
"""Keys that differ between runs and tell nothing of them."""


@dataclass(frozen=True)
class _Row:
    """A row of the table of several runs: a text for each, and where one can be best the figures, lowest or highest."""

    name: str
    texts: list[str]
    figures: list[float | None] | None = None
    best: Callable[..., float] = min


def side_by_side(runs: Sequence[Record], names: Sequence[str]) -> str:
    """The body of a page about several ``runs``, which are called ``names``."""
    heads = [Html(f"{_swatch(index)} {escape(name)}") for index, name in enumerate(names)]
    states = [state(run) for run in runs]
    warned = [f'<span class="warning">{escape(" ".join(warnings(run)))}</span>' for run in runs]
    legend = "".join(
        f'<li>{head} <span class="state {word}">{word}</span> {sentence} {warning}</li>'
        for head, (word, sentence), warning in zip(heads, states, warned, strict=True)
    )
    differing = _differing(runs)
    same = "" if differing else "<p>Their configurations are equal.</p>"
    groups = [("What differs", differing), *_compared(runs)]
    parts = [
        f'<header><h1>{len(runs):,} runs side by side</h1><ul class="legend">{legend}</ul></header>',
        section("Figures", Html(same + _side_by_side(heads, groups))),
        section("Curves", pictures(runs, Html(" ".join(f"<span>{head}</span>" for head in heads)))),
    ]
    return "\n".join(part for part in parts if part)


def _differing(runs: Sequence[Record]) -> list[_Row]:
    settings = [{key: value for key, value, _ in options(run.config)} for run in runs]
    rows = []
    strips = [run.trained.strip if run.trained else UNKNOWN for run in runs]
    if len(set(strips)) > 1:
        rows.append(_Row("blocks", [Html(f'<code class="strip">{escape(strip)}</code>') for strip in strips]))
    for key in settings[0]:
        values = [setting[key] for setting in settings]
        if key not in OF_THE_MACHINE and any(value != values[0] for value in values):
            rows.append(_Row(key, [plain(value) for value in values]))
    return rows


def _compared(runs: Sequence[Record]) -> list[tuple[str, list[_Row]]]:
    """Groups of rows: results by text, then how the training went."""
    found = [{(row["role"], row["source"]): row for row in results(run.rows)} for run in runs]
    measured = [{name: rows[-1].get("measured") for name, rows in by_source(run.rows).items()} for run in runs]
    groups = []
    for name in dict.fromkeys(name for mine in found for name in mine):
        role, source = name
        after = [mine[name]["after"] if name in mine else {} for mine in found]
        before = [(mine[name]["before"] or {}) if name in mine else {} for mine in found]
        # Of different texts no figure is the best.
        comparable = len({texts[name] for texts in measured if name in texts}) == 1
        rows = [_Row("at step", [f"{row['step']:,}" if row else UNKNOWN for row in after])]
        rows.append(_Row("loss before", [figure(row.get("loss")) for row in before]))
        losses = [number(row.get("loss")) for row in after]
        rows.append(_Row("loss now", [figure(loss) for loss in losses], losses))
        changes = [change(row.get("loss"), loss) for row, loss in zip(before, losses, strict=True)]
        rows.append(_Row("change", changes))
        for key, label in (("base_loss", "base"), ("kl", "KL(base ‖ now)"), ("bits_per_byte", "bits per byte")):
            values = [number(row.get(key)) for row in after]
            if any(value is not None for value in values):
                rows.append(_Row(label, [figure(value) for value in values], None if key == "base_loss" else values))
        title = f"{source} ({role}), nats per token"
        if not comparable:
            title += ": not the same text in all runs, so none is best"
            rows = [_Row(row.name, row.texts) for row in rows]
        groups.append((title, rows))
    went = [_Row("steps done", [f"{run.step:,}" for run in runs])]
    went.append(_Row("tokens", [amount(run.step * run.tokens_per_step) for run in runs]))
    for key, label, digits, best in (
        ("tokens_per_second", "tokens per second, median", ",.0f", max),
        ("peak_share", "of the peak FLOP/s, median", ".1%", max),
    ):
        values = [median([row.get(key) for row in run.of_kind("train")]) for run in runs]
        if any(values):
            went.append(_Row(label, [UNKNOWN if v is None else format(v, digits) for v in values], values, best))
    used = [[number(row.get("peak_memory_gib")) for row in run.of_kind("train")] for run in runs]
    memory = [max((value for value in mine if value is not None), default=None) for mine in used]
    if any(memory):
        went.append(_Row("memory, most, GiB", [figure(value, 2) for value in memory], memory))
    if any(run.skipped_steps for run in runs):
        went.append(_Row("steps left out", [f"{run.skipped_steps:,}" for run in runs]))
    return [*groups, ("Training", went)]


def _side_by_side(heads: Sequence[str], groups: Iterable[tuple[str, list[_Row]]]) -> str:
    lines = []
    for title, rows in groups:
        if rows:
            lines.append(f'<tr class="group"><th colspan="{len(heads) + 1}">{escape(title)}</th></tr>')
        for row in rows:
            known = [value for value in row.figures or [] if value is not None]
            best = row.best(known) if len(known) > 1 and len(set(known)) > 1 else None
            cells = ""
            for index, text in enumerate(row.texts):
                wins = best is not None and row.figures[index] == best
                cells += f'<td class="best">{as_html(text)} ★</td>' if wins else f"<td>{as_html(text)}</td>"
            lines.append(f"<tr><th>{escape(row.name)}</th>{cells}</tr>")
    head = "".join(f"<th>{head}</th>" for head in heads)
    return (
        '<div class="wide"><table class="runs"><caption>★ the best of a row</caption>'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _swatch(index: int) -> str:
    dashes = ("", "5 3", "6 2 2 2", "2 2")[index // len(curves.COLOURS) % 4]
    return (
        f'<svg class="swatch" viewBox="0 0 24 8" aria-hidden="true"><path d="M1 4H23" stroke-width="3" '
        f'stroke-dasharray="{dashes}" stroke="var(--run-{index % len(curves.COLOURS)})"/></svg>'
    )
