"""Watching the loop: how long steps take, what they said, and whether somebody wants it to stop."""

from __future__ import annotations

import math
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import torch

from llama_pro_fast.config import RunConfig
from llama_pro_fast.console import duration, peak_memory_gib, say
from llama_pro_fast.errors import UserError
from llama_pro_fast.optimizer import Optimizer, learning_rate
from llama_pro_fast.report import MetricsWriter


class Clock:
    """Seconds spent in steps; evaluation and saving stop it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.started: float | None = None

    def start(self) -> None:
        if self.started is None:
            self.started = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap or start."""
        now = time.perf_counter()
        passed, self.started = now - self.started, now
        self.seconds += passed
        return passed

    def pause(self) -> None:
        self.started = None


class Log:
    """Collects each step's scalars on the device and reads them, the only wait of a step, every ``log_every`` steps."""

    def __init__(
        self, config: RunConfig, metrics: MetricsWriter, clock: Clock, device: torch.device, start: int
    ) -> None:
        self.config, self.metrics, self.clock, self.device = config, metrics, clock, device
        self.steps = config.train.steps
        self.tokens_per_step = config.train.batch_size * config.train.seq_len
        self.first = start + 1
        self.logged = start
        self.losses: list[torch.Tensor] = []
        self.norm = torch.zeros(())
        self.timed_steps, self.timed_seconds = 0, 0.0

    @property
    def speed(self) -> float | None:
        """Tokens per second over all timed steps."""
        return self.timed_steps * self.tokens_per_step / self.timed_seconds if self.timed_seconds else None

    def step(self, step: int, loss: torch.Tensor, norm: torch.Tensor, optimizer: Optimizer) -> None:
        self.losses.append(loss)
        self.norm = norm
        if step == 1 or step % self.config.train.log_every == 0:
            self.flush(step, optimizer)

    def flush(self, step: int, optimizer: Optimizer) -> None:
        """Read what was collected, write it, say it.

        Raises:
            UserError: a gradient was not finite; no weight has seen it.
        """
        if not self.losses:
            return
        *losses, norm, skipped = torch.stack([*self.losses, self.norm, optimizer.skipped]).tolist()
        seconds = self.clock.lap()
        count = step - self.logged
        if self.logged >= self.first:  # the first step compiles, allocates, fills caches
            self.timed_steps += count
            self.timed_seconds += seconds
        self.losses, self.logged = [], step
        if skipped:
            raise UserError(
                f"step {step}: {skipped:.0f} of the last {count} gradients were not finite (loss {losses[-1]}); no "
                "weight was touched by them. Look at the text of these steps or lower --optim.lr, then resume from the "
                f"last checkpoint: {resume_command(Path(self.config.output))}"
            )
        loss = math.fsum(losses) / len(losses)
        rate = learning_rate(self.config.optim, step - 1, self.steps)
        speed = count * self.tokens_per_step / seconds
        memory = peak_memory_gib(self.device)
        self.metrics.write(
            "train", step, loss=loss, lr=rate, grad_norm=norm, tokens_per_second=speed, peak_memory_gib=memory
        )
        eta = (self.steps - step) * self.tokens_per_step / (self.speed or speed)
        say(
            f"step {step:>{len(str(self.steps))}}/{self.steps}  loss {loss:7.4f}  lr {rate:.2e}  grad {norm:8.3f}  "
            f"{speed:>9,.0f} tok/s  {memory:6.2f} GiB  eta {duration(eta)}"
        )


class StopSignal:
    """The first Ctrl-C (or SIGTERM) asks for a stop at the end of the step; the second one ends at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopSignal:
        self.previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: Any) -> None:
        self.requested = True
        say("stopping after this step; a second Ctrl-C stops at once and loses the work since the last checkpoint")
        signal.signal(number, self.previous[number])

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def resume_command(output: Path) -> str:
    return shlex.join(["python", "-m", "llama_pro_fast.train", "--output", str(output), "--resume"])
