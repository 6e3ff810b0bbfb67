"""The end of a run: the trained model as an ordinary checkpoint, read back, and what there is to say of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llama_pro_fast.console import waiting
from llama_pro_fast.errors import UserError
from llama_pro_fast.evaluation.baselines import references
from llama_pro_fast.evaluation.export_check import read_export_back, unchecked
from llama_pro_fast.expansion.manifest import Manifest
from llama_pro_fast.host import peak_memory_gib
from llama_pro_fast.planning.cost import num_parameters, num_trained_parameters
from llama_pro_fast.planning.devices import GIB
from llama_pro_fast.reporting.summary import summarise, write_report
from llama_pro_fast.runs.marker import Progress
from llama_pro_fast.training.cards import show_end
from llama_pro_fast.training.export import export_run
from llama_pro_fast.training.loop import Run


def finish(run: Run, done: Progress, ended: str | None) -> dict[str, Any]:
    """The trained model as an ordinary checkpoint, read back, and what there is to say about the run.

    Args:
        done: how far it came.
        ended: which bound ended it before its last step, in words.

    Raises:
        UserError: the export, or what stock transformers computes from it, is not what was trained (the report stands
            all the same), or no space is left.
    """
    config, output, folder, corpus = run.config, run.output, run.folder, run.corpus
    train, trained = config.train, run.trained
    run.claim.enter("exporting")
    exported, _ = export_run(output)
    run.claim.enter("reporting")
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
        "steps": done.step,
        "tokens": done.tokens,
        "ended": ended,
        "device": train.device,
        "ranks": train.ranks,
        "sharding": train.sharding if train.ranks > 1 else None,
        "threads": train.threads,
        "dtype": train.dtype,
        "fp8": train.fp8,
        "attention": train.attention,
        "micro_batch_size": train.micro_batch_size,
        "recompute": train.recompute,
        "planned_memory_gib": round(run.planned.peak / GIB, 3),
        "planned_tokens_per_second": run.planned.tokens_per_second,
        "learning_rate": config.optim.lr,
        "places_filled": round(run.corpus.train.filled, 5),
        "tokens_without_beginning": round(run.corpus.train.without_beginning, 5),
        "export": str(exported),
    }
    measured = summarise(output, figures)
    # To read, should the check be the end of this process; the run is complete, and not to be resumed, after it.
    write_report(output, facts | unchecked("not read back yet") | measured, complete=False)
    try:
        with waiting("reading the export back ...") as update:
            read_back = read_export_back(
                config,
                exported,
                corpus,
                run.tokenizer,
                measured["results"],
                new_blocks=new_blocks_over_base(run),
                tokens=done.tokens,
                progress=update,
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


def new_blocks_over_base(run: Run) -> dict[int, tuple[str, ...]]:
    """The blocks without which a run's model is its base, and the modules of each that were zero at its birth, where
    the manifest names them; none where the base is not in there."""
    if not run.trained.skip_for_base:
        return {}
    manifest = Manifest.from_config(run.folder.raw_config)
    return dict.fromkeys(run.trained.skip_for_base, ()) | manifest.zeroed(len(manifest.generations))
