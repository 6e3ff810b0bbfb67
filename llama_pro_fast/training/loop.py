"""The training loop: from the last complete checkpoint, or the first step, to the last step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from llama_pro_fast.config import Settled
from llama_pro_fast.console import say
from llama_pro_fast.data.corpus import Corpus
from llama_pro_fast.errors import UserError
from llama_pro_fast.hf.folder import PretrainedFolder, folder_digest
from llama_pro_fast.hf.loading import load_model
from llama_pro_fast.model.decoder import DTYPES, Decoder
from llama_pro_fast.model.trained import Trained
from llama_pro_fast.planning.search import Fit
from llama_pro_fast.training import checkpoint, run_folder
from llama_pro_fast.training.cards import show_start
from llama_pro_fast.training.log import Log, StopSignal
from llama_pro_fast.training.meter import Meter
from llama_pro_fast.training.metrics import MetricsWriter
from llama_pro_fast.training.optimizer import Optimizer


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
    """

    config: Settled
    output: Path
    folder: PretrainedFolder
    trained: Trained
    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    planned: Fit


def train(run: Run, *, resume: bool) -> bool:
    """From the first step, or the last complete checkpoint, to the last step; False when asked to stop before."""
    config, output, folder, corpus, device = run.config, run.output, run.folder, run.corpus, run.device
    steps, seq_len = config.train.steps, config.train.seq_len
    model = load_model(
        folder,
        trained=run.trained,
        dtype=DTYPES[config.train.dtype],
        device=device,
        max_length=seq_len,
        attention=config.train.attention,
        recompute=run.planned.recompute,
    )
    optimizer = Optimizer(model, model.trained_parameters(), config.optim, steps)

    # Go on where the last complete checkpoint stands, or start.
    state = {
        "model": {name: parameter.detach() for name, parameter in model.trained_parameters().items()},
        "optimizer": optimizer.state(),
        "random": checkpoint.random_state(device),
    }
    inside = folder.path.is_relative_to(output)
    info = checkpoint.CheckpointInfo(
        progress=checkpoint.Progress(),
        model=str(folder.path.relative_to(output) if inside else folder.path),
        model_digest=folder_digest(folder),
        data=corpus.fingerprint,
        measured=corpus.measured,
        unlogged=[],
    )
    complete, measured_anew = checkpoint.complete_checkpoints(output), False
    if complete:
        info = checkpoint.restore(complete[-1], state, model_digest=info.model_digest, data=info.data)
        optimizer.restored()
        say(f"resumed at step {info.progress.step} of {steps} from {complete[-1]}")
        if info.measured != corpus.measured:
            say("the held-out text has changed since: what is gained and forgotten counts from this step on")
            info = replace(info, measured=corpus.measured)
            measured_anew = True
        if info.progress.step > steps:
            raise UserError(
                f"{complete[-1]}: is at step {info.progress.step}, and the run's config.yaml says train.steps {steps}; "
                "put it back"
            )
    elif resume:
        say("no complete checkpoint yet: starting from the first step")
    done = info.progress
    metrics = MetricsWriter(output, resumed_at=done.step if complete else None, wandb=config.train.wandb)
    show_start(config, folder.config, run.trained, corpus, run.planned)

    meter = Meter(model, corpus, config, metrics, run.trained)
    log = Log(config, metrics, device, done=done.step, unlogged=info.unlogged)
    if done.step == 0 or measured_anew:
        meter.measure(done.step, first=True)
    with StopSignal() as signals:
        while done.step < steps:
            log.start()
            loss, norm = train_step(model, optimizer, corpus, config, done)
            done = done.advanced(sequences=config.train.batch_size, tokens=config.train.batch_size * seq_len)
            log.step(done.step, loss, norm, optimizer.skipped)

            last, stop = done.step == steps, signals.stop_requested
            evaluating = last or done.step % config.eval.every == 0
            saving = last or stop or done.step % config.train.checkpoint_every == 0
            if evaluating or saving:
                log.pause(done.step)
            if evaluating:
                meter.measure(done.step)
            if saving:
                optimizer.check_finite()
                state["random"] = checkpoint.random_state(device)
                info = replace(info, progress=done, unlogged=log.unlogged)
                metrics.sync()
                saved = checkpoint.save(output, state, info, keep=config.train.keep_checkpoints)
            if stop and not last:
                say(f"stopped at step {done.step} of {steps}, saved {run_folder.shown(saved)}; go on with")
                say(f"  {run_folder.resume_command(output)}")
                break
    metrics.close()
    return done.step == steps


def train_step(
    model: Decoder, optimizer: Optimizer, corpus: Corpus, config: Settled, done: checkpoint.Progress
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step over ``batch_size`` sequences, a micro-batch at a time.

    Each micro-batch is weighed by the valid tokens of the whole step, so the step's loss is a mean over tokens however
    they are spread over micro-batches.

    Returns:
        Loss (mean over the step's valid tokens) and gradient norm, device scalars.
    """
    device = model.norm.weight.device
    micro = config.train.micro_batch_size
    starts = range(done.sequences, done.sequences + config.train.batch_size, micro)
    batches = [corpus.train.batch(start, micro) for start in starts]
    valid = sum(batch.num_valid for batch in batches)
    # Filled on the device: a copy from the host would make it wait.
    scale = torch.full((), 1.0 / max(1, valid), device=device)
    loss = torch.zeros((), device=device)
    for batch in batches:
        part = model.loss(batch.to(device), scale)
        part.backward()
        loss += part.detach()
    return loss, optimizer.step(done.step)
