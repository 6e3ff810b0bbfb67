"""The curves of runs: what is drawn, and the drawing, as SVG for a page and as PNG.

A panel is one quantity of all runs. A noisy quantity is drawn twice, as it is (light) and smoothed (bold). The limits
of an axis leave out outliers, so that one spike does not flatten the rest, and the panel says what lies outside.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llama_pro_fast.console import amount
from llama_pro_fast.reporting.record import Record, by_source, number

COLOURS = ("#1f6feb", "#d1570a", "#1a8f4c", "#a03fc4", "#b8860b", "#c2255c", "#0e8a94", "#6b6f76")
"""Of the runs, in their order; told apart also where red and green are not, and visible on white and on black."""
INK, SOFT, GRID = "#202124", "#6f757c", "#dfe2e6"
PAGE_COLOURS = {INK: "var(--ink)", SOFT: "var(--soft)", GRID: "var(--grid)"}
"""What a page, which may be light or dark, puts in place of a picture's ink."""
SMOOTHED_FROM = 40
"""Rows from which a noisy quantity is smoothed."""
MOST_POINTS, MOST_MARKED = 1000, 40
LOG_FROM = 20
"""How many times longer than the shortest run the longest must be for a logarithmic axis of steps."""
WIDTH, HEIGHT = 4.6, 2.35
ROUND = [1, 2, 2.5, 5, 10]
"""Steps between ticks."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One run's values of a quantity.

    Attributes:
        run: number of the run, which gives the colour.
        x, y: float64; a NaN in ``y`` is a gap.
        compared: by name what the values are to be held against, dashed; as long as ``x``.
    """

    run: int
    x: np.ndarray
    y: np.ndarray
    compared: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One quantity of all runs that have it.

    Attributes:
        title, unit: what it is; ``unit`` may be empty.
        series: of each run.
        x_name: ``step`` or ``tokens``.
        last_x: where the axis ends, in all panels alike.
        log_from: where a logarithmic axis, on which runs of very different lengths are all seen, begins to be one.
        noisy: the values are to be smoothed where they are many.
        measured: the values are evaluations, few and exact.
        from_zero: whether the axis begins at 0.
    """

    title: str
    unit: str
    series: list[Series]
    x_name: str
    last_x: float
    log_from: float | None
    noisy: bool = False
    measured: bool = False
    from_zero: bool = False

    @property
    def smoothed(self) -> bool:
        """Whether it is drawn twice, as it is and smoothed."""
        return self.noisy and max(len(series.x) for series in self.series) >= SMOOTHED_FROM


TRAINING = (
    ("lr", "Learning rate", "", 1),
    ("grad_norm", "Gradient norm", "before clipping", 1),
    ("tokens_per_second", "Speed", "tokens per second", 1),
    ("peak_share", "Of the device's peak FLOP/s", "%", 100),
)
"""Key of a row of training, title, unit and factor, after the loss."""


def panels(runs: Sequence[Record], *, only_losses: bool = False) -> list[Panel]:
    """What there is to draw of ``runs``: the training loss, each held-out text, KL, and how the training went.

    Runs whose steps hold different numbers of tokens are drawn over tokens, so that equal places are equal work.
    """
    per_step = [run.tokens_per_step for run in runs]
    lengths = [run.step * size for run, size in zip(runs, per_step, strict=True) if run.step]
    by_tokens = len(set(per_step)) > 1
    last = max(run.step * (size if by_tokens else 1) for run, size in zip(runs, per_step, strict=True))
    axis = {"x_name": "tokens" if by_tokens else "step", "last_x": float(last)}
    differ = len(lengths) > 1 and max(lengths) >= LOG_FROM * min(lengths)
    axis["log_from"] = (min(per_step) if by_tokens else 1) if differ else None
    found = []

    def add(title: str, unit: str, rows: Sequence[list[dict[str, Any]]], key: str, **style: Any) -> None:
        """The panel of ``key`` in each run's ``rows``, if one of them has it."""
        factor, compared = style.pop("factor", 1), style.pop("compared", {})
        series = []
        for index, mine in enumerate(rows):
            y = _values(mine, key) * factor
            if np.isfinite(y).any():
                x = np.array([row["step"] for row in mine], np.float64) * (per_step[index] if by_tokens else 1)
                others = {name: _values(mine, of) for name, of in compared.items()}
                known = {name: other for name, other in others.items() if np.isfinite(other).any()}
                series.append(Series(run=index, x=x, y=y, compared=known))
        if series:
            found.append(Panel(title=title, unit=unit, series=series, **axis, **style))

    train = [run.of_kind("train") for run in runs]
    evaluations = [by_source(run.rows) for run in runs]
    sources = {name: [mine.get(name, []) for mine in evaluations] for mine in evaluations for name in mine}
    nats = "nats per token"
    add("Training loss", nats, train, "loss", noisy=True)
    bases = {"base": "base_loss", "first base": "first_base_loss"}
    for (role, source), rows in sources.items():
        add(f"Held out: {source} ({role})", nats, rows, "loss", measured=True, compared=bases)
    if only_losses:
        return found
    first = {"from the first base": "first_kl"}
    for (role, source), rows in sources.items():
        title = f"KL(base ‖ now): {source} ({role})"
        add(title, nats, rows, "kl", measured=True, from_zero=True, compared=first)
    for key, title, unit, factor in TRAINING:
        add(title, unit, train, key, noisy=key != "lr", from_zero=True, factor=factor)
    return found


def svg(panel: Panel) -> str:
    """The panel as an ``<svg>`` element without its title; see :func:`as_svg`."""
    return as_svg(lambda axes: _draw(axes, panel))


def as_svg(draw: Callable[[Any], None]) -> str:
    """What ``draw`` puts into axes as an ``<svg>`` element, its colours CSS variables (``--ink``, ``--run-0``)."""
    with _style():
        figure = _figure(WIDTH, HEIGHT)
        draw(figure.add_axes((0.125, 0.2, 0.835, 0.74)))
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    variables = PAGE_COLOURS | {colour: f"var(--run-{index})" for index, colour in enumerate(COLOURS)}
    return re.sub("|".join(variables), lambda match: variables[match[0]], text)


def draw_loss(run: Record, path: Path, *, title: str) -> None:
    """The panels of a run's losses as a PNG."""
    shown = [
        (f"{panel.title}, {panel.unit}" if panel.unit else panel.title, lambda axes, panel=panel: _draw(axes, panel))
        for panel in panels([run], only_losses=True)
    ]
    as_png(shown, path, title=title)


def as_png(pictures: Sequence[tuple[str, Callable[[Any], None]]], path: Path, *, title: str) -> None:
    """Titled pictures side by side, each as a function that draws it into axes."""
    columns = min(2, max(1, len(pictures)))
    lines = -(-len(pictures) // columns) or 1
    with _style():
        figure = _figure(WIDTH * columns, (HEIGHT + 0.35) * lines + 0.3)
        figure.set_layout_engine("constrained")
        figure.suptitle(title, fontsize=10, color=INK, parse_math=False)
        for index, (name, draw) in enumerate(pictures):
            axes = figure.add_subplot(lines, columns, index + 1)
            axes.set_title(name, loc="left", fontsize=8, color=INK, parse_math=False)
            draw(axes)
        figure.savefig(path, dpi=150, facecolor="white")


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib's own defaults, whatever the user's are, with text as text."""
    import matplotlib.style

    with matplotlib.style.context(["default", {"svg.fonttype": "none"}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font does not have
        yield


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def _values(rows: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    found = [number(row.get(key)) for row in rows]
    return np.array([np.nan if value is None else value for value in found], np.float64)


def _draw(axes: Any, panel: Panel) -> None:
    low, high = limits(panel)
    labelled: dict[str, list[float]] = {}
    for series in panel.series:
        colour = COLOURS[series.run % len(COLOURS)]
        line = {"color": colour, "linestyle": _dashes(series.run), "solid_capstyle": "round"}
        known = np.isfinite(series.y)
        x, y = series.x[known], series.y[known]
        if panel.measured or len(x) == 1:
            axes.plot(x, y, linewidth=1.4, marker="o" if len(x) <= MOST_MARKED else None, markersize=2.6, **line)
        elif not panel.smoothed:
            axes.plot(*_thinned(series.x, series.y), linewidth=1.4, **line)
        else:
            axes.plot(*_thinned(series.x, series.y), linewidth=0.7, alpha=0.3, **line)
            inside = (low <= y) & (y <= high)
            axes.plot(*_smoothed(x[inside], y[inside]), linewidth=1.7, **line)
        for name, other in series.compared.items():
            end = float(other[np.isfinite(other)][-1])
            if any(abs(end - drawn) <= 1e-6 * abs(end) for drawn in labelled.get(name, [])):
                continue  # of runs on one base
            labelled.setdefault(name, []).append(end)
            several = len(panel.series) > 1 and len(labelled[name]) > 1
            ink = colour if several else SOFT
            axes.plot(series.x, other, color=ink, linewidth=1, dashes=(4, 2) if name == "base" else (1.5, 1.5))
            if len(labelled[name]) == 1:
                place = {"xycoords": ("axes fraction", "data"), "xytext": (0, 3), "textcoords": "offset points"}
                axes.annotate(name, (0.985, end), ha="right", fontsize=7.5, color=SOFT, **place)
    axes.set_ylim(low, high)
    if outside := _outside(panel, low, high):
        axes.text(0.985, 0.96, outside, transform=axes.transAxes, ha="right", va="top", fontsize=7, color=SOFT)
    _scales(axes, panel)


def _dashes(run: int) -> str:
    """Runs beyond the colours take them again, in another line."""
    return ("-", "--", "-.", ":")[run // len(COLOURS) % 4]


def limits(panel: Panel) -> tuple[float, float]:
    """The limits of the panel's values.

    Of each run the middle 90 % and as much again on either side, as far as there are values; of evaluations always
    the first, which the others are held against.
    """
    lows, highs = [], []
    for series in panel.series:
        y = series.y[np.isfinite(series.y)]
        low, high = np.percentile(y, (5, 95))
        near = y[(y >= low - (high - low)) & (y <= high + (high - low))]
        seen = [near, *(other[np.isfinite(other)] for other in series.compared.values())]
        seen = np.concatenate([*seen, y[:1]] if panel.measured else seen)
        lows.append(seen.min())
        highs.append(seen.max())
    low, high = float(min(lows)), float(max(highs))
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    if panel.from_zero:
        return min(0.0, low) - 0.03 * (high - min(0.0, low)), high + margin
    return low - margin, high + margin


def _outside(panel: Panel, low: float, high: float) -> str:
    """How many values the limits leave out, and how far they go."""
    y = np.concatenate([series.y[np.isfinite(series.y)] for series in panel.series])
    parts = []
    for out, mark, end in ((y[y > high], "▲", np.max), (y[y < low], "▼", np.min)):
        if len(out):
            parts.append(f"{mark} {len(out):,} outside, to {_tick(float(f'{end(out):.3g}'))}")
    return "   ".join(parts)


def _scales(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator, SymmetricalLogLocator

    if panel.log_from:
        axes.set_xscale("symlog", linthresh=panel.log_from, linscale=0.4)
        axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=panel.log_from))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=ROUND))
    room = 0.02 * panel.last_x or 1.0
    axes.set_xlim(0 if panel.log_from else -room, panel.last_x + room)
    dress(axes, panel.x_name, of_x=amount if panel.x_name == "tokens" else _tick)


def dress(axes: Any, x_name: str, *, of_x: Callable[[float], str] | None = None) -> None:
    """What all pictures have in common: their ticks, their grid, the name of their horizontal axis."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: (of_x or _tick)(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.set_xlabel(x_name, fontsize=8, color=SOFT, labelpad=2, parse_math=False)
    axes.tick_params(labelsize=8, colors=SOFT, length=0)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _tick(value: float) -> str:
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same picture of fewer points: of each stretch of rows the lowest and the highest."""
    if len(x) <= MOST_POINTS:
        return x, y
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    begins = np.linspace(0, len(y), MOST_POINTS // 2, endpoint=False).astype(int)
    ends = np.append(begins[1:], len(y))
    kept = sorted(
        {
            int(begin + place(y[begin:end]))
            for begin, end in zip(begins, ends, strict=True)
            if end > begin
            for place in (np.argmin, np.argmax)
        }
    )
    return x[kept], y[kept]


def _smoothed(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean over a 25th of the rows around each, fewer at the ends."""
    half = max(2, len(y) // 50)
    total = np.concatenate(([0.0], np.cumsum(y)))
    at = np.arange(0, len(y), max(1, len(y) // MOST_POINTS))
    first, last = (at - half).clip(0), (at + half + 1).clip(max=len(y))
    return x[at], (total[last] - total[first]) / (last - first)
