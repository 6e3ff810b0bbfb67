"""`llama-pro-fast export RUN [OUT]`: write a run's model as an ordinary Hugging Face folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llama_pro_fast.cli import ArgumentParser, run_entry_point
from llama_pro_fast.console import say
from llama_pro_fast.training.export import export_run


def main(argv: list[str] | None = None) -> int:
    """The verb `export`."""
    parser = ArgumentParser(prog="llama-pro-fast export", description="Write a run's model as a Hugging Face folder.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("out", type=Path, nargs="?", help="folder of the export (default: RUN/export)")
    parser.add_argument("--from_step", type=int, help="take the checkpoint of this step (default: the last)")
    parser.add_argument(
        "--scale",
        type=_numbers,
        metavar="A",
        help="how much of what the new blocks add is kept, 0 (the base) to 1 (the run) and on to 2; after several "
        "expansions A1,A2,... for the new blocks of each, oldest first (a single A: of the last)",
    )
    arguments = parser.parse_args(argv)
    out, step = export_run(arguments.run, arguments.out, from_step=arguments.from_step, scale=arguments.scale)
    scaled = f", new blocks times {', '.join(f'{number:g}' for number in arguments.scale)}," if arguments.scale else ""
    say(f"exported step {step} of {arguments.run}{scaled} to {out}; load it with")
    say(f"AutoModelForCausalLM.from_pretrained({str(out)!r})")
    return 0


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no number (and no list of numbers such as 0.5,1)") from None


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
