"""A function or a command in a process of its own: real signals, locks and exit codes, without seconds of imports each.

The processes are forked from a server that has imported the trainer, once for the whole session.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from llama_pro_fast.cli import main
from llama_pro_fast.runs.run_folder import claimed

KILLS = pytest.StashKey[str]()
"""In pytest's configuration: what came of killing runs, in a line."""
IMPORTED = ["llama_pro_fast.train", "transformers.models.llama.modeling_llama"]


def start(function: Callable[..., Any], *arguments: Any, screen: Path) -> BaseProcess:
    """Start ``function``, which its module must have by its name; what it prints goes to the file ``screen``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=_run, args=(function, arguments, str(screen)), daemon=True)
    process.start()
    return process


def typed(words: Sequence[str], folder: Path | str = ".", environment: Mapping[str, str] | None = None) -> None:
    """``python -m MODULE …``, ``python -c CODE`` or ``llama-pro-fast VERB …``, typed in ``folder``."""
    os.chdir(folder)
    os.environ |= environment or {}
    program, *sys.argv = words
    if program == "llama-pro-fast":
        sys.exit(main(sys.argv))
    option, argument = sys.argv[:2]
    sys.argv = sys.argv[1:]
    if option == "-m":
        runpy.run_module(argument, run_name="__main__", alter_sys=True)
    else:
        exec(compile(argument, "-c", "exec"), {"__name__": "__main__"})


def limited(words: Sequence[str], largest_file: int) -> None:
    """:func:`typed` where no file may grow beyond ``largest_file`` bytes, as under ``ulimit -f``."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    typed(words)


def hold(folder: str, connection: Connection) -> None:
    """Claim a run's folder, say so, and hold it until anything is received."""
    with claimed(Path(folder), resume=True, overwrite=False):
        connection.send("held")
        connection.recv()


def _run(function: Callable[..., Any], arguments: tuple[Any, ...], screen: str) -> None:
    file = os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    function(*arguments)
