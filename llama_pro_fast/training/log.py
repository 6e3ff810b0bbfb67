"""Watching the loop: how long steps take, what they said, and whether somebody wants it to stop."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch

from llama_pro_fast.config import RunConfig
from llama_pro_fast.console import duration, say
from llama_pro_fast.errors import UserError
from llama_pro_fast.host import peak_memory_gib
from llama_pro_fast.training.metrics import MetricsWriter
from llama_pro_fast.training.run_folder import resume_command
from llama_pro_fast.training.schedule import learning_rate


class Log:
    """Collects each step's scalars on the device and reads them, its only wait, when a row is due.

    A row is due at the first step, every ``log_every`` steps and at the last. Its loss is the mean since the last row;
    its speed leaves out evaluation, saving, and the first step of the process, which compiles and allocates.

    Args:
        done: steps done before.
        unlogged: losses of the last of them that no row holds yet. A run that was stopped between two rows saved them,
            so that the next row is the one the uninterrupted run writes.
    """

    def __init__(
        self, config: RunConfig, metrics: MetricsWriter, device: torch.device, *, done: int, unlogged: list[float]
    ) -> None:
        self.config, self.metrics, self.device = config, metrics, device
        self.tokens_per_step = config.train.batch_size * config.train.seq_len
        self.first = done + 1
        self.unlogged = list(unlogged)
        self.pending: list[torch.Tensor] = []
        self.norm, self.skipped = torch.zeros(()), torch.zeros(())
        self.grad_norm = 0.0
        self.started: float | None = None
        self.timed_steps, self.timed_seconds = 0, 0.0

    def start(self) -> None:
        """A step begins."""
        if self.started is None:
            self.started = time.perf_counter()

    def step(self, step: int, loss: torch.Tensor, norm: torch.Tensor, skipped: torch.Tensor) -> None:
        """Step number ``step`` (from 1) was issued; its scalars may still be on their way.

        Raises:
            UserError: a gradient was not finite; no weight has seen it.
        """
        self.pending.append(loss)
        self.norm, self.skipped = norm, skipped
        due = step in (1, self.config.train.steps) or step % self.config.train.log_every == 0
        if due or step == self.first:
            self._read(step)
        if due:
            self._write(step)

    def pause(self, step: int) -> None:
        """Something other than steps follows step ``step``. Nothing is unread after it.

        Raises:
            UserError: as :meth:`step`.
        """
        if self.pending:
            self._read(step)
        self.started = None

    def _read(self, step: int) -> None:
        *losses, self.grad_norm, skipped = torch.stack([*self.pending, self.norm, self.skipped]).tolist()
        now = time.perf_counter()
        if step > self.first:
            self.timed_steps += len(losses)
            self.timed_seconds += now - self.started
        self.started, self.pending = now, []
        self.unlogged += losses
        if skipped:
            raise UserError(
                f"step {step}: {skipped:.0f} of the last {len(losses)} gradients were not finite (loss {losses[-1]}); "
                "no weight was touched by them. Look at the text of these steps or lower --optim.lr, then resume from "
                f"the last checkpoint: {resume_command(Path(self.config.output))}"
            )

    def _write(self, step: int) -> None:
        steps = self.config.train.steps
        loss = math.fsum(self.unlogged) / len(self.unlogged)
        rate = learning_rate(self.config.optim, step - 1, steps)
        speed = self.timed_steps * self.tokens_per_step / self.timed_seconds if self.timed_steps else None
        memory = peak_memory_gib(self.device)
        self.metrics.write(
            "train",
            step,
            loss=loss,
            lr=rate,
            grad_norm=self.grad_norm,
            seconds=self.timed_seconds,
            tokens_per_second=speed,
            peak_memory_gib=memory,
        )
        left = (steps - step) * self.tokens_per_step
        eta = "–" if speed is None else duration(left / speed)
        say(
            f"step {step:>{len(str(steps))}}/{steps}  loss {loss:7.4f}  lr {rate:.2e}  grad {self.grad_norm:8.3f}  "
            f"{'–' if speed is None else format(speed, ',.0f'):>9} tok/s  {memory:6.2f} GiB  eta {eta}"
        )
        self.unlogged, self.timed_steps, self.timed_seconds = [], 0, 0.0


class StopSignal:
    """The first Ctrl-C (or SIGTERM) asks for a stop at the end of the step; the second one ends at once.

    Only the main thread may handle signals; in another one they are left to the program that started it.
    """

    def __init__(self) -> None:
        self.stop_requested = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: Any) -> None:
        self.stop_requested = True
        # Not through a stream: the signal may have come in the middle of a write to one.
        os.write(2, b"stopping after this step; a second Ctrl-C stops at once, back to the last checkpoint\n")
        signal.signal(number, self.previous[number])

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
