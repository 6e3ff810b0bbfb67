"""The console script `llama-pro-fast VERB ...`, and how every entry point tells the user of an error.

Nothing heavy is imported here: a verb's module is loaded when it is called, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from llama_pro_fast import __version__
from llama_pro_fast.errors import UserError

PROGRAM = "llama-pro-fast"
VERBS = {
    "plan": "what a run will need in memory and cost, from the model's config alone",
    "expand": "insert identity copies of decoder blocks into a Llama-family checkpoint",
    "train": "train the new blocks of an expanded checkpoint on a domain",
    "export": "write a run's model as an ordinary Hugging Face checkpoint",
}

USER_ERROR = 2
INTERRUPTED = 128 + 2  # what a shell reports for SIGINT
BROKEN_PIPE = 128 + 13  # … and for SIGPIPE


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like every other error a user can cause."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (`{self.prog} --help` lists the options)")


def run_entry_point(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """Call a verb's ``main`` and turn what the user caused into one line and an exit code.

    `UserError` and argument errors: one line on stderr, 2. Ctrl-C: 130. A reader of stdout that went away (`| head`):
    141, silently. Anything else is a bug and keeps its traceback.
    """
    try:
        code = main(argv)
        sys.stdout.flush()
        return code
    except (UserError, argparse.ArgumentError) as error:
        line = " ".join(part.strip() for part in str(error).splitlines())
        print(f"{PROGRAM}: error: {line}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def main(argv: list[str] | None = None) -> int:
    """`llama-pro-fast VERB ...`; returns the exit code."""
    return run_entry_point(_dispatch, argv)


def _dispatch(argv: list[str] | None) -> int:
    verb, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help"):
        print(f"usage: {PROGRAM} VERB ...\n")
        for name, line in VERBS.items():
            print(f"  {name:8}{line}")
        print(f"\n`{PROGRAM} VERB --help` lists a verb's options.")
        return 0
    if verb == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    if verb not in VERBS:
        raise UserError(f"unknown verb {verb}; there are {', '.join(VERBS)}")
    return importlib.import_module(f"llama_pro_fast.{verb}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
