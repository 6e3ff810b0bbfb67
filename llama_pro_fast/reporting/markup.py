"""The parts a page of HTML is built of: figures as text, tables, sections, pictures, and the style of it all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from llama_pro_fast.config import Source
from llama_pro_fast.console import duration
from llama_pro_fast.reporting import curves
from llama_pro_fast.reporting.record import Record, number

UNKNOWN = "–"


class Html(str):
    """Text that is HTML already."""


def pictures(runs: Sequence[Record], legend: Html | None = None) -> Html:
    """The curves of ``runs`` under a legend."""
    found = curves.panels(runs)
    if not found:
        return Html("<p>No row was written yet.</p>")
    figures = []
    for panel in found:
        said = "; ".join(part for part in (panel.unit, "bold: smoothed" if panel.smoothed else "") if part)
        figures.append(picture(panel.title, said, curves.svg(panel)))
    note = f'<p class="key">{legend}</p>' if legend else ""
    if any(panel.log_from for panel in found):
        note += "<p>The runs differ much in length: the horizontal axes are logarithmic.</p>"
    return Html(f'{note}<div class="panels">{"".join(figures)}</div>')


def picture(title: str, said: str, svg: str) -> Html:
    """An ``<svg>`` element under its title and what more is said of it."""
    title, unit = escape(title), f" <span>{escape(said)}</span>" if said else ""
    drawn = svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    return Html(f"<figure><figcaption>{title}{unit}</figcaption>{drawn}</figure>")


def figure(value: Any, digits: int = 4) -> str:
    """``value`` with so many digits after the point; a dash where it is unknown."""
    value = number(value)
    return UNKNOWN if value is None else f"{value:,.{digits}f}"


def change(before: Any, after: Any) -> str:
    """From one figure to another, with its sign; a dash where one is unknown."""
    before, after = number(before), number(after)
    return UNKNOWN if before is None or after is None else f"{after - before:+,.4f}"


def median(values: Iterable[Any]) -> float | None:
    """Of those that are known."""
    known = [value for each in values if (value := number(each)) is not None]
    return statistics.median(known) if known else None


def count_of_steps(count: float) -> str:
    return f"{count:,.0f} step{'' if count == 1 else 's'}"


def when(seconds: float) -> str:
    """A moment, and how long ago it was."""
    ago = time.time() - seconds
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))}, {duration(max(0, ago))} before this page"


def plain(value: Any) -> str:
    """A value of a configuration, as a person writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, list):
        return text_of(value) if value and isinstance(value[0], Source) else ", ".join(map(plain, value))
    return UNKNOWN if value is None else str(value)


def text_of(sources: str | list[Source] | None) -> str:
    """The recipe's sources with their weights."""
    if not isinstance(sources, list):
        return sources or UNKNOWN
    return "; ".join(
        (source.name or source.path) + ("" if source.weight in (None, 1) else f" × {source.weight:g}")
        for source in sources
    )


def section(title: str, content: Html | None) -> str:
    """``content`` under its title; nothing where there is none."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def as_html(text: str) -> str:
    return text if isinstance(text, Html) else escape(text)


def facts(rows: Iterable[tuple[str, str]]) -> Html | None:
    """Names and what they are, in columns where there is room."""
    lines = "".join(f"<div><dt>{escape(name)}</dt><dd>{as_html(text)}</dd></div>" for name, text in rows)
    return Html(f"<dl>{lines}</dl>") if lines else None


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 2) -> Html:
    """A table whose columns after the first ``words`` are figures."""

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = [' class="word"' if index < words else "" for index in range(len(cells))]
        return "".join(f"<{tag}{kind}>{as_html(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    head, body = line("th", columns), "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    said = f"<caption>{escape(caption)}</caption>" if caption else ""
    return Html(f'<div class="wide"><table>{said}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')


CSS = """
:root{--ink:#202124;--soft:#5f656c;--grid:#dfe2e6;--paper:#fff;--card:#f6f7f9;--good:#13713a;--bad:#b3261e;
--busy:#1757b8;color-scheme:light dark}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e6e8ea;--soft:#a3a9b0;--grid:#3a3f45;--paper:#16181b;
--card:#1f2226;--good:#62c98a;--bad:#ff8a80;--busy:#82b1ff}}
body{margin:0 auto;max-width:76rem;padding:1.2rem 1.5rem 3rem;background:var(--paper);color:var(--ink);
font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.5rem;margin:0 0 .3rem;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:1.8rem 0 .5rem}
header p{margin:.2rem 0}code,pre{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
code{overflow-wrap:anywhere}.strip{letter-spacing:.12em;font-weight:600;margin-right:.6em}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--card);padding:.5rem .7rem;margin:.2rem 0}
dl{columns:2 26rem;column-gap:2.5rem;margin:.2rem 0}dl div{display:flex;break-inside:avoid;padding:.22rem 0;
border-bottom:1px solid var(--grid)}
dt{color:var(--soft);flex:0 0 8.5rem;padding-right:.8rem}dd{margin:0;overflow-wrap:anywhere;min-width:0}
details dt{flex-basis:13rem}pre+p{margin-top:.8rem}section>p{margin:.2rem 0}section>p.key{margin-bottom:.7rem}
.state{font-size:.85rem;font-weight:600;padding:.1rem .55rem;border-radius:1rem;border:1px solid;vertical-align:.15em;
white-space:nowrap;color:var(--soft)}
.finished{color:var(--good)}.running{color:var(--busy)}.crashed{color:var(--bad)}
.warning{border-left:3px solid var(--bad);padding:.1rem .7rem;margin:.5rem 0}
.legend .warning{border:0;padding:0;color:var(--bad)}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.2rem 0 1rem}
caption{text-align:left;white-space:nowrap;color:var(--soft);padding-bottom:.2rem}
th,td{padding:.22rem .9rem .22rem 0;text-align:right;border-bottom:1px solid var(--grid);vertical-align:top}
thead th{font-weight:600;color:var(--soft)}.word,.runs th:first-child,.group th{text-align:left}
.runs tbody th{font-weight:400;color:var(--soft);white-space:nowrap}
.runs .group th{font-weight:600;color:var(--ink);padding-top:.9rem}.runs td{overflow-wrap:anywhere;min-width:4rem}
.runs tr>:first-child{position:sticky;left:0;background:var(--paper)}
.best{font-weight:700;color:var(--good)}.runs td:not(.best)::after{content:" ★";visibility:hidden}
.legend{list-style:none;margin:.4rem 0;padding:0}.legend li{margin:.25rem 0}.key span{margin-right:1.4rem}
.swatch{width:1.5rem;height:.5rem;vertical-align:.1em;fill:none}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr));gap:1.1rem 1.6rem}
figure{margin:0;break-inside:avoid;min-width:0}figcaption{font-weight:600;overflow-wrap:anywhere}
figcaption span{font-weight:400;color:var(--soft)}figure svg{width:100%;height:auto;display:block}
figure svg text{font-family:inherit!important}
details{margin-top:1.8rem}summary{cursor:pointer;font-weight:600}
footer{margin-top:2rem;color:var(--soft);font-size:.85rem}
@media print{body{font-size:10.5px;max-width:none;padding:0}
.panels{grid-template-columns:1fr 1fr}.wide{overflow:visible}.runs th,.runs td{padding-right:.35rem;min-width:0}
tr{break-inside:avoid}h2{break-after:avoid}}
"""
