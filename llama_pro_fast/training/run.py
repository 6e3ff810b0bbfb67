"""The story of a run, from top to bottom: settle the recipe, tokenise, expand, prove, train, export, read back, report.

Each line that is more than a step of the story lives in a module of its own.
"""

from __future__ import annotations

import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llama_pro_fast.config import RunConfig
from llama_pro_fast.console import amount, say, unheard, waiting
from llama_pro_fast.data.corpus import Corpus
from llama_pro_fast.data.tokens import default_cache
from llama_pro_fast.errors import UserError
from llama_pro_fast.evaluation.baselines import references
from llama_pro_fast.evaluation.export_check import read_export_back, unchecked
from llama_pro_fast.expansion.lineage import intact_bases
from llama_pro_fast.expansion.manifest import what_trains
from llama_pro_fast.host import peak_memory_gib
from llama_pro_fast.planning.cost import num_parameters, num_trained_parameters
from llama_pro_fast.planning.devices import GIB
from llama_pro_fast.planning.explain import why
from llama_pro_fast.planning.search import fit
from llama_pro_fast.recipe import absolute
from llama_pro_fast.training import model_folder, run_folder
from llama_pro_fast.training.cards import show_end
from llama_pro_fast.training.export import export_run
from llama_pro_fast.training.loop import Run, train
from llama_pro_fast.training.metrics import check_wandb
from llama_pro_fast.training.settle import (
    check_recipe,
    choose,
    question_of,
    settle,
    settle_computation,
    start_device,
)
from llama_pro_fast.training.summary import summarise, write_report

_ONE_AT_A_TIME = threading.Lock()


def run_training(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any] | None:
    """A whole run, in any thread; threads, determinism and device are the process', so one at a time.

    Args:
        config: with ``resume``, the run's stored configuration.

    Returns:
        The content of ``report/summary.json``; None when the run was interrupted (and saved).

    Raises:
        UserError: bad input, a full disk, or gradients that are not finite.
    """
    if not _ONE_AT_A_TIME.acquire(blocking=False):
        raise UserError(
            "another run is going on in this process; wait for it, or start this one in a process of its own"
        )
    try:
        with unheard():
            return _run(config, resume=resume, overwrite=overwrite)
    finally:
        _ONE_AT_A_TIME.release()


def _run(config: RunConfig, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    # What can be refused is refused before any work.
    if not resume:
        check_recipe(config)
    check_wandb(config.train.wandb)
    config = absolute(config)
    output = Path(config.output)
    with run_folder.claimed(output, resume=resume, overwrite=overwrite):
        # A resumed run that made its model's folder needs no base any more.
        folder, plan = model_folder.existing(output) if resume else None, None
        base = folder
        if base is None:
            config = config if resume else model_folder.with_export(config)
            base, plan = model_folder.open_base(config)
        parameters = config.train.parameters
        trained = what_trains(
            base.raw_config, base.config.num_hidden_layers, parameters=parameters, plan=plan, name=str(base.path)
        )
        device = start_device(config)
        config = settle_computation(config, base, device)
        if not resume:
            # Whatever the text is: with documents as long as they can be, least is needed.
            choose(question_of(config, base, trained, plan, document=config.train.seq_len))

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
        question = question_of(config, base, trained, plan, document=corpus.train.mean_document)
        if resume:
            planned = fit(question, micro_batch_size=question.micro_batch_size, recompute=question.recompute)
        else:
            planned = choose(question)
            config = settle(config, question, planned, sequences_in_epoch=corpus.train.sequences_in_epoch(0))
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
            trained=what_trains(
                folder.raw_config,
                folder.config.num_hidden_layers,
                parameters=parameters,
                name=str(folder.path),
                intact=intact_bases(folder),
            ),
            corpus=corpus,
            tokenizer=tokenizer,
            device=device,
            planned=planned,
        )
        return finish(settled) if train(settled, resume=resume) else None


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
