"""``python -m llama_pro_fast.train --model.path BASE --expand.groups 8 --data.domain mine.jsonl --output runs/mine``.

This file is the story of a run, from top to bottom: settle the recipe, tokenise, expand, prove, load, train, measure,
save, export, report. Each line that is more than a step of the story lives in a module of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from llama_pro_fast import checkpoint, prepare
from llama_pro_fast.cli import run_entry_point
from llama_pro_fast.config import RunConfig
from llama_pro_fast.console import amount, block_strip, box, peak_memory_gib, say, table, waiting
from llama_pro_fast.cost import num_parameters, step_cost
from llama_pro_fast.data.corpus import Corpus
from llama_pro_fast.evaluate import Meter
from llama_pro_fast.expansion import Manifest
from llama_pro_fast.export import export_run
from llama_pro_fast.model import Decoder, load_model
from llama_pro_fast.optimizer import Optimizer
from llama_pro_fast.pretrained import PretrainedFolder, folder_digest
from llama_pro_fast.progress import Clock, Log, StopSignal, resume_command
from llama_pro_fast.recipe import parse
from llama_pro_fast.report import MetricsWriter, write_report

INTERRUPTED = 130  # the shell's code for a program ended by Ctrl-C


def run(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any] | None:
    """A whole run.

    Args:
        config: with ``resume``, the run's stored configuration.

    Returns:
        The content of ``report/summary.json``; None when the run was interrupted (and saved).

    Raises:
        UserError: bad input, a full disk, or gradients that are not finite.
    """
    # Settle the recipe: what can be refused is refused before any work.
    prepare.check_config(config)
    config = prepare.absolute(config)
    output = Path(config.output)
    base, plan = prepare.open_base(config)
    device, dtype = prepare.resolve_device(config)
    seq_len = prepare.resolve_seq_len(config, base)
    tokenizer = base.tokenizer()
    if not resume:
        prepare.claim_output(output, overwrite=overwrite)

    # Text to tokens, once; then the length of the run is known.
    with waiting("reading text ...") as update:
        corpus = Corpus.prepare(
            config.data,
            tokenizer,
            seq_len=seq_len,
            seed=config.train.seed,
            default_general=config.train.parameters == "new_blocks",
            progress=lambda name, documents, tokens: update(
                f"tokenising {name}: {documents:,} documents, {amount(tokens)} tokens"
            ),
        )
    steps = prepare.resolve_length(config, corpus.train.sequences_in_epoch(0))
    if not resume:
        prepare.begin_run(config, output)

    # The model's folder: from here on only its manifest says which blocks train.
    folder, proof = prepare.make_model_folder(config, base, plan, output)
    if proof is not None:
        say(f"expanded: {plan.strip}; identity proved: {proof.summary()}")
    manifest = Manifest.from_config(folder.raw_config)
    train_all = config.train.parameters == "all"
    new_blocks = () if train_all else manifest.trained_blocks
    base_digest = folder_digest(folder)
    model = load_model(
        folder,
        trained_blocks=new_blocks,
        train_all=train_all,
        dtype=dtype,
        device=device,
        max_length=seq_len,
        attention=config.train.attention,
    )
    optimizer = Optimizer(model, model.trained_parameters(), config.optim, steps)

    # Go on where the last complete checkpoint stands, or start.
    state = {
        "model": {name: parameter.detach() for name, parameter in model.trained_parameters().items()},
        "optimizer": optimizer.state(),
        "random": checkpoint.random_state(),
    }
    done = checkpoint.Progress()
    complete = checkpoint.complete_checkpoints(output)
    if resume and complete:
        done = checkpoint.restore(complete[-1], state, model=folder, model_digest=base_digest, data=corpus.fingerprint)
        optimizer.restored()
        say(f"resumed at step {done.step} of {steps} from {complete[-1]}")
    elif resume:
        say("no complete checkpoint yet: starting from the first step")
    metrics = MetricsWriter(output, resumed_at=done.step if complete else None)
    show_start(config, folder, model, corpus, train_all=train_all, trained=model.trained_blocks)

    meter = Meter(model, corpus, config, metrics, new_blocks)
    clock = Clock()
    log = Log(config, metrics, clock, device, start=done.step)

    if done.step == 0:
        meter.measure(0)
    with StopSignal() as stop:
        while done.step < steps:
            clock.start()
            loss, norm = train_step(model, optimizer, corpus, config, done)
            done = done.advanced(sequences=config.train.batch_size, tokens=config.train.batch_size * seq_len)
            last = done.step == steps
            log.step(done.step, loss, norm, optimizer)

            if (
                last
                or stop.requested
                or done.step % config.eval.every == 0
                or done.step % config.train.checkpoint_every == 0
            ):
                log.flush(done.step, optimizer)
                clock.pause()
            if last or done.step % config.eval.every == 0:
                meter.measure(done.step)
            if last or stop.requested or done.step % config.train.checkpoint_every == 0:
                state["random"] = checkpoint.random_state()
                saved = checkpoint.save(
                    output,
                    state,
                    checkpoint.CheckpointInfo(done, str(folder.path), base_digest, corpus.fingerprint),
                    keep=config.train.keep_checkpoints,
                )
            if stop.requested and not last:
                metrics.close()
                say(f"stopped at step {done.step} of {steps}, saved {saved}; go on with\n  {resume_command(output)}")
                return None
    metrics.close()

    # The model as an ordinary checkpoint, and what there is to say about it.
    exported = export_run(output)
    facts = {
        "title": f"{Path(config.model.path).name}: {block_strip(len(model.blocks), model.trained_blocks)}",
        "model": config.model.path,
        "parameters": num_parameters(folder.config),
        "trained_parameters": sum(p.numel() for p in model.trained_parameters().values()),
        "steps": steps,
        "tokens": done.tokens,
        "seconds_of_training": round(clock.seconds, 1),
        "tokens_per_second": None if log.speed is None else round(log.speed, 1),
        "peak_memory_gib": round(peak_memory_gib(device), 3),
        "device": str(device),
        "dtype": config.train.dtype,
        "attention": config.train.attention,
        "learning_rate": config.optim.lr,
        "export": str(exported),
    }
    summary = write_report(output, facts)
    show_end(summary, output, exported)
    return summary


def train_step(
    model: Decoder, optimizer: Optimizer, corpus: Corpus, config: RunConfig, done: checkpoint.Progress
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
    scale = torch.tensor(1.0 / max(1, valid), device=device)
    loss = torch.zeros((), device=device)
    for batch in batches:
        part = model.loss(batch.to(device), scale)
        part.backward()
        loss += part.detach()
    return loss, optimizer.step(done.step)


def show_start(
    config: RunConfig, folder: PretrainedFolder, model: Decoder, corpus: Corpus, *, train_all: bool, trained: list[int]
) -> None:
    """The box before the first step."""
    train = config.train
    parameters = num_parameters(folder.config)
    count = sum(p.numel() for p in model.trained_parameters().values())
    cost = step_cost(folder.config, trained, seq_len=train.seq_len, train_all=train_all)
    meter = (
        "off: all parameters train, the base is not kept"
        if train_all
        else ", ".join(
            f"{text.source.name}{' (built in, no --data.general given)' if config.data.general is None else ''}"
            for text in corpus.held_out
            if text.source.role == "general"
        )
    )
    device = torch.cuda.get_device_name() if train.device == "cuda" else f"cpu, {train.threads} threads"
    box(
        f"llama-pro-fast · {Path(config.output).name}",
        [
            ("model", f"{config.model.path}  ({folder.config.architectures[0]}, {len(model.blocks)} blocks)"),
            ("blocks", f"{block_strip(len(model.blocks), trained)}  (X trains, o is frozen)"),
            ("trained", f"{amount(count)} of {amount(parameters)} parameters ({count / parameters:.1%})"),
            ("cost", f"{cost.total / 1e9:.4g} GFLOP per token (causal attention, its backward 2x)"),
            ("text", corpus.description()),
            ("step", f"{train.batch_size} x {train.seq_len} = {train.batch_size * train.seq_len:,} tokens, "
                     f"{train.batch_size // train.micro_batch_size} micro-batches; {train.steps:,} steps, "
                     f"{amount(train.steps * train.batch_size * train.seq_len)} tokens"),
            ("rate", f"{config.optim.lr:g}, {config.optim.schedule}, {config.optim.warmup_steps} steps of warm-up"),
            ("device", f"{device}; {train.dtype}, attention {train.attention}, kernels pytorch"),
            ("forgetting", meter),
        ],
    )  # fmt: skip


def show_end(summary: dict[str, Any], output: Path, exported: Path) -> None:
    """The card after the last step."""
    rows = []
    for result in summary["results"]:
        before, after = result["before"]["loss"], result["after"]["loss"]
        rows.append((result["source"], result["role"], f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"))
    table(("held-out text", "role", "loss before", "after", "change"), rows)
    say(f"export  {exported}  (AutoModelForCausalLM.from_pretrained loads it)")
    say(f"report  {output / 'report' / 'summary.md'}, loss.png, summary.json")


def main(argv: list[str] | None = None) -> int:
    request = parse(sys.argv[1:] if argv is None else argv)
    summary = run(request.config, resume=request.resume, overwrite=request.overwrite)
    return 0 if summary is not None else INTERRUPTED


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
