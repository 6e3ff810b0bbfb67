"""Watching the loop: how long steps take, what they said, and which were left out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llama_pro_fast.config import Settled
from llama_pro_fast.console import amount, duration, say
from llama_pro_fast.errors import UserError
from llama_pro_fast.host import peak_memory_gib
from llama_pro_fast.runs.checkpoint import Saved, complete_checkpoints
from llama_pro_fast.runs.marker import LogState, step_of
from llama_pro_fast.runs.metrics import MetricsWriter
from llama_pro_fast.runs.run_folder import resume_command, shown
from llama_pro_fast.training.schedule import learning_rate, lower_rate


@dataclass(frozen=True)
class StepScalars:
    """What a step says of itself, on the device; nobody has waited for it.

    Attributes:
        losses: ``[micro-batches]`` float32, parts of the step's mean loss.
        norm: of the gradient before clipping.
        left_out: 1 where a loss or the norm is not finite, so that the step changed nothing; else 0.
        divergence: KL(base ‖ now), the mean over the step's general tokens; NaN where it has none.
        data_seconds: on the host, that the step waited for its batches.
    """

    losses: torch.Tensor
    norm: torch.Tensor
    left_out: torch.Tensor
    divergence: torch.Tensor
    data_seconds: float

    @property
    def row(self) -> torch.Tensor:
        """All that is on the device, ``[micro-batches + 3]``."""
        return torch.cat([self.losses, torch.stack([self.norm.float(), self.divergence, self.left_out])])


class Log:
    """Collects each step's scalars on the device and reads them, its only wait, when a row is due.

    A row is due at the first step, every ``log_every`` steps and at the last. Its loss is the mean since the last row,
    over the steps that were not left out; its speed leaves out evaluation, saving, and the first step of the process,
    which compiles and allocates.

    Args:
        done: steps done before.
        state: what a stopped run had counted.
        flops_per_token: of training, without recomputation.
        device_flops: what the device can do in a second; None where that is not known.
        sources: names of the texts.
        documents: ``(step, micro-batches) -> texts``: what is in some of a step's micro-batches, for people.
        epochs: ``step -> numbers``: how often each text has been gone through after it.
    """

    def __init__(
        self,
        config: Settled,
        metrics: MetricsWriter,
        device: torch.device,
        *,
        done: int,
        state: LogState,
        flops_per_token: float,
        device_flops: float | None,
        sources: Sequence[str],
        documents: Callable[[int, list[int]], list[str]],
        epochs: Callable[[int], Iterable[float]],
    ) -> None:
        self.config, self.metrics, self.device = config, metrics, device
        self.documents, self.epochs = documents, epochs
        self.tokens_per_step = config.train.batch_size * config.train.seq_len
        self.flops_per_token, self.device_flops = flops_per_token, device_flops
        self.first = done + 1
        self.unlogged, self.skipped, self.bad_in_a_row = list(state.unlogged), state.skipped, state.bad_in_a_row
        self.sources, self.source_tokens = sources, dict(state.source_tokens)
        self.pending: list[torch.Tensor] = []
        self.grad_norm = self.divergence = 0.0
        self.started: float | None = None
        self.timed_steps, self.timed_seconds, self.data_seconds = 0, 0.0, 0.0

    @property
    def state(self) -> LogState:
        """What no row holds yet; nothing must be unread (:meth:`pause`)."""
        assert not self.pending
        return LogState(self.unlogged, self.skipped, self.bad_in_a_row, self.source_tokens)

    def start(self) -> None:
        """A step begins."""
        if self.started is None:
            self.started = time.perf_counter()

    def saw(self, tokens: Iterable[int]) -> None:
        """A step took so many tokens of each source."""
        for name, count in zip(self.sources, tokens, strict=True):
            if count:
                self.source_tokens[name] = self.source_tokens.get(name, 0) + int(count)

    def step(self, step: int, scalars: StepScalars) -> None:
        """Step number ``step`` (from 1) was issued; its scalars may still be on their way.

        Raises:
            UserError: too many steps in a row were left out; no weight has seen them.
        """
        self.pending.append(scalars.row)
        self.data_seconds += scalars.data_seconds
        due = step in (1, self.config.train.steps) or step % self.config.train.log_every == 0
        if due or step == self.first or len(self.pending) >= self.config.train.max_bad_steps:
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

    def saved(self, step: int, saved: Saved) -> None:
        """A checkpoint was written, for which training stood still."""
        self.metrics.write("save", step, seconds=saved.seconds, bytes=saved.num_bytes)
        say(f"  saved {step:>6}  {shown(saved.folder)}  {amount(saved.num_bytes)}B in {saved.seconds:.1f} s")

    def _read(self, step: int) -> None:
        rows = torch.stack(self.pending).tolist()
        now = time.perf_counter()
        if step > self.first:
            self.timed_steps += len(rows)
            self.timed_seconds += now - self.started
        self.started, self.pending = now, []
        for number, (*losses, self.grad_norm, self.divergence, left_out) in enumerate(rows, start=step - len(rows) + 1):
            if left_out:
                self._left_out(number, losses, self.grad_norm)
            else:
                self.unlogged.append(math.fsum(losses))
                self.bad_in_a_row = 0

    def _left_out(self, step: int, losses: list[float], norm: float) -> None:
        self.skipped += 1
        self.bad_in_a_row += 1
        bad = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
        documents = self.documents(step, bad or list(range(len(losses))))
        # JSON has no NaN.
        loss, norm = str(math.fsum(losses) if not bad else losses[bad[0]]), str(norm)
        self.metrics.write("skipped", step, loss=loss, grad_norm=norm, documents=documents)
        shown = "; ".join(documents[:3]) + (" …" if len(documents) > 3 else "")
        place = f"micro-batch {bad[0] + 1} of {len(losses)}" if bad else "its micro-batches"
        say(f"step {step}: left out, no weight was touched: loss {loss}, gradient norm {norm}; in {place}: {shown}")
        if self.bad_in_a_row >= self.config.train.max_bad_steps:
            raise UserError(self._too_many(step))

    def _too_many(self, step: int) -> str:
        train, rate, command = self.config.train, self.config.optim.lr, resume_command(Path(self.config.output))
        lower, saved = lower_rate(self.config.optim), complete_checkpoints(Path(self.config.output))
        # The weights before the first bad step may be what is bad.
        good = [step_of(folder) for folder in saved if step_of(folder) < step - self.bad_in_a_row]
        if good:
            again = f"go on from an earlier checkpoint: {command} --from_step {good[-1]} --optim.lr {lower:g}"
        elif saved:
            again = (
                f"start anew with --overwrite --optim.lr {lower:g} in place of --resume: no earlier checkpoint is left"
            )
        else:
            again = f"start anew with a lower one: {command} --optim.lr {lower:g}"
        return (
            f"step {step}: {self.bad_in_a_row} steps in a row were left out (train.max_bad_steps), their losses or "
            f"gradients were not finite. If the text is broken there, go past it: {command} --train.max_bad_steps "
            f"{10 * train.max_bad_steps}; if the rate {rate:g} is too high, {again}"
        )

    def _write(self, step: int) -> None:
        steps = self.config.train.steps
        loss = math.fsum(self.unlogged) / len(self.unlogged) if self.unlogged else None
        rate = learning_rate(self.config.optim, step - 1, steps)
        speed = self.timed_steps * self.tokens_per_step / self.timed_seconds if self.timed_steps else None
        known = speed is not None and self.device_flops is not None
        share = speed * self.flops_per_token / self.device_flops if known else None
        memory = peak_memory_gib(self.device)
        taught = self.config.train.kl_weight > 0 and math.isfinite(self.divergence)
        self.metrics.write(
            "train",
            step,
            loss=loss,
            lr=rate,
            grad_norm=self.grad_norm if math.isfinite(self.grad_norm) else None,
            **({"kl": self.divergence} if taught else {}),
            skipped=self.skipped,
            seconds=self.timed_seconds,
            data_seconds=self.data_seconds,
            tokens_per_second=speed,
            peak_share=share,
            peak_memory_gib=memory,
            source_tokens=self.source_tokens,
            source_epochs={
                name: round(float(epochs), 4)
                for name, epochs in zip(self.sources, self.epochs(step), strict=True)
                if name in self.source_tokens
            },
        )
        left = (steps - step) * self.tokens_per_step
        eta = "–" if speed is None else duration(left / speed)
        said = [
            f"step {step:>{len(str(steps))}}/{steps}",
            f"loss {'      –' if loss is None else format(loss, '7.4f')}",
            f"lr {rate:.2e}",
            f"grad {self.grad_norm:8.3f}",
            *([f"KL {self.divergence:.4f}"] if taught else []),
            f"{'–' if speed is None else format(speed, ',.0f'):>9} tok/s",
            *([f"{share:4.0%} of peak"] if share is not None else []),
            f"{memory:6.2f} GiB",
            *([f"data {self.data_seconds:.1f} s"] if self.data_seconds > 0.05 * self.timed_seconds > 0 else []),
            *([f"left out {self.skipped}"] if self.skipped else []),
            f"eta {eta}",
        ]
        say("  ".join(said))
        self.unlogged, self.skipped = [], 0
        self.timed_steps, self.timed_seconds, self.data_seconds = 0, 0.0, 0.0
