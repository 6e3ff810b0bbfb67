"""The folder of the model a run trains: the user's own, or made in the run's folder, expanded or with fresh weights."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from llama_pro_fast.config import RunConfig
from llama_pro_fast.console import progress_bars, say
from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.expansion.proof import IdentityProof, expand_and_prove
from llama_pro_fast.expansion.rewrite import write_json
from llama_pro_fast.files import new_folder
from llama_pro_fast.hf.config import BUILTIN, CONFIG_FILE, read_config, resolve, with_older_rope_keys
from llama_pro_fast.hf.folder import PretrainedFolder, no_progress_bars
from llama_pro_fast.hf.loading import check_tensors
from llama_pro_fast.resume import load_config
from llama_pro_fast.runs import run_folder
from llama_pro_fast.text.sources import resolve_sources
from llama_pro_fast.text.tokenizer import save_tokenizer, train_tokenizer
from llama_pro_fast.training.checkpoint_folder import CheckpointFolder, trained_folder
from llama_pro_fast.training.export import export_run


def find(path_or_id: str) -> Path:
    """The folder of a model: as :func:`resolve`, or of a run the export of its last checkpoint, which is made unless
    the run is complete and so has it.

    Raises:
        UserError: there is no such model, or the run has no checkpoint yet.
    """
    if (run := _run(path_or_id)) is None:
        return resolve(path_or_id)
    if run_folder.is_complete(run) and (run / "export").is_dir():
        return run / "export"
    folder, step = export_run(run)
    say(f"exported step {step} of {run_folder.shown(run)} to {run_folder.shown(folder)}")
    return folder


def opened(path_or_id: str, *, from_step: int | None = None) -> PretrainedFolder:
    """A model to be read. As :func:`find`, but nothing is written: of a run that has no export of its last step the
    checkpoint is laid over the folder that it trains.

    Args:
        from_step: of a run, the checkpoint of that step.

    Raises:
        UserError: there is no such model, or the run has no such checkpoint.
    """
    if (run := _run(path_or_id)) is None:
        if from_step is not None:
            raise UserError(f"--from_step {from_step}: {path_or_id} is not the folder of a run; leave it out")
        return PretrainedFolder(resolve(path_or_id))
    if from_step is None and run_folder.is_complete(run) and (run / "export").is_dir():
        return PretrainedFolder(run / "export")
    return CheckpointFolder(run, from_step)


def runs_behind(path_or_id: str) -> list[Path]:
    """The run that a model, named by the run or its ``export/``, was trained in; the one that this had its own model
    from; and so on."""
    found = []
    while True:
        path = Path(os.path.expanduser(path_or_id))
        run = _run(path_or_id) or (_run(str(path.parent)) if path.name == "export" else None)
        if run is None or run in found:
            return found
        found.append(run)
        path_or_id = load_config(run).model.path


def with_export(config: RunConfig, *, resume: bool) -> RunConfig:
    """``config`` with its export in place of a run as the model: what is trained stays what it is should that run go
    on. With ``resume`` the export is the one that is there."""
    if (run := _run(config.model.path)) is None:
        return config
    run_folder.check_not_inside("model.path", config.model.path, Path(config.output))
    path = run / "export" if resume else find(config.model.path)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(path)))


def config_of(path_or_id: str) -> str:
    """What a plan reads in place of ``path_or_id``: of a run the folder of its model, which need not be exported."""
    run = _run(path_or_id)
    return path_or_id if run is None else str(trained_folder(run).path)


def _run(path_or_id: str) -> Path | None:
    """The folder of a run; a model's folder may have a config.yaml too."""
    folder = Path(os.path.expanduser(path_or_id))
    return folder if run_folder.is_run(folder) and not (folder / CONFIG_FILE).exists() else None


def open_base(config: RunConfig) -> tuple[PretrainedFolder, ExpansionPlan | None]:
    """The model the recipe names, and how it will be expanded.

    Raises:
        UserError: there is none, its files do not fit each other, or the expansion does not fit it.
    """
    base = PretrainedFolder(resolve(config.model.path))
    run_folder.check_not_inside("model.path", base.path, Path(config.output))
    if config.model.init == "random":
        return base, None
    check_tensors(base)
    if not config.expand.wanted:
        return base, None
    return base, ExpansionPlan.from_config(base.config.num_hidden_layers, config.expand)


def text_side(config: RunConfig) -> PretrainedFolder:
    """The model the recipe names, for its config and tokenizer: its weights need not be there.

    Raises:
        UserError: there is no such model.
    """
    return PretrainedFolder(resolve(config_of(config.model.path), wanted="tokenizer"))


def is_packaged(path_or_id: str) -> bool:
    """Whether the model is the one in the package."""
    return path_or_id.startswith(BUILTIN)


def existing(output: Path) -> PretrainedFolder | None:
    """The model folder a run has made for itself, if it has."""
    made = [output / name for name in ("expanded", "initial") if (output / name).is_dir()]
    return PretrainedFolder(made[0]) if made else None


def make_tokenizer(config: RunConfig, base: PretrainedFolder, update: Callable[[str], None]) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or one trained on the run's text, which ``update`` is told of."""
    if config.model.tokenizer == "pretrained":
        return base.tokenizer()
    update("training the tokenizer ...")
    return train_tokenizer(
        resolve_sources(config.data, default_general=False),
        vocab_size=base.config.vocab_size,
        held_out=config.data.held_out,
        bos=base.config.bos_token_id,
        eos=base.config.eos_token_id,
    )


def make(
    config: RunConfig,
    base: PretrainedFolder,
    plan: ExpansionPlan | None,
    output: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[PretrainedFolder, IdentityProof | None]:
    """The folder this run trains: ``base`` itself, a fresh model, or ``base`` expanded, with what that proved."""
    if config.model.init == "random":
        trained = tokenizer if config.model.tokenizer == "train" else None
        write_random_model(base, output / "initial", seed=config.train.seed, tokenizer=trained)
        return PretrainedFolder(output / "initial"), None
    if plan is None:
        return base, None
    with progress_bars() as progress:
        proof = expand_and_prove(base, output / "expanded", plan, progress=progress)
    return PretrainedFolder(output / "expanded"), proof


def write_random_model(
    base: PretrainedFolder, folder: Path, *, seed: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Fresh weights for ``base``'s architecture as transformers draws them, with its tokenizer or another one.

    In the config's dtype, float32 where it names none; the export will have the same.
    """
    import transformers

    dtype = getattr(base.config, "dtype", None) or torch.float32  # asked before from_config writes its own there
    # A generator of its own would be ignored: transformers draws from the global one.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(base.config, dtype=torch.float32)
    model.to(dtype)
    with new_folder(folder) as partial:
        with no_progress_bars():
            model.save_pretrained(partial)
        raw_config, config = read_config(partial / CONFIG_FILE)
        write_json(partial / CONFIG_FILE, with_older_rope_keys(raw_config, config))
        for path in base.companions():
            # Files of the other tokenizer would be read before those of the new one.
            if tokenizer is None or path.match("generation_config.json") or path.match("[A-Z]*"):
                shutil.copyfile(path, partial / path.name)
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial)
