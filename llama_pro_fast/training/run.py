"""The story of a run, from top to bottom: settle the recipe, tokenise, expand, prove, train, export, read back, report.

Each line that is more than a step of the story lives in a module of its own.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from llama_pro_fast.config import RunConfig, check_micro_batch
from llama_pro_fast.console import say, unheard, waiting
from llama_pro_fast.data.corpus import Corpus
from llama_pro_fast.data.remarks import measured_on_little, remarks, untrained_tokens
from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion.manifest import what_trains
from llama_pro_fast.files import writing_to
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.hf.loading import EMBEDDING
from llama_pro_fast.planning.cost import num_parameters
from llama_pro_fast.planning.devices import Device
from llama_pro_fast.planning.explain import why
from llama_pro_fast.planning.search import fit
from llama_pro_fast.ranks import Ranks, joined
from llama_pro_fast.recipe import absolute
from llama_pro_fast.resume import CONFIG_NAME, MAY_CHANGE, changes, load_config, opened, save_config
from llama_pro_fast.runs import run_folder
from llama_pro_fast.runs.checkpoint import complete_checkpoints, newest, set_aside_after
from llama_pro_fast.runs.marker import START, CheckpointInfo, read_marker, write_marker
from llama_pro_fast.runs.metrics import check_wandb, read_metrics
from llama_pro_fast.runs.run_folder import Claim
from llama_pro_fast.text.preparing import default_cache
from llama_pro_fast.text.tokenizer_checks import warnings
from llama_pro_fast.training import model_folder
from llama_pro_fast.training.finish import finish
from llama_pro_fast.training.joining import check_same_recipe, corpus_of, join, trained_of
from llama_pro_fast.training.loop import Run, check_unchanged, starting_info, train
from llama_pro_fast.training.settle import (
    check_bounds,
    check_recipe,
    choose,
    device_of,
    question_of,
    settle,
    settle_computation,
    settle_sharding,
    start_device,
)
from llama_pro_fast.training.signals import Stopped, StopSignals

_ONE_AT_A_TIME = threading.Lock()


def run_training(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    from_step: int | None = None,
    patience: float = 0.3,
) -> dict[str, Any] | None:
    """A whole run, in any thread; threads, determinism and device are the process', so one at a time. Several processes
    that torchrun has started make it together.

    Args:
        config: with ``resume``, as :func:`~llama_pro_fast.resume.stored_config` gives it.
        from_step: with ``resume``, the checkpoint to go on from; by default the last.
        patience: seconds to wait for another process that holds the run's folder.

    Returns:
        The content of ``report/summary.json``; None on a rank that does not lead.

    Raises:
        UserError: bad input, a full disk, or too many steps whose gradients are not finite.
        Stopped: a signal asked for it; what was done is saved.
    """
    if not _ONE_AT_A_TIME.acquire(blocking=False):
        raise UserError(
            "another run is going on in this process; wait for it, or start this one in a process of its own"
        )
    try:
        with unheard(), joined() as ranks, StopSignals(ranks) as signals:
            try:
                options = {"resume": resume, "overwrite": overwrite, "from_step": from_step, "patience": patience}
                return _run(config, signals, ranks, **options)
            except Stopped as stopped:
                _say_stopped(stopped, Path(config.output))
                raise
    finally:
        _ONE_AT_A_TIME.release()


def _say_stopped(stopped: Stopped, output: Path) -> None:
    if not run_folder.is_run(output):
        say(f"{stopped} before the run had begun; start it again by the same command")
        return
    saved = complete_checkpoints(output)
    at = f"saved {run_folder.shown(saved[-1])}" if saved else "before the first checkpoint"
    say(f"{stopped}, {at}; go on with\n  {run_folder.resume_command(output)}")


def _run(
    config: RunConfig,
    signals: StopSignals,
    ranks: Ranks,
    *,
    resume: bool,
    overwrite: bool,
    from_step: int | None,
    patience: float,
) -> dict[str, Any] | None:
    with ExitStack() as held:
        run = None
        # What can be refused is refused before any work.
        with ranks.together():
            check_same_recipe(config, [resume, overwrite, from_step], ranks)
            if not resume:
                check_recipe(config)
        card = device_of(config, ranks)
        with ranks.together():
            if ranks.leads:
                check_wandb(config.train.wandb)
                config = absolute(config)
                output = Path(config.output)
                run_folder.check_not_inside("data.cache", config.data.cache or default_cache(), output)
                claim = held.enter_context(
                    run_folder.claimed(output, resume=resume, overwrite=overwrite, patience=patience)
                )
                options = {"resume": resume, "overwrite": overwrite, "from_step": from_step}
                run = _prepare(config, ranks, claim, card, **options)
        if ranks.count > 1:
            try:
                run = join(run, ranks)
            except UserError:
                if ranks.leads and not resume:
                    run_folder.forget(output)
                raise
        with ranks.together():
            if ranks.leads and run.start is not None:
                go_on(run)
        done, ended = train(run, signals)
        with ranks.together():
            return finish(run, done, ended) if ranks.leads else None


def _prepare(
    config: RunConfig,
    ranks: Ranks,
    claim: Claim,
    card: Device,
    *,
    resume: bool,
    overwrite: bool,
    from_step: int | None,
) -> Run:
    """Everything before the first step, which one rank does for all."""
    output = Path(config.output)
    if not resume and config.train.ranks not in (1, ranks.count):
        raise UserError(
            f"--train.ranks {config.train.ranks}: {ranks.count} {'was' if ranks.count == 1 else 'were'} started; start "
            f"as many by torchrun, or leave it out"
        )
    train = dataclasses.replace(config.train, ranks=ranks.count)
    share, micro = train.batch_size // ranks.count, train.micro_batch_size
    if micro is not None and micro > share > 0:
        say(f"micro-batches of {share} and not of {micro}: a rank has {share} sequences of a step")
        train = dataclasses.replace(train, micro_batch_size=share)
    config = dataclasses.replace(config, train=train)
    start = starting_point(output, from_step) if resume else None
    if resume:  # one that was killed before START has its config.yaml alone
        then = load_config(output) if start is None else start[1].config
        if start is not None:
            changes(then, config, step=start[1].progress.step)  # refuses what a run keeps
        config = opened(then, config)
    # A resumed run that made its model's folder needs no base any more.
    folder, plan = model_folder.existing(output) if resume else None, None
    base = folder
    if base is None:
        config = model_folder.with_export(config, resume=resume)
        base, plan = model_folder.open_base(config)
    elif start is not None and config.model.path != then.model.path:
        say(f"--model.path {config.model.path}: not needed, the run trains {run_folder.shown(folder.path)}")
        config = dataclasses.replace(config, model=then.model)
    trained = what_trains(
        base.raw_config,
        base.config.num_hidden_layers,
        parameters=config.train.parameters,
        blocks=config.train.blocks,
        plan=plan,
        name=str(base.path),
    )
    check_bounds(config, trained)
    device = start_device(config, ranks.local)
    check_micro_batch(config.train)
    config = settle_computation(config, base, device)
    whatever = {"document": config.train.seq_len}
    config = settle_sharding(config, question_of(config, base, trained, plan, card, **whatever))
    # A resumed run keeps its plan, unless it is told to make another.
    has_plan = resume and config.train.micro_batch_size is not None and config.train.recompute != "auto"
    if not has_plan:
        # Whatever the text is: with documents as long as they can be, least is needed.
        choose(question_of(config, base, trained, plan, card, **whatever))

    # Text to tokens, once; then the length of the run is known.
    claim.enter("tokenising")
    with waiting("reading text ...") as update:
        tokenizer = base.tokenizer() if folder else model_folder.make_tokenizer(config, base, update)
        corpus = corpus_of(config, tokenizer, trained, update)
    question = question_of(config, base, trained, plan, card, document=corpus.train.mean_document)
    found = (
        fit(question, micro_batch_size=question.micro_batch_size, recompute=question.recompute)
        if has_plan
        else choose(question)
    )
    config = settle(
        config,
        question,
        found,
        sequences_in_epoch=corpus.train.sequences_in_epoch(0),
        sources=len(corpus.held_out),
    )
    if not resume:
        say_remarks(config, corpus, tokenizer, folder or base)
    if not has_plan:
        say(f"memory: {why(question, found)}")
    for text in corpus.held_out:
        text.sample(config.eval.tokens)  # refuses text with nothing to predict
    if not resume:
        for line in measured_on_little(corpus, config.eval.tokens):
            say(line)
    makes_model = folder is None and (plan is not None or config.model.init == "random")
    # Beside the checkpoints the model, once as the export, once where it is made.
    stored = getattr(base.config, "dtype", None) or torch.float32
    run_folder.check_room(
        output,
        checkpoint=question.job.checkpoint_bytes,
        keep=config.train.keep_checkpoints,
        other=num_parameters(question.job.config) * stored.itemsize * (2 if makes_model else 1),
        overwrite=overwrite,
        from_step=from_step,
    )
    if not resume:
        run_folder.check_apart(output, local_paths(corpus), config.data.cache or default_cache())
        run_folder.begin(config, output, overwrite=overwrite)

    # The model's folder: from here on only its manifest says which blocks train.
    if folder is None:
        claim.enter("expanding")
        try:
            folder, proof = model_folder.make(config, base, plan, output, tokenizer)
        except UserError:
            if not resume:
                run_folder.forget(output)
            raise
        if proof is not None:
            say(f"expanded: {plan.trained.strip}; identity proved: {proof.summary()}")
    claim.enter("checking")
    run = Run(
        config=config,
        output=output,
        folder=folder,
        trained=trained_of(config, folder),
        corpus=corpus,
        tokenizer=tokenizer,
        device=device,
        planned=found,
        start=start,
        claim=claim,
        ranks=ranks,
    )
    check_bounds(config, run.trained)
    if start is not None:
        run = with_changes(run)
    else:
        with writing_to(output):
            save_config(config, output / CONFIG_NAME)
            write_marker(output / START, starting_info(run), {})
    return run


def say_remarks(config: RunConfig, corpus: Corpus, tokenizer: Any, base: PretrainedFolder) -> None:
    """What a person should know of the text and the tokenizer before anything is trained."""
    for line in warnings(tokenizer, base.path, base.config):
        say(line)
    for line in remarks(corpus, config.data, packaged_base=model_folder.is_packaged(config.model.path)):
        say(line)
    if config.model.init == "pretrained" and config.train.parameters != "all":
        embedding = base.tensor(EMBEDDING).view(torch.uint8).numpy()
        for line in untrained_tokens(corpus, embedding, tokenizer.convert_ids_to_tokens):
            say(line)


def local_paths(corpus: Corpus) -> list[str]:
    """The files and folders of this machine that a corpus is read from."""
    paths = []
    for text in corpus.held_out:
        given = os.path.expanduser(text.source.path)
        files = [file.path for file in text.source.files if "://" not in file.path]
        paths += [given] if os.path.exists(given) else files if text.source.kind == "files" else []
    return paths


def starting_point(output: Path, from_step: int | None) -> tuple[Path, CheckpointInfo] | None:
    """Where a run goes on: its last checkpoint or the one asked for, or its first step; None where it was killed before
    that, while its model was made.

    Raises:
        UserError: what is there is damaged, or the checkpoints are gone.
    """
    if (found := newest(output, from_step)) is not None:
        return found
    saved = max((row["step"] for row in read_metrics(output) if row["kind"] == "save"), default=0)
    if saved or run_folder.is_complete(output):
        raise UserError(
            f"{output}: has saved step {saved or 'its last'}, and no checkpoint is in {output / 'checkpoints'}; put "
            "them back, or start a new run in another folder"
        )
    start = output / START
    return (start, read_marker(start)[0]) if start.exists() else None


def with_changes(run: Run) -> Run:
    """A run about to be resumed: what must not have changed has not, and what has is said and kept in its history.

    Raises:
        UserError: the model, the text or a key that the run keeps is another.
    """
    config, output, then = run.config, run.output, run.start[1]
    step = then.progress.step
    if step > config.train.steps:
        raise UserError(
            f"--train.steps {config.train.steps}: the run has done {step} already; give at least as many, or go on "
            "from an earlier checkpoint with --from_step"
        )
    found = changes(then.config, config, step=step)
    check_unchanged(run)
    for change in found:
        say(f"changed: {change.key} {change.before} -> {change.after}; {MAY_CHANGE[change.key]}")
    # What was changed at this step itself is found anew.
    kept = [change for change in load_config(output).history if change.step < step]
    return dataclasses.replace(run, config=dataclasses.replace(config, history=kept + found))


def go_on(run: Run) -> None:
    """Write what a resumed run's folder has to say from now on. Before, nothing in it has changed."""
    output, step = run.output, run.start[1].progress.step
    for aside in set_aside_after(output, step):
        say(f"a checkpoint beyond step {step} is kept as {run_folder.shown(aside)}")
    with writing_to(output):
        save_config(run.config, output / CONFIG_NAME)
    if step < run.config.train.steps:
        run_folder.reopen(output)
