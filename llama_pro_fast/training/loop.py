"""The training loop: from the last complete checkpoint, or the first step, to the last step."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from llama_pro_fast.config import Settled
from llama_pro_fast.console import say
from llama_pro_fast.data.corpus import Corpus
from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion.lineage import difference, model_identity
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.hf.loading import load_model
from llama_pro_fast.model.decoder import DTYPES, Decoder
from llama_pro_fast.model.trained import Trained
from llama_pro_fast.planning.devices import peak_flops
from llama_pro_fast.planning.search import Fit
from llama_pro_fast.ranks import ALONE, Ranks
from llama_pro_fast.runs import checkpoint, run_folder
from llama_pro_fast.runs.marker import CheckpointInfo, Progress
from llama_pro_fast.runs.metrics import MetricsWriter, NotWritten, read_metrics
from llama_pro_fast.runs.run_folder import Claim
from llama_pro_fast.training.cards import show_start
from llama_pro_fast.training.log import Log, StepScalars
from llama_pro_fast.training.meter import Meter, measured_text
from llama_pro_fast.training.optimizer import Optimizer
from llama_pro_fast.training.sharding import shard, share_buffers
from llama_pro_fast.training.signals import Stopped, StopSignals


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that is settled of a run before its first step.

    Attributes:
        config: its configuration.
        output: its folder.
        folder: the model it trains.
        trained: what of it, by its manifest.
        corpus, tokenizer: its text.
        device: where it computes.
        planned: what it should take.
        start: the checkpoint that it goes on from, or START of a run that was begun and has none, and what that says of
            itself; None for a new run.
        claim: on its folder, which is told what the run is at.
        ranks: the processes that make it.
    """

    config: Settled
    output: Path
    folder: PretrainedFolder
    trained: Trained
    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    planned: Fit
    start: tuple[Path, CheckpointInfo] | None
    claim: Claim
    ranks: Ranks = ALONE


def train(run: Run, signals: StopSignals) -> tuple[Progress, str | None]:
    """From the run's start to its last step.

    Returns:
        How far it came, and which bound ended it before its last step, in words.

    Raises:
        Stopped: a signal asked for it; what was done is saved.
        UserError: the disk is full, or too many steps in a row were not finite.
    """
    with run.ranks.listening():
        loop = _Loop(run, signals)
        try:
            with signals.patient():
                loop.run()
        finally:
            loop.metrics.close()
        signals.agreed()
    return loop.done, loop.ended


class _Loop:
    """The state of a run while it goes.

    Attributes:
        done: how far it is.
        evaluated: whether the evaluation of this step, if it has one, is done.
        ended: which bound ended it, in words.
        learns: whether every matrix is known to have had a gradient.
        saved_step: the step of the last checkpoint; None where there is none.
    """

    def __init__(self, run: Run, signals: StopSignals) -> None:
        self.settled, self.config, self.signals = run, run.config, signals
        run.claim.enter("loading")
        self.model = load_model(
            run.folder,
            trained=run.trained,
            dtype=DTYPES[self.config.train.dtype],
            device=run.device,
            max_length=self.config.train.seq_len,
            attention=self.config.train.attention,
            recompute=run.planned.recompute,
            eight_bits=self.config.train.fp8 == "backward",
            loaded=partial(shard, ranks=run.ranks) if self.config.train.shards > 1 else lambda block: None,
        )
        if self.config.train.shards > 1:
            share_buffers(self.model)
        else:
            self.model.accumulate()
        parameters = self.model.trained_parameters()
        self.optimizer = Optimizer(self.model, parameters, self.config.optim, self.config.train.steps, run.ranks)
        self.tensors = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
        self.tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.state().items()}
        self.info = starting_info(run)
        # START has the place of the first step, and no tensors.
        resumed = run.start is not None and run.start[1].progress.step > 0
        if resumed:
            self._restore(*run.start)
        elif run.start is not None:
            say("no checkpoint yet: starting from the first step")
        self.learns = False
        self.done, self.evaluated, self.ended = self.info.progress, self.info.evaluated, self.info.ended
        self.saved_step, self.saved_at = self.done.step if resumed else None, time.monotonic()
        # What is gained and forgotten counts from the first evaluation of a text.
        self.first = not resumed or run.start[1].measured != self.info.measured
        if self.first and resumed:
            say("another text is measured than before: what is gained and forgotten counts from this step on")

        with run.ranks.together():
            self.metrics = (
                MetricsWriter(
                    run.output,
                    resumed_at=self.done.step if resumed else None,
                    evaluated=self.evaluated,
                    wandb=self.config.train.wandb,
                )
                if run.ranks.leads
                else NotWritten()
            )
        for change in self.config.history:
            if change.step == self.done.step:
                self.metrics.write("change", change.step, key=change.key, before=change.before, after=change.after)
        self.meter = Meter(self.model, run.corpus, self.config, self.metrics, run.trained, run.ranks)
        self.log = Log(
            self.config,
            self.metrics,
            run.device,
            done=self.done.step,
            state=self.info.log,
            flops_per_token=run.planned.cost.total,
            device_flops=(flops := peak_flops(run.device)) and flops * run.ranks.count,
            sources=run.corpus.labels,
            documents=partial(_documents_of, run),
            epochs=lambda step: run.corpus.train.epochs_seen(step * self.config.train.batch_size),
        )
        show_start(self.config, run.folder.config, run.trained, run.corpus, run.planned)

    def _restore(self, folder: Path, then: CheckpointInfo) -> None:
        """The weights, the optimizer, the random state and the place of a checkpoint."""
        stored = checkpoint.stored_tensors(folder)
        # Another device has other generators.
        random = {name: t for name, t in checkpoint.random_state(self.settled.device).items() if name in stored}
        checkpoint.load(folder, self.tensors | random)
        checkpoint.set_random_state(random)
        self.optimizer.restored()
        ended = then.ended if then.config.stop == self.config.stop else None
        self.info = replace(self.info, progress=then.progress, evaluated=then.evaluated, ended=ended, log=then.log)
        say(f"resumed at step {then.progress.step} of {self.config.train.steps} from {run_folder.shown(folder)}")
        if ended:
            say(f"the run has ended there by {ended}; with that bound raised it goes on")

    def run(self) -> None:
        """To the last step, or to where a bound or a signal ends it.

        Raises:
            Stopped: after what was done was saved.
            UserError: as :func:`train`.
        """
        config = self.config
        try:
            if self.first or not self.evaluated:
                self._measure()
            while self.done.step < config.train.steps and not self.ended:
                self._step()
                if not self.learns and self.done.step >= 2:
                    with self.settled.ranks.together():
                        self.learns = self.optimizer.check_learning()
                last = self.done.step == config.train.steps
                if last or self.done.step % config.eval.every == 0:
                    self._measure()
                if last or self.ended or self._save_is_due():
                    self.log.pause(self.done.step)
                    # While steps are left out the weights stand still, and an older checkpoint may be the better one.
                    if last or self.ended or not self.log.bad_in_a_row:
                        self._save()
            if not self._is_measured():
                self._measure()
        except Stopped as stopped:
            self.optimizer.drop_gradients()
            self.metrics.write("stop", self.done.step, reason=str(stopped))
            self._save()
            raise
        if self.settled.start is not None and self.saved_step == self.settled.start[1].progress.step:
            self._restate()

    def _step(self) -> None:
        config = self.config
        self.settled.claim.enter("training")
        self.signals.check()
        self.log.start()
        scalars = train_step(
            self.model,
            self.optimizer,
            self.settled.corpus,
            config,
            self.done,
            self.signals,
            self.settled.trained.skip_for_base,
            self.settled.ranks,
        )
        self.log.saw(self.settled.corpus.train.source_tokens(self.done.sequences, config.train.batch_size))
        tokens = config.train.batch_size * config.train.seq_len
        self.done = self.done.advanced(sequences=config.train.batch_size, tokens=tokens)
        self.log.step(self.done.step, scalars)

    def _measure(self) -> None:
        self.log.pause(self.done.step)
        self.settled.claim.enter("evaluating")
        self.evaluated = False
        self.meter.measure(self.done.step, first=self.first, between=self.signals.agreed)
        self.evaluated, self.first = True, False
        if self.done.step and not self.ended and (passed := self.meter.bound_passed()):
            self.ended = passed
            say(f"ended at step {self.done.step} by {passed}")
            self.metrics.write("stop", self.done.step, reason=passed)

    def _is_measured(self) -> bool:
        """Whether the metrics have every evaluation of this step: not where a run was cut to end here, or rows are
        damaged."""
        rows = [row for row in read_metrics(self.settled.output) if row["kind"] == "eval"]
        there = {(row.get("role"), row.get("source")) for row in rows if row["step"] == self.done.step}
        wanted = {(text.source.role, text.source.name) for text in self.settled.corpus.held_out}
        return self.settled.ranks.share(there >= wanted)

    def _save_is_due(self) -> bool:
        train = self.config.train
        by_steps = train.checkpoint_every is not None and self.done.step % train.checkpoint_every == 0
        by_time = time.monotonic() - self.saved_at >= 60 * train.checkpoint_minutes
        return by_steps or bool(self.settled.ranks.table([by_time])[0][0])

    def _save(self) -> None:
        if self.saved_step == self.done.step or self.done.step == 0:
            return
        self.log.pause(self.done.step)
        ranks = self.settled.ranks
        with ranks.together():
            self.optimizer.check_finite()
            self.metrics.sync()
        ranks.check_same({name: each for name, each in self.tensors.items() if not isinstance(each, DTensor)})
        info = replace(self.info, progress=self.done, evaluated=self.evaluated, ended=self.ended)
        saved = checkpoint.save(
            self.settled.output,
            self.tensors | checkpoint.random_state(self.settled.device),
            replace(info, log=self.log.state),
            keep=self.config.train.keep_checkpoints,
            purge=not self.log.bad_in_a_row,
            entering=self.settled.claim.enter,
            ranks=ranks,
        )
        self.log.saved(self.done.step, saved)
        self.saved_step, self.saved_at = self.done.step, time.monotonic()

    def _restate(self) -> None:
        """No step was made since the checkpoint: what else has become of the run is written into it."""
        folder, then = self.settled.start
        now = replace(self.info, config=then.config, evaluated=self.evaluated, ended=self.ended)
        with self.settled.ranks.together():
            if now != then and self.settled.ranks.leads:
                self.metrics.sync()
                checkpoint.restate(folder, now)


def starting_info(run: Run) -> CheckpointInfo:
    """What a checkpoint of the run says before its first step."""
    inside = run.folder.path.is_relative_to(run.output)
    return CheckpointInfo(
        progress=Progress(),
        config=run.config,
        model=str(run.folder.path.relative_to(run.output) if inside else run.folder.path),
        identity=model_identity(run.folder),
        data=run.corpus.fingerprint,
        measured=measured_text(run.config, run.corpus),
    )


def check_unchanged(run: Run) -> None:
    """A run goes on from a checkpoint only on the model and the text that it was made with.

    Raises:
        UserError: one of them has changed.
    """
    place, then = run.start
    now = starting_info(run)
    if (changed := difference(then.identity, now.identity)) is not None:
        raise UserError(f"{run.folder.path}: is not the model {place} was made with: {changed}; put it back")
    if then.data != now.data:
        raise UserError(
            f"{place}: the training text has changed since it was written, or a source's weight or share, so the order "
            "of the data is another; put them back, or start a new run"
        )


def _documents_of(run: Run, step: int, micro_batches: list[int]) -> list[str]:
    train = run.config.train
    first, micro = (step - 1) * train.batch_size, train.micro_batch_size
    return run.corpus.documents([(first + index * micro, micro) for index in micro_batches], run.tokenizer, limit=200)


def train_step(
    model: Decoder,
    optimizer: Optimizer,
    corpus: Corpus,
    config: Settled,
    done: Progress,
    signals: StopSignals,
    skip_for_base: Collection[int],
    ranks: Ranks = ALONE,
) -> StepScalars:
    """One optimizer step over ``batch_size`` sequences, a micro-batch at a time; each rank takes as many, in order.

    Each micro-batch is weighed by the valid tokens of the whole step, so the step's loss is a mean over tokens however
    they are spread over micro-batches and ranks. Gradients are added over the ranks once, after the last micro-batch.

    Args:
        skip_for_base: the blocks without which the model is its base, which teaches with a `train.kl_weight`.

    Raises:
        Stopped: between two micro-batches, of several ranks before the first; no weight has changed.
    """
    device = model.norm.weight.device
    micro = config.train.micro_batch_size
    asked = time.perf_counter()
    starts = range(done.sequences, done.sequences + config.train.batch_size, micro)
    each = len(starts) // ranks.count
    own = slice(ranks.number * each, (ranks.number + 1) * each)
    batches = [corpus.train.batch(start, micro) for start in starts[own]]
    counts = [sum(batch.num_valid for batch in batches), sum(batch.num_valid_general for batch in batches)]
    valid, general = map(sum, zip(*signals.agreed(counts), strict=True))
    data_seconds = time.perf_counter() - asked
    # Filled on the device: a copy from the host would make it wait.
    scale = torch.full((), 1.0 / max(1, valid), device=device)
    kl_weight, losses, divergence = config.train.kl_weight, [], torch.zeros((), device=device)
    for batch in batches:
        signals.check()
        batch = batch.to(device)
        if kl_weight:
            part, apart = model.loss_beside_base(batch, scale, kl_weight, skip=skip_for_base)
            divergence += apart.float()
        else:
            part = model.loss(batch, scale)
        part.backward()
        losses.append(part.detach().float())
    losses = torch.stack(losses)
    if ranks.count > 1:
        of_all = torch.zeros(len(starts), device=device)
        of_all[own] = losses
        losses = of_all
        ranks.add([losses, divergence, *optimizer.whole_gradients()])
    norm = optimizer.step(done.step, losses.sum())
    divergence *= valid / general if general else math.nan
    return StepScalars(losses, norm, optimizer.left_out, divergence, data_seconds)
