"""What the command lines do, from Python, over the same values. With examples that are run: docs/python.md."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from llama_pro_fast.config import ExpandConfig, RunConfig
from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion.manifest import MANIFEST_KEY, what_trains
from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.expansion.proof import IdentityProof, expand_and_prove
from llama_pro_fast.hf.families import block_spec, window_within
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.hf.loading import load_model
from llama_pro_fast.model.decoder import Decoder
from llama_pro_fast.recipe import absolute
from llama_pro_fast.resume import load_config
from llama_pro_fast.training import model_folder
from llama_pro_fast.training.evaluating import Report, evaluate_texts
from llama_pro_fast.training.export import export_run
from llama_pro_fast.training.run import run_training
from llama_pro_fast.training.signals import Stopped
from llama_pro_kernels import select_attention_backend
from llama_pro_kernels.linear import missing_e4m3


def expand(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    groups: int | None = None,
    after: Sequence[int] | None = None,
    copies: int = 1,
) -> IdentityProof:
    """Insert identity copies of blocks, and prove that the model computes what it did (paper 3.2).

    Args:
        base: folder of a model, of a run, or a hub id.
        out: folder to write; must not exist, or be empty. It comes into being only once the proof holds.
        groups: cut the blocks into so many groups; new blocks end each. Give this or ``after``.
        after: the blocks, from 0, that new ones follow.
        copies: new blocks in each place.

    Returns:
        What was compared and found equal.

    Raises:
        UserError: the base cannot be read or expanded so, or ``out`` cannot be written.
    """
    folder = PretrainedFolder(model_folder.find(os.fspath(base)))
    wanted = ExpandConfig(groups=groups, after=None if after is None else list(after), copies=copies)
    plan = ExpansionPlan.from_config(folder.config.num_hidden_layers, wanted)
    return expand_and_prove(folder, out, plan)


def load(
    model: str | os.PathLike[str],
    *,
    parameters: Literal["new_blocks", "all"] = "new_blocks",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    max_length: int | None = None,
    fp8: Literal["none", "backward"] = "none",
) -> Decoder:
    """A model as this package trains it: frozen blocks compute no weight gradient and keep nothing for one.

    Args:
        model: folder of a model, of a run, or a hub id.
        parameters: what trains: the blocks its manifest calls new, or everything.
        dtype: of the computation. Frozen weights are held in it, trained ones in float32 (float64 under float64).
        device: where to.
        max_length: longest sequence that will be given; by default the model's positions.
        fp8: `backward`: frozen blocks pass the gradient on in eight bits, as `train.fp8` says.

    Returns:
        A module over packed batches (:class:`PackedBatch`); ``trained_parameters()`` names what an optimizer gets.

    Raises:
        UserError: the model cannot be read, or has no new blocks; or ``fp8`` is not one of these, or the device cannot.
    """
    if fp8 not in ("none", "backward"):
        raise UserError(f"fp8={fp8!r}: give 'none' or 'backward'")
    if fp8 == "backward" and (why := missing_e4m3(torch.device(device))):
        raise UserError(f"fp8='backward': {why}; give 'none'")
    folder = PretrainedFolder(model_folder.find(os.fspath(model)))
    length = max_length or folder.config.max_position_embeddings
    attention = select_attention_backend(
        torch.device(device),
        dtype,
        window=window_within(folder.config, length),
        head_dim=block_spec(folder.config, 0).head_dim,
    )
    return load_model(
        folder,
        trained=what_trains(
            folder.raw_config, folder.config.num_hidden_layers, parameters=parameters, name=str(folder.path)
        ),
        dtype=dtype,
        device=device,
        max_length=length,
        attention=attention,
        eight_bits=fp8 == "backward",
    )


def train(
    config: RunConfig | str | os.PathLike[str], *, overwrite: bool = False, from_step: int | None = None
) -> dict[str, Any] | None:
    """Start a run, or go on with one.

    Args:
        config: of the new run; or the folder of a run, which goes on where its last checkpoint stands.
        overwrite: delete the run that is in the new one's folder.
        from_step: the checkpoint to go on from; by default the last.

    Returns:
        The content of ``report/summary.json``; None when the run was stopped (and saved), and on a rank that does not
        lead.

    Raises:
        UserError: bad input, a full disk, or too many steps whose gradients are not finite.
    """
    resume = not isinstance(config, RunConfig)
    if resume:
        if overwrite:
            raise UserError("overwrite: the folder of a run goes on; to delete it give the new run's RunConfig")
        folder = os.path.abspath(os.path.expanduser(config))
        config = dataclasses.replace(load_config(Path(folder)), output=folder)
    elif from_step is not None:
        raise UserError("from_step: a new run has no checkpoint to go on from; give the folder of a run")
    with contextlib.suppress(Stopped):
        return run_training(config, resume=resume, overwrite=overwrite, from_step=from_step)
    return None


def export(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    from_step: int | None = None,
    scale: float | Sequence[float] | None = None,
) -> Path:
    """Write a run's model, as its last complete checkpoint has it, as an ordinary Hugging Face folder.

    Args:
        out: by default ``RUN/export``; with ``scale`` it must be given.
        from_step: the checkpoint to take; by default the last.
        scale: how much is kept of what the new blocks add: 0 is the base, 1 the run, up to 2. After several expansions
            a number for the new blocks of each, oldest first, or one for those of the last.

    Returns:
        The folder.

    Raises:
        UserError: there is no run, it has no checkpoint yet or cannot be scaled so, or the folder cannot be written.
    """
    return export_run(Path(run), None if out is None else Path(out), from_step=from_step, scale=scale)[0]


def evaluate(
    model: str | os.PathLike[str],
    config: RunConfig | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    from_step: int | None = None,
    fresh: bool = False,
) -> Report:
    """Measure a model on texts, and beside it the base in it or another model.

    Args:
        model: folder of a model, of a run, or a hub id.
        config: its ``data`` names the texts; of ``train`` what is computed with counts, and ``eval.tokens``. A run
            without one is measured on its own held-out texts.
        base: another model to hold it against.
        from_step: of a run, the checkpoint to take; by default the last.
        fresh: measure again what is known from an earlier call.

    Returns:
        The figures; ``dataclasses.asdict`` of it is what ``--json`` writes.

    Raises:
        UserError: there is no such model or text, or no memory for them, or a loss is not finite.
    """
    return evaluate_texts(
        os.fspath(model),
        absolute(config or RunConfig()),
        base=None if base is None else os.fspath(base),
        from_step=from_step,
        fresh=fresh,
    )


def freeze_to_new_blocks(model: torch.nn.Module) -> list[str]:
    """Freeze a loaded transformers model but for its new blocks, by its manifest and nothing else.

    For people with a training loop of their own, TRL or ``transformers.Trainer``.

    Args:
        model: of an expanded folder (``AutoModelForCausalLM.from_pretrained``).

    Returns:
        Names of the parameters that train, as ``named_parameters`` has them.

    Raises:
        UserError: the model's config names no new blocks.
    """
    if type(model).__module__.startswith("peft"):
        raise UserError("a PEFT model: freeze the transformers model first, then add adapters")
    if not hasattr(model, "config") or not hasattr(model, "get_decoder"):
        raise UserError(f"{type(model).__name__}: not a transformers language model; unwrap it first")
    config = model.config.to_dict()
    if MANIFEST_KEY not in config:
        raise UserError(f"{model.config.name_or_path or 'the model'}: has no new blocks; expand it first")
    trained = what_trains(
        config, model.config.num_hidden_layers, parameters="new_blocks", name=model.config.name_or_path or "the model"
    )
    layers = model.get_decoder().layers
    new = {id(parameter) for index in trained.blocks for parameter in layers[index].parameters()}
    names = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in new)
        if parameter.requires_grad:
            names.append(name)
    return names
