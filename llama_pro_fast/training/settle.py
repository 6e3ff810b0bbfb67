"""What a run settles before its first step: bad values refused, everything left open filled in.

    RunConfig ── settle_computation ── length, device, dtype, attention ── (text is read) ── settle ── Settled

Each step makes a new configuration; the caller's stays as it was.
"""

from __future__ import annotations

import dataclasses
import math
import os

import torch

from llama_pro_fast.config import RunConfig, Settled, check_micro_batch, check_values
from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.model.decoder import DTYPES
from llama_pro_fast.model.trained import Trained
from llama_pro_fast.planning import devices
from llama_pro_fast.planning.devices import GIB, Device
from llama_pro_fast.planning.explain import shortfall
from llama_pro_fast.planning.job import Question, ask, attention_backend, recompute_text, sequence_length
from llama_pro_fast.planning.search import Fit, best_fit
from llama_pro_fast.ranks import Ranks
from llama_pro_fast.training.schedule import settle_schedule
from llama_pro_kernels import implementation_name
from llama_pro_kernels.linear import missing_e4m3


def check_recipe(config: RunConfig) -> None:
    """Refuse what is wrong whatever the model and the data are.

    Raises:
        UserError: naming the key and the remedy.
    """
    if not config.output:
        raise UserError("--output: say where the run goes, for example --output runs/mine")
    check_text(config)
    if config.optim.lr is None:
        raise UserError(
            "--optim.lr: there is no default, it depends on the base; the paper took 2e-4 for LLaMA-2-7B and 2e-5 for "
            "Mistral-7B, 5e-5 is a careful start for other bases, 1e-3 for a small model from scratch"
        )


def check_text(config: RunConfig) -> None:
    """The part of :func:`check_recipe` that preparing the text needs too: a model, a text, every bound.

    Raises:
        UserError: naming the key and the remedy.
    """
    check_model(config)
    if not config.data.domain:
        raise UserError(
            "--data.domain: say what to learn: a file, a folder or a pattern of text (jsonl, parquet, csv, txt, source "
            "code), a data set of the hub, or stdlib:code"
        )


def check_model(config: RunConfig) -> None:
    """The part of :func:`check_recipe` that a plan needs too: the model, where its new blocks go, every bound.

    Raises:
        UserError: naming the key and the remedy.
    """
    train = config.train
    if not config.model.path:
        raise UserError("--model.path: say which model, a folder in the Hugging Face layout, a run or a hub id")
    if config.expand.copies != 1 and not config.expand.wanted:
        raise UserError("--expand.copies: says how many, not where; give --expand.groups or --expand.after too")
    if config.model.tokenizer == "train" and config.model.init != "random":
        raise UserError("--model.tokenizer train: pretrained weights know only their own; add --model.init random")
    if config.expand.wanted and config.model.init == "random":
        raise UserError("--expand.*: a random model has nothing to keep; train a base first (train.parameters all)")
    if config.model.init == "random" and train.parameters != "all":
        raise UserError("--model.init random: every weight is new, so say --train.parameters all")
    check_values(config)
    if (train.parameters == "blocks") != (train.blocks is not None):
        raise UserError("--train.blocks: goes with --train.parameters blocks; give both or neither")
    if train.blocks is not None and config.expand.wanted:
        raise UserError(
            "--train.blocks: names blocks of the model as it is; leave --expand.* out (over a recipe: --expand.groups "
            "null), or expand it first"
        )
    if train.steps is not None and train.tokens is not None:
        raise UserError("--train.steps and --train.tokens both set the length; give one of them")
    if train.sharding == "trained" and config.optim.name == "muon":
        raise UserError("--train.sharding trained: Muon needs whole matrices; give replicate, or --optim.name adamw")
    check_micro_batch(train)


def check_bounds(config: RunConfig, trained: Trained) -> None:
    """Refuse what needs the base where it is not in the model: bounds on what is forgotten, and the base as teacher.

    Raises:
        UserError: naming the key.
    """
    needing = ("stop.kl_above", config.stop.kl_above), ("stop.general_rise", config.stop.general_rise)
    for key, value in (*needing, ("train.kl_weight", config.train.kl_weight or None)):
        if value is not None and trained.base_gone:
            raise UserError(f"--{key} {value:g}: nothing to hold against: {trained.base_gone}; leave it out")


def start_device(config: RunConfig, local: int = 0) -> torch.device:
    """The device of a run, and the process set up for it: threads, allocator, what `deterministic` needs.

    Args:
        local: of several processes on this machine the number of this one, and of its GPU.

    Raises:
        UserError: a GPU is asked for and PyTorch sees none.
    """
    train = config.train
    if train.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--train.device cuda: PyTorch sees no GPU here; install its CUDA build or use --train.device cpu"
        )
    device = train.device if train.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        devices.expandable_segments()
        if local:
            torch.cuda.set_device(local)
        if train.deterministic:
            # cuBLAS reads this when it is first used; a workspace of its own per stream is what makes it repeat.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    return torch.device(device)


def settle_computation(config: RunConfig, base: PretrainedFolder, device: torch.device) -> RunConfig:
    """``config`` with sequence length, device, dtype, attention backend and threads filled in.

    Args:
        device: as :func:`start_device` gave it; a backend may be deterministic only once the process is set up.

    Raises:
        UserError: a backend asked for is not there, or the sequence is longer than the model allows.
    """
    train, seq_len = config.train, sequence_length(config, base.config)
    name = train.dtype if train.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    attention = attention_backend(config, base.config, device, name, seq_len)
    try:
        implementation_name(device, DTYPES[name])
    except ImportError as error:
        raise UserError(f"--train.device {device.type}: {error}") from error
    if train.fp8 == "backward" and (why := missing_e4m3(device)):
        raise UserError(f"--train.fp8 backward: {why}; give --train.fp8 none")
    settled = {"seq_len": seq_len, "device": device.type, "dtype": name, "attention": attention}
    settled["threads"] = torch.get_num_threads()
    return dataclasses.replace(config, train=dataclasses.replace(train, **settled))


def device_of(config: RunConfig, ranks: Ranks) -> Device:
    """Where a run computes, as its planner knows it: with the least memory that any rank has free. The processes of a
    machine share its own."""
    if config.train.device != "cpu" and torch.cuda.is_available():
        devices.expandable_segments()
        here = devices.present(ranks.local)
    else:
        here = devices.cpu(ranks.on_machine)
    return dataclasses.replace(here, memory=min(ranks.gather(here.memory)))


def question_of(
    config: RunConfig,
    base: PretrainedFolder,
    trained: Trained,
    plan: ExpansionPlan | None,
    device: Device,
    *,
    document: float,
) -> Question:
    """What a run asks its planner.

    Args:
        config: with a settled computation.
        base: the model before its expansion by ``plan``.
        device: as :func:`device_of` gave it.
        document: tokens of a document on average.
    """
    triton = implementation_name(config.train.device, DTYPES[config.train.dtype]).startswith("triton")
    return ask(config, base.config, trained, plan, device, triton=triton, document=document)


def settle_sharding(config: RunConfig, question: Question) -> RunConfig:
    """``config`` with the way several ranks share the weights: whole on each, where that fits, else sharded.

    Args:
        question: put with ``config``.
    """
    train = config.train
    if train.ranks == 1 or train.sharding != "auto":
        return config
    whole = best_fit(question) is not None or config.optim.name == "muon"
    return dataclasses.replace(config, train=dataclasses.replace(train, sharding="replicate" if whole else "trained"))


def choose(question: Question) -> Fit:
    """The way to run.

    Raises:
        UserError: none fits; what would is said.
    """
    found = best_fit(question)
    if found is None:
        raise UserError(f"--train.memory: {shortfall(question)}")
    return found


def settle(config: RunConfig, question: Question, found: Fit, *, sequences_in_epoch: int, sources: int) -> Settled:
    """The configuration of a run, with nothing left open.

    Args:
        config: with a settled computation.
        found: the way to run that was chosen for ``question``.
        sources: texts that are measured.

    Raises:
        UserError: the run is shorter than one step, or than its warm-up.
    """
    steps = count_steps(config, sequences_in_epoch)
    every = config.eval.every or max(1, min(500, math.ceil(steps / 10)))
    train = dataclasses.replace(
        config.train,
        steps=steps,
        micro_batch_size=found.micro_batch_size,
        memory=max(0.01, round(question.usable / GIB, 2)) if config.train.memory == "auto" else config.train.memory,
        recompute=recompute_text(found.recompute, question.job.trained.first),
    )
    # Of each text once before the first step, and once every so often.
    measured = (1 + math.ceil(steps / every)) * sources
    trained = steps * train.batch_size * train.seq_len
    tokens = config.eval.tokens or min(65_536, max(train.seq_len, trained // measured))
    return Settled(
        model=config.model,
        expand=config.expand,
        data=config.data,
        optim=settle_schedule(config.optim, steps),
        train=train,
        eval=dataclasses.replace(config.eval, every=every, tokens=tokens),
        stop=config.stop,
        output=config.output,
    )


def count_steps(config: RunConfig, sequences_in_epoch: int) -> int:
    """Optimizer steps of a run with a settled sequence length.

    Raises:
        UserError: it is shorter than one.
    """
    train = config.train
    if train.steps is not None:
        return train.steps
    if train.tokens is not None:
        per_step = train.batch_size * train.seq_len
        if train.tokens < per_step:
            raise UserError(
                f"--train.tokens {train.tokens:g}: one step takes {per_step:,} tokens; give at least that many"
            )
        return int(train.tokens // per_step)
    if sequences_in_epoch < train.batch_size:
        raise UserError(
            f"one epoch has {sequences_in_epoch} sequences, fewer than --train.batch_size {train.batch_size}; "
            "give --train.steps, a smaller batch or more text"
        )
    return sequences_in_epoch // train.batch_size
