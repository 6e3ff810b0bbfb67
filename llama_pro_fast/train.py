"""`llama-pro-fast train --model.path BASE --expand.groups 8 --data.domain mine.jsonl --output runs/mine`."""

from __future__ import annotations

import sys
from pathlib import Path

from llama_pro_fast.cli import run_entry_point
from llama_pro_fast.console import say, unheard
from llama_pro_fast.ranks import Ranks, joined
from llama_pro_fast.recipe import RECIPES, parse
from llama_pro_fast.runs import run_folder
from llama_pro_fast.training.run import run_training
from llama_pro_fast.training.signals import Stopped

PREDECESSOR = 300
"""Seconds that `--resume auto` waits for the process before it, which a scheduler may still be ending."""


def main(argv: list[str] | None = None) -> int:
    """The verb `train`; without options the quickstart."""
    try:
        with joined() as ranks:
            _train(sys.argv[1:] if argv is None else argv, ranks)
    except Stopped as stopped:
        return stopped.exit_code
    return 0


def _train(argv: list[str], ranks: Ranks) -> None:
    plain = all(ranks.gather(not argv))
    with ranks.together():
        if plain and ranks.leads:
            output = run_folder.first_free(Path("runs", "quickstart"))
            with unheard():
                say(f"no options: the quickstart, into {output} (`llama-pro-fast train --help` for everything else)")
            argv = ["--config", str(RECIPES / "quickstart.yaml"), "--output", str(output)]
    argv, nothing_left = ranks.share(argv) if plain else argv, False
    with ranks.together():
        request = parse(argv)
        output = request.config.output and Path(request.config.output)
        going_on = request.auto and request.resume and request.from_step is None
        if going_on and ranks.leads:
            nothing_left = run_folder.nothing_left(output, request.config)
    if ranks.share(nothing_left):
        with unheard():
            say(f"{run_folder.shown(output)}: finished already")
        return
    run_training(
        request.config,
        resume=request.resume,
        overwrite=request.overwrite,
        from_step=request.from_step,
        patience=PREDECESSOR if request.auto else 0.3,
    )


if __name__ == "__main__":
    sys.exit(run_entry_point(main, several=True))
