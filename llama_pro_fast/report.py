"""`llama-pro-fast report RUN [RUN ...]`: one page about runs, also while they are going on."""

from __future__ import annotations

import sys
from pathlib import Path

from llama_pro_fast.cli import ArgumentParser, run_entry_point
from llama_pro_fast.console import say
from llama_pro_fast.errors import UserError
from llama_pro_fast.reporting.page import PAGE, is_page, write_page
from llama_pro_fast.reporting.record import Record
from llama_pro_fast.runs.run_folder import shown


def main(argv: list[str] | None = None) -> int:
    """The verb `report`."""
    parser = ArgumentParser(
        prog="llama-pro-fast report",
        description="One page of HTML about a run, or about several side by side. They may be running, stopped, "
        "crashed or finished.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.html",
        help=f"where the page goes (default: RUN/{PAGE} of one run, report.html in this folder of several)",
    )
    arguments = parser.parse_args(argv)
    folders = list(dict.fromkeys(run.resolve() for run in arguments.runs))
    out = arguments.out or (folders[0] / PAGE if len(folders) == 1 else Path("report.html"))
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out}: a page of HTML; give a name that ends in .html")
    runs = [Record.read(folder) for folder in folders]
    try:
        if out.exists() and not is_page(out):
            raise UserError(f"{out}: there is a file already that is no report; give another name with --out")
        write_page(runs, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another place with --out") from error
    say(f"report: {shown(out)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
