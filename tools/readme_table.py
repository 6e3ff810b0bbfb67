"""The README's table of speeds and the picture above it, from the result they show.

PYTHONPATH=.:kernels python tools/readme_table.py
PYTHONPATH=.:kernels python tools/readme_table.py --check     ends with 1 if the README's table is another
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))  # a folder of scripts, no package

import common
from pictures import draw_throughput, gib, in_words, ordered, title

README = common.ROOT / "README.md"
RESULT = common.RESULTS / "throughput-7b-nvidia-h200.json"
PICTURE = common.ROOT / "docs" / "pictures" / "throughput.png"
PLACE = re.compile(r"(?<=<!-- throughput -->\n).*(?=<!-- /throughput -->)", re.DOTALL)


def table(file: Path, rows: list[dict[str, Any]]) -> str:
    """In Markdown: who ran, how many times faster ours is, and where it is from."""
    ours = next((row["tokens_per_s"] for row in rows if row["contestant"] == "ours"), None)
    step = rows[0]["warmup"] + rows[0]["steps"]
    head = f"| | tokens/s | ours / its | peak GiB | trained weights | loss of step {step} |"
    lines = [head, "|---|--:|--:|--:|---|--:|"]
    for row in itertools.chain(*ordered(rows)):
        cells = [row["status"], "", "", "", ""]
        if row["status"] == "measured":
            cells = [
                f"{row['tokens_per_s']:,.0f}",
                f"{ours / row['tokens_per_s']:.2f}" if ours else "",
                gib(row["peak_gib"]),
                row["trained_dtype"],
                f"{row['loss']:.4f}",
            ]
        lines.append(f"| {in_words(row['contestant'])} | {' | '.join(cells)} |")
    where = file.relative_to(common.ROOT).as_posix() if file.is_relative_to(common.ROOT) else file.name
    picture = f"![{title(rows[0])}]({PICTURE.relative_to(common.ROOT).as_posix()})"
    when = f"commit {rows[0]['commit'][:7]}, {rows[0]['date'][:10]}"
    return "\n".join([picture, "", *lines, "", f"{title(rows[0])}, {when}:", f"[{file.name}]({where}).", ""])


def with_table(text: str) -> str:
    """The README's text with the result's table between its marks."""
    if not PLACE.search(text):
        raise ValueError("README.md has no <!-- throughput --> … <!-- /throughput -->")
    made = table(RESULT, json.loads(RESULT.read_text()))
    return PLACE.sub(lambda _: made, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 if the table is another")
    options = parser.parse_args(argv)
    text = README.read_text(encoding="utf-8")
    made = with_table(text)
    if options.check:
        return int(made != text)
    README.write_text(made, encoding="utf-8")
    draw_throughput(json.loads(RESULT.read_text()), PICTURE)
    print(f"{README.name} and {PICTURE.name}: of {RESULT.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
