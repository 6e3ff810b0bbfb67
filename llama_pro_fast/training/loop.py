"""The training loop: from the last complete checkpoint, or the first step, to the last step."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
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
from llama_pro_fast.runs import checkpoint, run_folder
from llama_pro_fast.runs.checkpoint import CheckpointInfo, Progress
from llama_pro_fast.runs.metrics import MetricsWriter
from llama_pro_fast.runs.run_folder import Claim
from llama_pro_fast.training.cards import show_start
from llama_pro_fast.training.log import Log, StepScalars
from llama_pro_fast.training.meter import Meter, measured_text
from llama_pro_fast.training.optimizer import Optimizer
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
        start: the checkpoint it goes on from, and what that says of itself; None at the first step.
        claim: on its folder, which is told what the run is at.
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


def train(run: Run, signals: StopSignals) -> tuple[Progress, str | None]:
    """From the run's start to its last step.

    Returns:
        How far it came, and which bound ended it before its last step, in words.

    Raises:
        Stopped: a signal asked for it; what was done is saved.
        UserError: the disk is full, or too many steps in a row were not finite.
    """
    config, output, corpus, device, claim = run.config, run.output, run.corpus, run.device, run.claim
    steps, seq_len = config.train.steps, config.train.seq_len
    claim.enter("loading")
    model = load_model(
        run.folder,
        trained=run.trained,
        dtype=DTYPES[config.train.dtype],
        device=device,
        max_length=seq_len,
        attention=config.train.attention,
        recompute=run.planned.recompute,
    )
    optimizer = Optimizer(model, model.trained_parameters(), config.optim, steps)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.trained_parameters().items()}
    tensors |= {f"optimizer.{name}": value for name, value in optimizer.state().items()}
    info = starting_info(run)
    if run.start is not None:
        folder, then = run.start
        restored = tensors | checkpoint.random_state(device)
        checkpoint.load(folder, restored)
        checkpoint.set_random_state(restored)
        optimizer.restored()
        info = replace(info, progress=then.progress, evaluated=then.evaluated, log=then.log)
        if then.config.stop == config.stop:
            info = replace(info, ended=then.ended)
        say(f"resumed at step {then.progress.step} of {steps} from {run_folder.shown(folder)}")
    done = info.progress
    measured_anew = run.start is not None and run.start[1].measured != info.measured
    if measured_anew:
        say("another text is measured than before: what is gained and forgotten counts from this step on")
    metrics = MetricsWriter(
        output,
        resumed_at=done.step if run.start is not None else None,
        evaluated=info.evaluated,
        wandb=config.train.wandb,
    )
    for change in config.history:
        if change.step == done.step:
            metrics.write("change", done.step, key=change.key, before=change.before, after=change.after)
    show_start(config, run.folder.config, run.trained, corpus, run.planned)

    meter = Meter(model, corpus, config, metrics, run.trained)
    log = Log(
        config,
        metrics,
        device,
        done=done.step,
        state=info.log,
        flops_per_token=run.planned.cost.total,
        device_flops=peak_flops(device),
        sources=[text.source.name for text in corpus.held_out],
        documents=partial(_documents_of, run),
    )
    saved_step, saved_at, ended = done.step if run.start is not None else None, time.monotonic(), info.ended

    def save(*, evaluated: bool) -> None:
        nonlocal saved_step, saved_at
        if saved_step == done.step or done.step == 0:
            return
        log.pause(done.step)
        optimizer.check_finite()
        metrics.sync()
        state = replace(info, progress=done, evaluated=evaluated, ended=ended, log=log.state)
        everything = tensors | checkpoint.random_state(device)
        saved = checkpoint.save(output, everything, state, keep=config.train.keep_checkpoints, entering=claim.enter)
        log.saved(done.step, saved)
        saved_step, saved_at = done.step, time.monotonic()

    def measure(*, first: bool = False) -> None:
        claim.enter("evaluating")
        meter.measure(done.step, first=first, between=signals.check)

    with signals.patient():
        evaluated = True
        try:
            if done.step == 0 or measured_anew or not info.evaluated:
                evaluated = False
                measure(first=done.step == 0 or measured_anew)
                evaluated = True
                ended = ended or (meter.bound_passed() if done.step else None)
            while done.step < steps and not ended:
                claim.enter("training")
                signals.check()
                log.start()
                scalars = train_step(model, optimizer, corpus, config, done, signals)
                log.saw(corpus.train.source_tokens(done.sequences, config.train.batch_size))
                done = done.advanced(sequences=config.train.batch_size, tokens=config.train.batch_size * seq_len)
                log.step(done.step, scalars)
                last = done.step == steps
                if last or done.step % config.eval.every == 0:
                    log.pause(done.step)
                    evaluated = False
                    measure()
                    evaluated = True
                    ended = meter.bound_passed()
                if last or ended or _save_is_due(config, done.step, saved_at):
                    log.pause(done.step)
                    # While steps are left out the weights stand still, and an older checkpoint may be the better one.
                    if last or ended or not log.bad_in_a_row:
                        save(evaluated=True)
        except Stopped as stopped:
            optimizer.drop_gradients()
            metrics.write("stop", done.step, reason=str(stopped))
            save(evaluated=evaluated)
            raise
    if ended and ended != info.ended:
        metrics.write("stop", done.step, reason=ended)
    metrics.close()
    signals.check()
    return done, ended


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
    if run.start is None:
        return
    folder, then = run.start
    now = starting_info(run)
    if (changed := difference(then.identity, now.identity)) is not None:
        raise UserError(f"{run.folder.path}: is not the model {folder} was made with: {changed}; put it back")
    if then.data != now.data:
        raise UserError(
            f"{folder}: the training text has changed since it was written, so the order of the data is another; "
            "put the text back, or start a new run"
        )


def _save_is_due(config: Settled, step: int, saved_at: float) -> bool:
    every = config.train.checkpoint_every
    by_steps = every is not None and step % every == 0
    return by_steps or time.monotonic() - saved_at >= 60 * config.train.checkpoint_minutes


def _documents_of(run: Run, step: int, micro_batches: list[int]) -> list[str]:
    train = run.config.train
    first = (step - 1) * train.batch_size
    micro = train.micro_batch_size
    found = [
        text
        for index in micro_batches
        for text in run.corpus.documents(first + index * micro, micro, run.tokenizer, limit=4)
    ]
    return list(dict.fromkeys(found))[:8]


def train_step(
    model: Decoder,
    optimizer: Optimizer,
    corpus: Corpus,
    config: Settled,
    done: Progress,
    signals: StopSignals,
) -> StepScalars:
    """One optimizer step over ``batch_size`` sequences, a micro-batch at a time.

    Each micro-batch is weighed by the valid tokens of the whole step, so the step's loss is a mean over tokens however
    they are spread over micro-batches.

    Raises:
        Stopped: between two micro-batches; no weight has changed.
    """
    device = model.norm.weight.device
    micro = config.train.micro_batch_size
    asked = time.perf_counter()
    starts = range(done.sequences, done.sequences + config.train.batch_size, micro)
    batches = [corpus.train.batch(start, micro) for start in starts]
    valid = sum(batch.num_valid for batch in batches)
    data_seconds = time.perf_counter() - asked
    # Filled on the device: a copy from the host would make it wait.
    scale = torch.full((), 1.0 / max(1, valid), device=device)
    losses = []
    for batch in batches:
        signals.check()
        part = model.loss(batch.to(device), scale)
        part.backward()
        losses.append(part.detach().float())
    losses = torch.stack(losses)
    norm = optimizer.step(done.step, losses.sum())
    return StepScalars(losses, norm, optimizer.left_out, data_seconds)
