"""The console script `llama-pro-fast VERB ...`, and how every entry point tells the user of an error.

Nothing heavy is imported here: a verb's module is loaded when it is called, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, TextIO

from llama_pro_fast import __version__
from llama_pro_fast.console import flush_or_give_up, open_missing_streams
from llama_pro_fast.errors import ToldElsewhere, UserError
from llama_pro_fast.files import why_refused

PROGRAM = "llama-pro-fast"
VERBS = {
    "plan": "what a run will need in memory and cost, from the model's config alone",
    "expand": "insert identity copies of decoder blocks into a Llama-family checkpoint",
    "prepare": "tokenise the text of a run, once, with all CPUs, and say what is in it",
    "train": "train the new blocks of an expanded checkpoint on a domain",
    "evaluate": "loss and bits per byte of a model on your text, beside its base",
    "report": "one page about runs, also while they are going on: curves, what was learned and forgotten",
    "export": "write a run's model as an ordinary Hugging Face checkpoint",
}

BUG = 1
USER_ERROR = 2
INTERRUPTED = 128 + 2  # what a shell reports for SIGINT
BROKEN_PIPE = 128 + 13  # … and for SIGPIPE


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like every other error a user can cause."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (`{self.prog} --help` lists the options)")


def run_entry_point(
    main: Callable[[list[str] | None], int], argv: list[str] | None = None, *, several: bool = False
) -> int:
    """Call a verb's ``main`` and turn what the user caused into one line and an exit code.

    Args:
        several: whether it may run in several processes, as torchrun starts them.

    `UserError`, argument errors, a stdout on a full disk: one line on stderr, 2. Ctrl-C: 130. A reader of stdout that
    went away (`| head`): 141, silently. Anything else is a bug and keeps its traceback. The code is the same where
    nobody hears of it. One of several processes ends at once after an error: what PyTorch does at the end of a process
    may wait for others that are gone.
    """
    try:
        code = _exit_code(main, argv, several=several)
    except Exception:
        if not _has_joined():
            raise
        traceback.print_exc()
        code = BUG
    if code and _has_joined():
        atexit._run_exitfuncs()
        os._exit(code)
    return code


def _exit_code(main: Callable[[list[str] | None], int], argv: list[str] | None, *, several: bool) -> int:
    open_missing_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows only ASCII
    try:
        if not several:
            _check_alone()
        code = main(argv)
        if not sys.stdout.closed:
            sys.stdout.flush()
        return code
    except ToldElsewhere:
        return USER_ERROR
    except (UserError, argparse.ArgumentError) as error:
        line = " ".join(part.strip() for part in str(error).splitlines())
        return _tell(f"error: {line}", USER_ERROR)
    except KeyboardInterrupt:
        return _tell("interrupted", INTERRUPTED)
    except BrokenPipeError:
        return BROKEN_PIPE
    except OSError as error:
        if error.filename is not None or _can_write(sys.stdout):
            raise
        return _tell(f"error: stdout cannot be written: {why_refused(error)}", USER_ERROR)
    finally:
        for stream in (sys.stdout, sys.stderr):
            flush_or_give_up(stream)


def _check_alone() -> None:
    """Refuse the processes of a launcher, for a verb that is one process."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        words = "only `train` shares its work among processes; start this verb by itself, not by torchrun"
        raise UserError(words) if os.environ.get("RANK", "0") == "0" else ToldElsewhere(words)


def _has_joined() -> bool:
    """Whether this process is one of several that know each other."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def _can_write(stream: TextIO) -> bool:
    try:
        stream.write("\n")
        stream.flush()
    except (OSError, ValueError):
        return False
    return True


def _tell(line: str, code: int) -> int:
    with contextlib.suppress(OSError, ValueError):  # nobody listens
        print(f"{PROGRAM}: {line}", file=sys.stderr)
    return code


def main(argv: list[str] | None = None) -> int:
    """`llama-pro-fast VERB ...`; returns the exit code."""
    return run_entry_point(_dispatch, argv, several=True)


def _dispatch(argv: list[str] | None) -> int:
    verb, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help"):
        print(f"usage: {PROGRAM} VERB ...\n")
        for name, line in VERBS.items():
            print(f"  {name:10}{line}")
        print(f"\n`{PROGRAM} VERB --help` lists a verb's options.")
        return 0
    if verb == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    if verb not in VERBS:
        raise UserError(f"unknown verb {verb}; there are {', '.join(VERBS)}")
    if verb != "train":
        _check_alone()
    return importlib.import_module(f"llama_pro_fast.{verb}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
