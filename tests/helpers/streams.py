"""A command in a process whose output nobody takes."""

from __future__ import annotations

import io
import os
import sys

import forked

from llama_pro_fast.evaluation import export_check
from llama_pro_fast.reporting import summary


def typed_with(how: str, argv: list[str]) -> None:
    """Run the command line in a process whose streams are as a shell would have left them, and know only ASCII.

    What takes longest at the end of a run is left out.
    """
    summary.draw_loss = lambda *_, **__: None
    export_check.available_memory = lambda: 0
    read, write = os.openpty() if how == "terminal gone" else os.pipe()
    for number, name in ((1, "stdout"), (2, "stderr")):
        if how == "missing":
            setattr(sys, name, None)  # as the interpreter does, should it find them closed
            os.close(number)
        else:
            os.dup2(write, number)
            stream = io.BufferedWriter(io.FileIO(number, "w"))
            setattr(sys, name, io.TextIOWrapper(stream, "ascii", line_buffering=name == "stderr"))
    if how == "missing":
        sys.__stdout__ = sys.__stderr__ = None
    os.close(write)
    os.close(read)
    forked.typed(["llama-pro-fast", *argv])
