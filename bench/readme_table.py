"""The README's table of speeds and the picture above it, from the results that are there.

    PYTHONPATH=.:kernels python bench/readme_table.py

The result is a GPU's before a CPU's, of size 7b before another, and of those the latest.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import common
from pictures import draw_throughput, gib, ordered, title

README = common.ROOT / "README.md"
PICTURE = common.ROOT / "docs" / "pictures" / "throughput.png"
PLACE = re.compile(r"(?<=<!-- throughput -->\n).*(?=<!-- /throughput -->)", re.DOTALL)


def chosen(results: Path = common.RESULTS) -> tuple[Path, list[dict[str, Any]]]:
    """File and rows of the result that says most."""

    def rank(found: tuple[Path, list[dict[str, Any]]]) -> tuple[bool, bool, str]:
        row = found[1][0]
        return not row["device"].startswith("cpu"), row["size"] == "7b", row["date"]

    return max(((file, json.loads(file.read_text())) for file in results.glob("throughput-*.json")), key=rank)


def table(file: Path, rows: list[dict[str, Any]]) -> str:
    """In Markdown: who ran, and where it is from."""
    ours = next((row["tokens_per_s"] for row in rows if row["contestant"] == "ours"), None)
    lines = ["| | trains | tokens/s | against ours | peak GiB | of a product's TFLOP/s |", "|---|---|--:|--:|--:|--:|"]
    for row in itertools.chain(*ordered(rows)):
        cells = [row["status"], "", "", ""]
        if row["status"] == "measured":
            cells = [
                f"{row['tokens_per_s']:,.0f}",
                f"{row['tokens_per_s'] / ours:.2f}" if ours else "",
                gib(row["peak_gib"]),
                f"{row['share_of_product']:.0%}",
            ]
        lines.append(f"| `{row['contestant']}` | {row['trains']} | {' | '.join(cells)} |")
    where = file.relative_to(common.ROOT).as_posix() if file.is_relative_to(common.ROOT) else file.name
    source = f"[{file.name}]({where})"
    if any("transcribed" in row for row in rows):
        source += ",\ntranscribed from the table that the bench printed"
    picture = f"![{title(rows[0])}]({PICTURE.relative_to(common.ROOT).as_posix()})"
    return "\n".join([picture, "", *lines, "", f"{title(rows[0])}, commit {rows[0]['commit'][:7]}:", f"{source}.", ""])


def with_table(text: str, results: Path = common.RESULTS) -> str:
    """The README's text with the table of the chosen result between its marks."""
    if not PLACE.search(text):
        raise ValueError("README.md has no <!-- throughput --> … <!-- /throughput -->")
    made = table(*chosen(results))
    return PLACE.sub(lambda _: made, text)


def main() -> int:
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    file, rows = chosen()
    draw_throughput(rows, PICTURE)
    print(f"{README.name} and {PICTURE.name}: of {file.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
