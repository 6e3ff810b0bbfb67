"""One run on several ranks: what the first has prepared, found again by the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llama_pro_fast.config import RunConfig, Settled, options
from llama_pro_fast.data.corpus import Corpus
from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion.lineage import difference, intact_bases
from llama_pro_fast.expansion.manifest import what_trains
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.model.trained import Trained
from llama_pro_fast.planning.search import Fit
from llama_pro_fast.ranks import Ranks
from llama_pro_fast.resume import CONFIG_NAME
from llama_pro_fast.runs.marker import CheckpointInfo
from llama_pro_fast.runs.run_folder import Claim
from llama_pro_fast.training.loop import Run, starting_info
from llama_pro_fast.training.settle import start_device

LOOKING = 40.0
"""Seconds; what is not there NFS remembers for up to 30."""


def check_same_recipe(config: RunConfig, how: list[Any], ranks: Ranks) -> None:
    """Refuse ranks that were asked for different runs, or of which only some see a GPU.

    Args:
        how: of ``--resume``, ``--overwrite`` and ``--from_step`` the values.

    Raises:
        UserError: naming the option.
    """
    if ranks.count == 1:
        return
    own = {f"--{key}": repr(value) for key, value, _ in options(config)}
    own |= {f"--{key}": str(value) for key, value in zip(("resume", "overwrite", "from_step"), how, strict=True)}
    found = ranks.gather((own, torch.cuda.device_count() if torch.cuda.is_available() else 0, ranks.local))
    for number, (asked, gpus, local) in enumerate(found):
        for option, first in found[0][0].items():
            if asked[option] != first:
                raise UserError(
                    f"{option}: rank {number} was given {asked[option]} and rank 0 {first}; give all the same"
                )
        if config.train.device == "cpu":
            continue
        if bool(gpus) != bool(found[0][1]):
            raise UserError(
                f"rank {number} sees {'a' if gpus else 'no'} GPU and rank 0 {'none' if gpus else 'does'}: start all "
                "where there is one, or give --train.device cpu"
            )
        if gpus and local >= gpus:
            raise UserError(
                f"process {local} of a machine finds {gpus} GPU{'s' * (gpus > 1)}: give torchrun as many "
                "--nproc-per-node, or fewer"
            )


def join(run: Run | None, ranks: Ranks) -> Run:
    """The same run on every rank, from what the first one has prepared. The first of each machine reads the text before
    the others, which then find its tokens.

    Raises:
        UserError: a rank has another folder, model or text there.
    """
    shared = run and (run.config, run.folder.path, run.planned, run.start, starting_info(run), _said_in(run.output))
    config, path, planned, start, info, said = ranks.share(shared)
    for now in (ranks.local == 0, ranks.local > 0):
        with ranks.together():
            if run is None and now:
                if not _comes_to_say(Path(config.output), said):
                    raise UserError(
                        f"--output {config.output}: is not the folder that rank 0 sees there; give one that all "
                        "machines share"
                    )
                run = _of_shared(config, path, planned, start, ranks)
                own = starting_info(run)
                if (changed := difference(info.identity, own.identity)) is not None:
                    raise UserError(f"{path}: is not the model that rank 0 sees there: {changed}")
                if (own.data, own.measured) != (info.data, info.measured):
                    raise UserError("--data: the text is not what rank 0 sees by the same names")
    return run


def _said_in(output: Path) -> bytes:
    """The configuration that a run's folder holds."""
    path = output / CONFIG_NAME
    return path.read_bytes() if path.is_file() else b""


def _comes_to_say(output: Path, said: bytes) -> bool:
    """Whether a run's folder holds that configuration, or will as soon as a network's file system has looked again."""
    until = time.monotonic() + LOOKING
    while _said_in(output) != said:
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True


def _of_shared(
    config: Settled,
    path: Path,
    planned: Fit,
    start: tuple[Path, CheckpointInfo] | None,
    ranks: Ranks,
) -> Run:
    device = start_device(config, ranks.local)
    if not path.is_dir():
        raise UserError(f"{path}: is not there; the run's folder and the model must lie where all machines find them")
    folder = PretrainedFolder(path)
    tokenizer = folder.tokenizer()
    trained = trained_of(config, folder)
    return Run(
        config=config,
        output=Path(config.output),
        folder=folder,
        trained=trained,
        corpus=corpus_of(config, tokenizer, trained),
        tokenizer=tokenizer,
        device=device,
        planned=planned,
        start=start,
        claim=Claim(None),
        ranks=ranks,
    )


def trained_of(config: RunConfig, folder: PretrainedFolder) -> Trained:
    """What of a run's model trains, by its manifest."""
    return what_trains(
        folder.raw_config,
        folder.config.num_hidden_layers,
        parameters=config.train.parameters,
        blocks=config.train.blocks,
        name=str(folder.path),
        intact=intact_bases(folder),
    )


def corpus_of(
    config: RunConfig, tokenizer: Any, trained: Trained, update: Callable[[str], None] = lambda text: None
) -> Corpus:
    """A run's text in tokens; what is in the cache is not made again."""
    return Corpus.prepare(
        config.data,
        tokenizer,
        seq_len=config.train.seq_len,
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        default_general=not trained.everything,
        taught=config.train.kl_weight > 0,
        progress=update,
    )
