"""`llama-pro-fast train --model.path BASE --expand.groups 8 --data.domain mine.jsonl --output runs/mine`."""

from __future__ import annotations

import sys
from pathlib import Path

from llama_pro_fast.cli import INTERRUPTED, run_entry_point
from llama_pro_fast.console import say, unheard
from llama_pro_fast.recipe import RECIPES, parse
from llama_pro_fast.training import run_folder
from llama_pro_fast.training.run import run_training


def main(argv: list[str] | None = None) -> int:
    """The verb `train`; without options the quickstart."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        output = run_folder.first_free(Path("runs", "quickstart"))
        with unheard():
            say(f"no options: the quickstart, into {output} (`llama-pro-fast train --help` for everything else)")
        argv = ["--config", str(RECIPES / "quickstart.yaml"), "--output", str(output)]
    request = parse(argv)
    summary = run_training(request.config, resume=request.resume, overwrite=request.overwrite)
    return 0 if summary is not None else INTERRUPTED


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
