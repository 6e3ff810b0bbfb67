"""A process that tokenises, started by :mod:`llama_pro_fast.text.pool`.

It is fed lines of JSON, settings and then units, and answers in lines of JSON, each an object with one of
``progress`` (bytes of text, documents, tokens of the unit so far), with it ``note`` and ``damaged`` once it is done,
``refused`` (the message of a UserError), ``cache`` (the number and message of an OSError), ``failed`` (a traceback).

It ends at once when its input does, or its parent has gone, in whatever it is doing: a kill of the parent leaves none.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from llama_pro_fast.errors import UserError
from llama_pro_fast.text.documents import Unit
from llama_pro_fast.text.encoding import EncoderSettings
from llama_pro_fast.text.tokenizing import UnitTokenizer

REPORT_SECONDS = 0.5


def main() -> None:
    """Work until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    tasks: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(tasks,), daemon=True).start()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    gc.disable()  # it would look through tens of thousands of rows again and again

    def answer(**values: Any) -> None:
        answers.write(f"\0{json.dumps(values)}\n")  # see ANSWER of the pool
        answers.flush()

    try:
        _work(tasks, answer)
    except UserError as error:
        answer(refused=str(error))
    except OSError as error:
        answer(cache=[error.errno, error.strerror or str(error)])
    except MemoryError:
        answer(refused="memory ran out in a process that tokenises: give fewer --data.workers")
    except BaseException:
        answer(failed=traceback.format_exc())


def _work(tasks: queue.SimpleQueue[dict[str, Any]], answer: Any) -> None:
    init = tasks.get()
    tokenizer = UnitTokenizer(
        EncoderSettings(**init["settings"]),
        held_out=init["held_out"],
        cache=Path(init["cache"]),
        threads=init["threads"],
    )
    next_report, counts = 0.0, (0, 0, 0)

    def report(*progress: int) -> None:
        nonlocal next_report, counts
        counts = progress
        if time.monotonic() >= next_report:
            next_report = time.monotonic() + REPORT_SECONDS
            answer(progress=progress)

    while True:
        note, damaged = tokenizer.tokenize(Unit.from_dict(tasks.get()), report)
        answer(progress=counts, note=note, damaged=damaged)
        gc.collect()


def _receive(tasks: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in sys.stdin.buffer:
        tasks.put(json.loads(line))
    os._exit(0)


def _end_with(parent: int) -> None:
    # The input may stay open: a process that the parent has forked holds its end too.
    while os.getppid() == parent:
        time.sleep(REPORT_SECONDS)
    os._exit(0)
