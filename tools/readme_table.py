"""The tables of results in the pages: speeds, a few rows in the README and all in docs/results.md with a picture, and
methods in docs/evidence.md.

PYTHONPATH=.:kernels python tools/readme_table.py
PYTHONPATH=.:kernels python tools/readme_table.py --check     ends with 1 if a table is another
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))  # a folder of scripts, no package

import common
from forgetting_rows import markdown
from pictures import draw_throughput, in_words, ordered, title

README, PAGE, EVIDENCE = (common.ROOT / name for name in ("README.md", "docs/results.md", "docs/evidence.md"))
COMPARISON = common.RESULTS / "forgetting-cpu.json"
RESULT = common.RESULTS / "throughput-7b-nvidia-h200.json"
PICTURE = common.ROOT / "docs" / "pictures" / "throughput.png"
IN_README = ("ours", "hf-liger-flash4-bf16", "hf", "hf-checkpointing-trained")
"""What decides: ours, the fastest other way, stock transformers, and LLaMA-Factory's way."""


def table(rows: list[dict[str, Any]], page: Path) -> str:
    """In Markdown: who ran, how many times faster ours is, and where it is from; linked as ``page`` must."""
    ours = next((row["tokens_per_s"] for row in rows if row["contestant"] == "ours"), None)
    step = rows[0]["warmup"] + rows[0]["steps"]
    head = f"| | tokens/s | ours / its | peak GiB | trained weights | loss of step {step} |"
    lines = [head, "|---|--:|--:|--:|---|--:|"]
    for row in itertools.chain(*ordered(rows)):
        if page == README and row["contestant"] not in IN_README:
            continue
        cells = [row["status"], "", "", "", ""]
        if row["status"] == "measured":
            cells = [
                f"{row['tokens_per_s']:,.0f}",
                f"{ours / row['tokens_per_s']:.2f}" if ours else "",
                f"{row['peak_gib']:.1f}",
                row["trained_dtype"],
                f"{row['loss']:.4f}",
            ]
        lines.append(f"| {in_words(row['contestant'])} | {' | '.join(cells)} |")
    result, picture = (os.path.relpath(target, page.parent) for target in (RESULT, PICTURE))
    when = f"commit {rows[0]['commit'][:7]}, {rows[0]['date'][:10]}"
    above = [] if page == README else [f"![{title(rows[0])}]({picture})", ""]
    return "\n".join([*above, *lines, "", f"{title(rows[0])}, {when}:", f"[{RESULT.name}]({result}).", ""])


def replaced(page: Path, name: str, made: str) -> str:
    """A page's text with the table between the marks of that name."""
    text = page.read_text(encoding="utf-8")
    place = re.compile(f"(?<=<!-- {name} -->\n).*(?=<!-- /{name} -->)", re.DOTALL)
    if not place.search(text):
        raise ValueError(f"{page.name} has no <!-- {name} --> … <!-- /{name} -->")
    return place.sub(lambda _: made, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 if a table is another")
    options = parser.parse_args(argv)
    rows, compared = (json.loads(path.read_text()) for path in (RESULT, COMPARISON))
    pages = {page: replaced(page, "throughput", table(rows, page)) for page in (README, PAGE)}
    pages[EVIDENCE] = replaced(EVIDENCE, "forgetting", markdown(compared) + "\n")
    if options.check:
        return int(any(page.read_text(encoding="utf-8") != made for page, made in pages.items()))
    for page, made in pages.items():
        page.write_text(made, encoding="utf-8")
    draw_throughput(rows, PICTURE)
    print(f"{', '.join(page.name for page in pages)} and {PICTURE.name}: of {RESULT.name} and {COMPARISON.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
