"""One page of HTML about one run, or about several side by side: what they are, how they stand, what they reached.

The page needs nothing beside itself: no network, no script, its pictures are in it. All text of a user is escaped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from llama_pro_fast.reporting.curves import COLOURS
from llama_pro_fast.reporting.markup import CSS
from llama_pro_fast.reporting.page_of_run import one_run
from llama_pro_fast.reporting.record import Record
from llama_pro_fast.reporting.side_by_side import side_by_side

PAGE = "report/report.html"
"""Where the page of one run lies in it."""
GENERATOR = '<meta name="generator" content="llama-pro-fast report">'
"""What tells a page of ours, which may be written over, from a user's file."""


def write_page(runs: Sequence[Record], path: Path) -> None:
    """Write the page about ``runs``; ``path`` holds all of it, or what it held."""
    content = page(runs)
    # A name of this process: a run may end, and write its page, while somebody asks for one.
    partial = path.with_name(f".{path.name}.{os.getpid()}.new")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # A folder's name may hold bytes that are no character.
        partial.write_text(content, encoding="utf-8", errors="replace")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def is_page(path: Path) -> bool:
    """Whether a file is a page of ours."""
    with open(path, "rb") as file:
        return GENERATOR.encode() in file.read(1000)


def page(runs: Sequence[Record]) -> str:
    """The page about ``runs``, one or several."""
    names = labels([run.folder for run in runs])
    title = names[0] if len(runs) == 1 else f"{len(runs)} runs: {', '.join(names)}"
    body = one_run(runs[0], names[0]) if len(runs) == 1 else side_by_side(runs, names)
    made = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    colours = "".join(f"--run-{index}:{colour};" for index, colour in enumerate(COLOURS))
    lighter = "".join(f"--run-{index}:color-mix(in srgb,{colour} 72%,white);" for index, colour in enumerate(COLOURS))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{GENERATOR}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} · llama-pro-fast</title>\n"
        f"<style>:root{{{colours}}}@media screen and (prefers-color-scheme:dark){{:root{{{lighter}}}}}{CSS}</style>"
        f"</head>\n<body>\n{body}\n<footer>llama-pro-fast report, made {escape(made)}</footer>\n</body></html>\n"
    )


def labels(folders: Sequence[Path]) -> list[str]:
    """For each folder the shortest end of its path that no other one has."""
    found = []
    for folder in folders:
        others = [other for other in folders if other != folder]
        for length in range(1, len(folder.parts) + 1):
            end = folder.parts[-length:]
            if all(other.parts[-length:] != end for other in others):
                break
        found.append(str(Path(*end)) if folder.name else str(folder))
    return found
