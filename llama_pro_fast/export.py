"""`llama-pro-fast export RUN [OUT]`: write a run's model as an ordinary Hugging Face folder."""

from __future__ import annotations

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
    arguments = parser.parse_args(argv)
    out, step = export_run(arguments.run, arguments.out, from_step=arguments.from_step)
    say(f"exported step {step} of {arguments.run} to {out}; load it with")
    say(f"AutoModelForCausalLM.from_pretrained({str(out)!r})")
    return 0


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
