"""A function or a verb in a process of its own: real signals, locks and exit codes, without seconds of imports each.

The processes are forked from a server that has imported the trainer, once for the whole session.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from llama_pro_fast.run_folder import claimed

IMPORTED = ["llama_pro_fast.train", "transformers.models.llama.modeling_llama"]


def start(function: Callable[..., Any], *arguments: Any, screen: Path) -> BaseProcess:
    """Start ``function``, which its module must have by its name; what it prints goes to the file ``screen``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=_run, args=(function, arguments, str(screen)), daemon=True)
    process.start()
    return process


def verb(name: str, *argv: str) -> None:
    """``python -m llama_pro_fast.NAME ARGV``, which ends in a SystemExit."""
    sys.argv = [name, *argv]
    runpy.run_module(f"llama_pro_fast.{name}", run_name="__main__", alter_sys=True)


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
