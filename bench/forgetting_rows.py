"""The runs of bench/forgetting.py: which, in what order, and as a table and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import common
import pictures
from forgetting_texts import DOMAIN, GENERAL

from llama_pro_fast.config import ExpandConfig

REPLAY = 0.2
SCALES = (0.25, 0.5, 0.75)
FAST = 3e-3
"""At which new blocks forget without replay."""
WIDEST = 0.1
"""Forgotten, at the right edge of the picture."""
SEEDS = 3
"""Of the main methods."""
NAMES = dict(
    zip((*DOMAIN, *GENERAL), ("held-out pages", "another manual", "quotations", "Python", "satire"), strict=True)
)


class Method(NamedTuple):
    """How it is trained.

    Attributes:
        rates: to be tried, in this order.
        expand, parameters, blocks, optimizer: of the trainer's configuration.
        kl_weight: with it the base is the teacher on what is replayed.
        rank: of LoRA, which is trained here instead.
    """

    title: str
    rates: tuple[float, ...]
    expand: ExpandConfig = ExpandConfig()
    parameters: str = "new_blocks"
    blocks: str | None = None
    optimizer: str = "adamw"
    kl_weight: float = 0.0
    rank: int = 0


SIX = ExpandConfig(groups=6)
METHODS = {
    "expansion": Method("new blocks", (1e-3, 2e-3, 5e-4), SIX),
    "full": Method("full fine-tuning", (1e-4, 3e-4, 5e-5), parameters="all"),
    "lora-70": Method("LoRA, rank 70", (1e-3, 3e-3, 3e-4), rank=70),
    "blocks": Method("six old blocks", (3e-4, 1e-3, 1e-4), parameters="blocks", blocks="24,25,26,27,28,29"),
    "upper": Method("new blocks, upper half", (1e-3, 2e-3, 5e-4), ExpandConfig(after="16,18,20,23,26,29")),
    "lora-256": Method("LoRA, rank 256", (1e-3, 3e-3, 3e-4), rank=256),
    "muon": Method("new blocks, Muon", (3e-3, 1e-2, 1e-3), SIX, optimizer="muon"),
    "taught": Method("new blocks, the base as teacher", (1e-3, 2e-3, 5e-4), SIX, kl_weight=1.0),
    "english": Method("new blocks, English only", (1e-3,), SIX),
}
SWEPT = ("expansion", "full", "lora-70", "blocks")
"""Whose rates are swept first, and which are also trained without replay."""
MAIN = (*SWEPT, "taught")
"""That get three seeds."""
DIALS = ("expansion", "full", "lora-70")


@dataclass(frozen=True)
class Asked:
    """A run: of a method, or with a scale the model between its base and that run."""

    method: str
    rate: float
    replay: float = REPLAY
    seed: int = 0
    scale: float = 1.0

    def is_row(self, row: dict[str, Any]) -> bool:
        return all(row[key] == value for key, value in vars(self).items())


def wanted(rows: list[dict[str, Any]], methods: list[str]) -> Iterator[Asked]:
    """All runs in the order of their worth; which rate is the best one is known once those before it were done."""
    swept, best = [name for name in methods if name in SWEPT], {name: best_rate(rows, name) for name in methods}
    yield from (Asked(name, METHODS[name].rates[0]) for name in methods)
    yield from (Asked(name, METHODS[name].rates[turn]) for turn in (1, 2) for name in swept)
    yield from (Asked(name, best[name], seed=seed) for seed in range(1, SEEDS) for name in methods if name in MAIN)
    yield from (Asked(name, best[name], replay=0.0) for name in swept)
    # What there is for those who have no general text: nothing, or the dial.
    if "expansion" in methods:
        for rate, scales in ((best["expansion"], SCALES[-1:]), (FAST, SCALES)):
            yield from (Asked("expansion", rate, 0.0, n, by) for n in range(SEEDS) for by in (1.0, *scales))
    yield from (Asked(name, best[name], scale=scale) for name in methods if name in DIALS for scale in SCALES)
    yield from (Asked(name, rate) for name in methods for rate in METHODS[name].rates[1:])


def best_rate(rows: list[dict[str, Any]], name: str) -> float | None:
    """Of those tried, the one at which most is gained less what is forgotten; None before any was. It is looked at to a
    hundredth of a nat, as seeds differ by that, and of equal ones the smallest is taken."""
    tried = {row["rate"]: row for row in rows[1:] if Asked(name, row["rate"]).is_row(row)}
    return max(tried, key=lambda rate: (round(balance(rows, tried[rate]), 2), -rate), default=None)


def balance(rows: list[dict[str, Any]], row: dict[str, Any]) -> float:
    gain, forgotten = gain_and_forgotten(rows, row)
    return gain - forgotten


def gain_and_forgotten(rows: list[dict[str, Any]], row: dict[str, Any]) -> tuple[float, float]:
    """Nats per token, means over the texts of the domain and over the others."""
    base = next(each for each in rows if each["method"] == "base")["loss"]
    gain, rise = ([row["loss"][text] - base[text] for text in texts] for texts in (DOMAIN, GENERAL))
    return -mean(gain), mean(rise)


class Mean:
    """Of one number over the seeds, in their order.

    Attributes:
        half: of its interval of 95 %; None from fewer seeds than SEEDS.
    """

    def __init__(self, values: Sequence[float]) -> None:
        self.values, self.mean = values, mean(values)
        self.half = common.T_95[SEEDS] * stdev(values) / SEEDS**0.5 if len(values) == SEEDS else None

    def __str__(self) -> str:
        return f"{self.mean:+.3f}" + ("" if self.half is None else f" ± {self.half:.3f}")

    def beside(self, other: Mean) -> str:
        """In a word, by the difference seed for seed: runs of one seed see the same text. Of fewer seeds nothing is
        said."""
        if self.half is None or other.half is None:
            return ""
        difference = Mean([here - there for here, there in zip(self.values, other.values, strict=True)])
        if abs(difference.mean) <= difference.half:
            return " (tie)"
        return " (more)" if difference.mean > 0 else " (less)"


class Result(NamedTuple):
    """What the seeds of one method, rate, replay and scale came to."""

    rows: list[dict[str, Any]]
    gained: Mean
    forgotten: Mean

    @property
    def asked(self) -> Asked:
        return Asked(**{key: self.rows[0][key] for key in ("method", "rate", "replay", "scale")})

    def change(self, base: dict[str, Any]) -> list[str]:
        """Of the loss of each text."""
        return [f"{mean(row['loss'][text] for row in self.rows) - base['loss'][text]:+.3f}" for text in NAMES]

    def work(self) -> list[str]:
        return [f"{self.rows[0]['gflop'][when]:.2f}" for when in ("train", "serve")]


def results(rows: list[dict[str, Any]]) -> list[Result]:
    """Of all rows but the base's, which is the first."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows[1:]:
        groups.setdefault((row["method"], row["rate"], row["replay"], row["scale"]), []).append(row)
    found = []
    for of_seeds in groups.values():
        of_seeds.sort(key=lambda row: row["seed"])
        found.append(
            Result(of_seeds, *map(Mean, zip(*(gain_and_forgotten(rows, row) for row in of_seeds), strict=True)))
        )
    order = list(METHODS)
    return sorted(found, key=lambda each: (-each.asked.replay, order.index(each.asked.method)))


def summary(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each result."""
    lines = []
    for each in results(rows):
        asked = each.asked
        how = [f"{value:g}" for value in (asked.rate, asked.replay, asked.scale)]
        means = [str(each.gained), str(each.forgotten)]
        lines.append([METHODS[asked.method].title, *how, *means, *each.change(rows[0]), *each.work()])
    return lines


COLUMNS = ["method", "rate", "replay", "scale", "gained", "forgotten", *NAMES.values(), "train", "serve"]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/evidence.md: every method at its best rate, in a word beside new blocks on the same replay."""
    heads = ["method", "rate", "seeds", "gained", "forgotten", *NAMES.values(), "training", "served"]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'--:|' * (len(heads) - 1)}"]
    best = [each for each in results(rows) if each.asked.rate == best_rate(rows, each.asked.method)]
    ours = {each.asked.replay: each for each in best if each.asked.method == "expansion" and each.asked.scale == 1}
    for each in best:
        asked = each.asked
        if asked.scale == 1:
            new = ours[asked.replay]
            means = zip((each.gained, each.forgotten), (new.gained, new.forgotten), strict=True)
            words = [f"{here}{'' if each is new else here.beside(there)}" for here, there in means]
            title = METHODS[asked.method].title + ("" if asked.replay else ", no replay")
            cells = [title, f"{asked.rate:g}", str(len(each.rows)), *words, *each.change(rows[0]), *each.work()]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Gain against forgetting: left every method at its rates, right the dials of the best ones."""
    found, figure = results(rows), pictures.sheet(11, 6.5)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    for number, (name, method) in enumerate(METHODS.items()):
        of_method = [each for each in found if each.asked.method == name]
        rates = [each for each in of_method if each.asked.scale == 1 and each.asked.replay]
        best = [each for each in of_method if each.asked.rate == best_rate(rows, name)]
        dial = [each for each in best if each.asked.replay]
        look = {"color": f"C{number}", "marker": "o" if name in MAIN else "s"}
        if rates:
            _line(left, rates, "rate", label=method.title, **look)
        if any(each.asked.scale < 1 for each in dial):
            _line(right, dial, "scale", label=method.title, **look)
        if fast := [each for each in of_method if (each.asked.rate, each.asked.replay) == (FAST, 0)]:
            _line(right, fast, "scale", label=f"{method.title}, {FAST:g}, no replay", markerfacecolor="white", **look)
        for each in best:
            if not each.asked.replay and each.asked.scale == 1:
                _dot(left, each, "", markerfacecolor="white", **look)
    for axes, title in (
        (left, f"learning rates; {REPLAY:.0%} replay, hollow: none"),
        (right, "dials: part of what was learned is kept"),
    ):
        axes.plot(0, 0, "k*", markersize=10)
        axes.annotate("base", (0, 0), xytext=(6, -10), textcoords="offset points", fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("forgotten: rise of the loss on other texts, nats per token; left is better")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    outside = [each for each in found if each.forgotten.mean > WIDEST]
    for number, each in enumerate(outside):
        name = f"{METHODS[each.asked.method].title}, {each.asked.rate:g}"
        said = f"outside: {name}, forgotten {each.forgotten.mean:.2f}, gained {each.gained.mean:.2f}"
        left.set_xlim(right=WIDEST)
        left.text(0.99, 0.985 - 0.03 * number, said, transform=left.transAxes, fontsize=7, ha="right", va="top")
    left.set_ylabel("gained: fall of the loss on German; up is better")
    pictures.save(figure, path)


def _line(axes: Any, of_method: list[Result], key: str, *, label: str, **look: Any) -> None:
    ordered = sorted(of_method, key=lambda each: getattr(each.asked, key))
    points = [(each.forgotten.mean, each.gained.mean) for each in ordered]
    axes.plot(*zip(*([(0.0, 0.0)] * (key == "scale") + points), strict=True), label=label, ms=4, **look)
    for each in ordered:
        _dot(axes, each, f"{getattr(each.asked, key):g}", **look)


def _dot(axes: Any, each: Result, text: str, *, color: str, **look: Any) -> None:
    """With bars for the interval where there is one."""
    x, y = each.forgotten, each.gained
    axes.errorbar(x.mean, y.mean, xerr=x.half, yerr=y.half, ls="", ms=4, color=color, capsize=2, **look)
    axes.annotate(text, (x.mean, y.mean), xytext=(4, -10), textcoords="offset points", fontsize=7, color=color)
