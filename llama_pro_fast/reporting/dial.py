"""The dial (`evaluation.dial`) of a finished run to look at: a table, and gain against forgetting in a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_pro_fast.reporting.curves import COLOURS, SOFT, as_png, as_svg, dress
from llama_pro_fast.reporting.markup import change, figure

Rows = Sequence[dict[str, Any]]


def title(rows: Rows) -> str:
    """What the table is."""
    tokens = max(row["tokens"] for row in rows)
    return (
        f"new blocks scaled (export --scale): loss of the base (× 0), change from it; at most {tokens:,} tokens a text"
    )


def lines(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of the table: a text, its role, the base's loss and for each scale above 0 the change from it;
    under a general text its KL(base ‖ scaled)."""
    found = []
    for mine in _texts(rows):
        first, *scaled = mine
        base = first["base_loss"]
        found.append([first["source"], first["role"], figure(base), *(change(base, row["loss"]) for row in scaled)])
        if first["role"] == "general":
            found.append(["", "its KL", figure(first["kl"]), *(figure(row["kl"]) for row in scaled)])
    return ["text", "role", "× 0", *(f"× {row['scale']:g}" for row in scaled)], found


def svg(rows: Rows) -> str:
    """The picture as an ``<svg>`` element."""
    return as_svg(lambda axes: _draw(axes, rows))


def png(rows: Rows, path: Path, *, title: str) -> None:
    """The picture as a file; ``title`` is of the run."""
    as_png([(caption(rows), lambda axes: _draw(axes, rows))], path, title=title)


def caption(rows: Rows) -> str:
    """What the picture's vertical axis is."""
    return f"Fall of the loss on {_domain(rows)[0]['source']}, nats per token"


def _texts(rows: Rows) -> list[list[dict[str, Any]]]:
    """The rows of each text."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["role"], row["source"]), []).append(row)
    return list(found.values())


def _domain(rows: Rows) -> list[dict[str, Any]]:
    """The rows of the first domain text."""
    return next(mine for mine in _texts(rows) if mine[0]["role"] == "domain")


def _draw(axes: Any, rows: Rows) -> None:
    """For each general text a curve over the scales: by how much its loss rose, and that on the first domain text
    fell. Up is learned, to the right forgotten; the base lies in the origin."""
    domain, general = _domain(rows), [mine for mine in _texts(rows) if mine[0]["role"] == "general"]
    fall = [row["base_loss"] - row["loss"] for row in domain]
    rises = [[row["loss"] - row["base_loss"] for row in mine] for mine in general]
    axes.axvline(0, color=SOFT, linewidth=1, dashes=(4, 2))
    for index, (mine, rise) in enumerate(zip(general, rises, strict=True)):
        axes.plot(rise, fall, color=COLOURS[index % len(COLOURS)], linewidth=1.4, marker="o", markersize=3,
                  label=mine[0]["source"])  # fmt: skip
    for row, y, *xs in zip(domain, fall, *rises, strict=True):
        axes.annotate(f"× {row['scale']:g}", (max(xs), y), xytext=(5, -10), textcoords="offset points", fontsize=7.5,
                      color=SOFT)  # fmt: skip
    axes.margins(x=0.1, y=0.12)
    if len(general) > 1:
        legend = axes.legend(frameon=False, fontsize=7.5, loc="lower right", labelcolor=SOFT)
        for text in legend.get_texts():
            text.set_parse_math(False)
    named = general[0][0]["source"] if len(general) == 1 else "general text"
    dress(axes, f"rise of the loss on {named}, nats per token")
