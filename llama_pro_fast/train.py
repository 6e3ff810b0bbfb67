"""``llama-pro-fast train --model.path BASE --expand.groups 8 --data.domain mine.jsonl --output runs/mine``.

This file is the story of a run, from top to bottom: settle the recipe, tokenise, expand, prove, load, train, measure,
save, export, report. Each line that is more than a step of the story lives in a module of its own.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llama_pro_fast import checkpoint, model_folder, run_folder, settle
from llama_pro_fast.advice import why
from llama_pro_fast.cards import show_end, show_start
from llama_pro_fast.cli import INTERRUPTED, run_entry_point
from llama_pro_fast.config import RunConfig, Settled
from llama_pro_fast.console import amount, say, waiting
from llama_pro_fast.cost import num_parameters, num_trained_parameters
from llama_pro_fast.data import default_cache
from llama_pro_fast.data.corpus import Corpus
from llama_pro_fast.devices import GIB
from llama_pro_fast.errors import UserError
from llama_pro_fast.evaluate import Meter
from llama_pro_fast.export import export_run
from llama_pro_fast.generation import read_export_back, unchecked
from llama_pro_fast.host import peak_memory_gib
from llama_pro_fast.job import DTYPES
from llama_pro_fast.manifest import what_trains
from llama_pro_fast.model import Decoder, load_model
from llama_pro_fast.optimizer import Optimizer
from llama_pro_fast.planner import Fit, fit
from llama_pro_fast.pretrained import PretrainedFolder, folder_digest
from llama_pro_fast.progress import Log, StopSignal
from llama_pro_fast.recipe import RECIPES, absolute, parse
from llama_pro_fast.references import references
from llama_pro_fast.report import MetricsWriter, summarise, write_report
from llama_pro_fast.trained import Trained


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


def run(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any] | None:
    """A whole run.

    Args:
        config: with ``resume``, the run's stored configuration.

    Returns:
        The content of ``report/summary.json``; None when the run was interrupted (and saved).

    Raises:
        UserError: bad input, a full disk, or gradients that are not finite.
    """
    # What can be refused is refused before any work.
    if not resume:
        settle.check_recipe(config)
    config = absolute(config)
    output = Path(config.output)
    with run_folder.claimed(output, resume=resume, overwrite=overwrite):
        # A resumed run that made its model's folder needs no base any more.
        folder, plan = model_folder.existing(output) if resume else None, None
        base = folder
        if base is None:
            base, plan = model_folder.open_base(config)
        parameters = config.train.parameters
        trained = what_trains(base.raw_config, parameters=parameters, plan=plan, name=str(base.path))
        config = settle.settle_computation(config, base)
        device = settle.start_device(config)
        if not resume:
            # Whatever the text is: with documents as long as they can be, least is needed.
            settle.choose(settle.question_of(config, base, trained, plan, document=config.train.seq_len))

        # Text to tokens, once; then the length of the run is known.
        with waiting("reading text ...") as update:
            tokenizer = base.tokenizer() if folder else model_folder.make_tokenizer(config, base, update)
            corpus = Corpus.prepare(
                config.data,
                tokenizer,
                seq_len=config.train.seq_len,
                seed=config.train.seed,
                default_general=not trained.everything,
                progress=lambda name, documents, tokens: update(
                    f"tokenising {name}: {documents:,} documents, {amount(tokens)} tokens"
                ),
            )
        question = settle.question_of(config, base, trained, plan, document=corpus.train.mean_document)
        if resume:
            planned = fit(question, micro_batch_size=question.micro_batch_size, recompute=question.recompute)
        else:
            planned = settle.choose(question)
            config = settle.settle(config, question, planned, sequences_in_epoch=corpus.train.sequences_in_epoch(0))
            say(f"memory: {why(question, planned)}")
        for text in corpus.held_out:
            text.sample(config.eval.tokens)  # refuses text with nothing to predict
        if not resume:
            sources = [text.source.path for text in corpus.held_out if text.source.kind == "files"]
            run_folder.check_apart(output, sources, config.data.cache or default_cache())
            run_folder.begin(config, output, overwrite=overwrite)

        # The model's folder: from here on only its manifest says which blocks train.
        if folder is None:
            folder, proof = model_folder.make(config, base, plan, output, tokenizer)
            if proof is not None:
                say(f"expanded: {plan.trained.strip}; identity proved: {proof.summary()}")
        settled = Run(
            config=config,
            output=output,
            folder=folder,
            trained=what_trains(folder.raw_config, parameters=parameters, name=str(folder.path)),
            corpus=corpus,
            tokenizer=tokenizer,
            device=device,
            planned=planned,
        )
        return finish(settled) if train(settled, resume=resume) else None


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
    elif resume:
        say("no complete checkpoint yet: starting from the first step")
    done = info.progress
    metrics = MetricsWriter(output, resumed_at=done.step if complete else None)
    show_start(config, folder.config, run.trained, corpus, run.planned)

    meter = Meter(model, corpus, config, metrics, run.trained.skip_for_base)
    log = Log(config, metrics, device, done=done.step, unlogged=info.unlogged)
    if done.step == 0 or measured_anew:
        meter.measure(done.step)
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


def finish(run: Run) -> dict[str, Any]:
    """The trained model as an ordinary checkpoint, read back, and what there is to say about the run.

    Raises:
        UserError: the export, or what stock transformers computes from it, is not what was trained (the report stands
            all the same), or no space is left.
    """
    config, output, folder, corpus = run.config, run.output, run.folder, run.corpus
    train, trained = config.train, run.trained
    exported, _ = export_run(output)
    figures = {}
    for text in corpus.held_out:
        found = references(text, run.tokenizer, vocab_size=folder.config.vocab_size, max_tokens=config.eval.tokens)
        figures[text.source.role, text.source.name] = asdict(found) if found else {}
    facts = {
        "title": f"{Path(config.model.path).name}: {trained.strip}",
        "model": config.model.path,
        "parameters": num_parameters(folder.config),
        "trained_parameters": num_trained_parameters(folder.config, trained),
        "trained_blocks": list(trained.blocks),
        "steps": train.steps,
        "tokens": train.steps * train.batch_size * train.seq_len,
        "device": train.device,
        "threads": train.threads,
        "dtype": train.dtype,
        "attention": train.attention,
        "micro_batch_size": train.micro_batch_size,
        "recompute": train.recompute,
        "planned_memory_gib": round(run.planned.peak / GIB, 3),
        "planned_tokens_per_second": run.planned.tokens_per_second,
        "learning_rate": config.optim.lr,
        "export": str(exported),
    }
    measured = summarise(output, figures)
    # To read, should the check be the end of this process; the run is complete, and not to be resumed, after it.
    write_report(output, facts | unchecked("not read back yet") | measured, complete=False)
    try:
        with waiting("reading the export back ..."):
            read_back = read_export_back(
                config, exported, corpus, run.tokenizer, measured["results"], new_blocks=trained.skip_for_base
            )
    except torch.OutOfMemoryError:
        read_back = unchecked("not read back: no memory left on the device")
    except UserError as error:
        write_report(output, facts | unchecked(f"failed: {error}") | measured)
        raise
    measured["peak_memory_gib"] = max(measured["peak_memory_gib"], round(peak_memory_gib(run.device), 3))
    summary = facts | read_back | measured
    write_report(output, summary)
    show_end(summary, output, exported)
    return summary


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


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        output = run_folder.first_free(Path("runs", "quickstart"))
        say(f"no options: the quickstart, into {output} (`llama-pro-fast train --help` for everything else)")
        argv = ["--config", str(RECIPES / "quickstart.yaml"), "--output", str(output)]
    request = parse(argv)
    summary = run(request.config, resume=request.resume, overwrite=request.overwrite)
    return 0 if summary is not None else INTERRUPTED


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
