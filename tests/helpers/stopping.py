"""A run that is asked to stop at a known place."""

from __future__ import annotations

import os
import signal

import pytest

from llama_pro_fast.training import loop


def stop_in_step(number: int, patch: pytest.MonkeyPatch) -> None:
    """From now on a run is asked to stop, as by Ctrl-C, when it begins its step ``number``, which so is not done."""
    step, calls = loop.train_step, []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    patch.setattr(loop, "train_step", counted)
