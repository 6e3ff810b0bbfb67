"""Everything a run settles before its first step: bad values refused, defaults filled in, the model's folder made."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llama_pro_fast import devices, run_folder
from llama_pro_fast.advice import shortfall, why
from llama_pro_fast.config import OptimConfig, RunConfig
from llama_pro_fast.console import progress_bars
from llama_pro_fast.data import resolve_sources
from llama_pro_fast.data.tokenizer import save_tokenizer, train_tokenizer
from llama_pro_fast.devices import GIB, Device
from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion import ExpansionPlan
from llama_pro_fast.families import BlockSpec, window_within
from llama_pro_fast.files import new_folder
from llama_pro_fast.identity import IdentityProof, expand_and_prove
from llama_pro_fast.manifest import Manifest
from llama_pro_fast.memory import Job
from llama_pro_fast.model import check_tensors
from llama_pro_fast.planner import Fit, best_fit, expanded_shape, fit, parse_recompute, recompute_text
from llama_pro_fast.pretrained import PretrainedFolder, no_progress_bars, resolve
from llama_pro_kernels import implementation_name, select_attention_backend

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_config(config: RunConfig) -> None:
    """Refuse what is wrong whatever the model and the data are.

    Raises:
        UserError: naming the key and the remedy.
    """
    train, optim = config.train, config.optim
    if not config.output:
        raise UserError("--output: say where the run goes, for example --output runs/mine")
    if not config.model.path:
        raise UserError("--model.path: say which model, a folder in the Hugging Face layout or a hub id")
    if not config.data.domain:
        raise UserError("--data.domain: say what to learn: a .jsonl, .txt or .parquet file or folder, or stdlib:code")
    if optim.lr is None:
        raise UserError(
            "--optim.lr: there is no default, it depends on the base; the paper took 2e-4 for LLaMA-2-7B and 2e-5 for "
            "Mistral-7B, 5e-5 is a careful start for other bases, 1e-3 for a small model from scratch"
        )
    if train.steps is not None and train.tokens is not None:
        raise UserError("--train.steps and --train.tokens both set the length; give one of them")
    if config.expand.copies != 1 and not config.expand.wanted:
        raise UserError("--expand.copies: says how many, not where; give --expand.groups or --expand.after too")
    if config.model.tokenizer == "train" and config.model.init != "random":
        raise UserError("--model.tokenizer train: pretrained weights know only their own; add --model.init random")
    if config.expand.wanted and config.model.init == "random":
        raise UserError("--expand.*: a random model has nothing to keep; train a base first (train.parameters all)")
    positive = {
        "optim.lr": optim.lr,
        "optim.clip": optim.clip,
        "optim.eps": optim.eps,
        "train.steps": train.steps,
        "train.tokens": train.tokens,
        "train.seq_len": train.seq_len,
        "train.batch_size": train.batch_size,
        "train.micro_batch_size": train.micro_batch_size,
        "train.memory": None if train.memory == "auto" else train.memory,
        "train.threads": train.threads,
        "train.log_every": train.log_every,
        "train.checkpoint_every": train.checkpoint_every,
        "train.keep_checkpoints": train.keep_checkpoints,
        "eval.every": config.eval.every,
        "eval.tokens": config.eval.tokens,
    }
    for key, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{key}: {value} is not a number above 0")
    not_negative = {
        "optim.warmup_steps": optim.warmup_steps,
        "optim.decay_steps": optim.decay_steps,
        "optim.weight_decay": optim.weight_decay,
        "train.seed": train.seed,
    }
    for key, value in not_negative.items():
        if value is not None and not value >= 0:
            raise UserError(f"--{key}: {value} is below 0")
    for key, value in {"optim.beta1": optim.beta1, "optim.beta2": optim.beta2}.items():
        if not 0 <= value < 1:
            raise UserError(f"--{key}: {value} is not between 0 and 1 (1 excluded)")
    if not 0 <= optim.min_lr_ratio <= 1:
        raise UserError(f"--optim.min_lr_ratio: {optim.min_lr_ratio} is not between 0 and 1")
    if not 0 < config.data.held_out < 1:
        raise UserError(
            f"--data.held_out: {config.data.held_out} is not between 0 and 1; 0.02 keeps every 50th document"
        )
    if train.micro_batch_size is not None and train.batch_size % train.micro_batch_size:
        raise UserError(
            f"--train.micro_batch_size: {train.micro_batch_size} does not divide --train.batch_size {train.batch_size}"
        )


def open_base(config: RunConfig) -> tuple[PretrainedFolder, ExpansionPlan | None]:
    """The model the recipe names, and how it will be expanded.

    Raises:
        UserError: model and recipe do not fit each other.
    """
    base = PretrainedFolder(resolve(config.model.path))
    run_folder.check_not_inside("model.path", base.path, Path(config.output))
    expanded = Manifest.from_config(base.raw_config) is not None
    if config.model.init == "random":
        if config.train.parameters != "all":
            raise UserError("--model.init random: every weight is new, so say --train.parameters all")
        return base, None
    check_tensors(base)
    if config.expand.wanted:
        if expanded:
            raise UserError(
                f"--expand.*: {base.path} is expanded already; leave the option out to train its new blocks, or add a "
                "generation with `llama-pro-fast expand` first"
            )
        return base, ExpansionPlan.from_config(base.config.num_hidden_layers, config.expand)
    if config.train.parameters == "new_blocks" and not expanded:
        raise UserError(
            f"{base.path}: has no new blocks to train; say where they go, for example --expand.groups "
            f"{max(1, base.config.num_hidden_layers // 4)} (or train everything with --train.parameters all)"
        )
    return base, None


def resolve_device(config: RunConfig, base: PretrainedFolder, seq_len: int) -> tuple[torch.device, torch.dtype]:
    """Fill in device, dtype, attention backend and threads; switch on what `deterministic` needs.

    Raises:
        UserError: a device or backend asked for is not there.
    """
    train = config.train
    if train.device == "auto":
        train.device = "cuda" if torch.cuda.is_available() else "cpu"
    if train.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--train.device cuda: PyTorch sees no GPU here; install its CUDA build or use --train.device cpu"
        )
    device = torch.device(train.device)
    if device.type == "cuda":
        devices.expandable_segments()
    if train.dtype == "auto":
        train.dtype = "bfloat16" if device.type == "cuda" else "float32"
    dtype = DTYPES[train.dtype]
    if train.deterministic and device.type == "cuda":
        # cuBLAS reads this when it is first used; a workspace of its own per stream is what makes it repeat.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        train.attention = select_attention_backend(
            device,
            dtype,
            requested=train.attention,
            window=window_within(base.config, seq_len),
            head_dim=BlockSpec.from_config(base.config, 0).head_dim,
            deterministic=train.deterministic,
        )
    except ValueError as error:
        raise UserError(f"--train.attention: {error}") from error
    try:
        implementation_name(device, dtype)
    except ImportError as error:
        raise UserError(f"--train.device {train.device}: {error}") from error
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    train.threads = torch.get_num_threads()
    return device, dtype


def resolve_memory(
    config: RunConfig, base: PretrainedFolder, plan: ExpansionPlan | None, *, document: float | None
) -> str:
    """Fill in micro-batch and recomputation so that the run fits its device, and say why these.

    Args:
        base: the model of the recipe, before the expansion by ``plan``.
        document: tokens of a document on average. None before the text is known: what cannot fit whatever the text is
            refused, and nothing is filled in.

    Raises:
        UserError: it would not fit; what would is said.
    """
    train, manifest = config.train, Manifest.from_config(base.raw_config)
    shape, trained = base.config, () if manifest is None else manifest.trained_blocks
    if plan is not None:
        shape, trained = expanded_shape(base.config, plan), plan.new_indices
    job, device = _job(config, shape, trained, document or train.seq_len), _device(config)
    usable = device.usable if train.memory == "auto" else int(train.memory * GIB)
    try:
        recompute = None if train.recompute == "auto" else parse_recompute(train.recompute, job.classes)
    except UserError as error:
        raise UserError(f"--train.{error}") from error
    asked = {"micro_batch_size": train.micro_batch_size, "recompute": recompute}
    found = best_fit(job, device, batch_size=train.batch_size, usable=usable, **asked)
    if found is None:
        raise UserError(
            "--train.memory: "
            + shortfall(job, device, batch_size=train.batch_size, usable=usable, base=base.config, plan=plan, **asked)
        )
    reason = why(found, job, device, batch_size=train.batch_size, usable=usable, **asked)
    if document is None:
        return reason
    train.micro_batch_size, train.memory = found.micro_batch_size, round(usable / GIB, 2)
    train.recompute = recompute_text(found.recompute, job.first)
    return reason


def planned(config: RunConfig, folder: PretrainedFolder, *, document: float) -> Fit:
    """What the settings of a run should take, whatever device it now has."""
    manifest = Manifest.from_config(folder.raw_config)
    job = _job(config, folder.config, () if manifest is None else manifest.trained_blocks, document)
    return fit(
        job,
        _device(config),
        batch_size=config.train.batch_size,
        micro_batch_size=config.train.micro_batch_size,
        recompute=parse_recompute(config.train.recompute, job.classes),
        share=devices.SHARE,
    )


def planned_speed(config: RunConfig, planned: Fit) -> float | None:
    """Tokens per second, where the device's own speed is known."""
    return round(1 / planned.seconds, 1) if _device(config).speed_known else None


def _device(config: RunConfig) -> Device:
    return devices.present() if config.train.device == "cuda" else devices.cpu()


def _job(config: RunConfig, shape: Any, trained: Collection[int], document: float) -> Job:
    train = config.train
    return Job(
        config=shape,
        trained_blocks=tuple(trained),
        train_all=train.parameters == "all",
        dtype=DTYPES[train.dtype],
        seq_len=train.seq_len,
        document=document,
        attention=train.attention,
        triton=implementation_name(train.device, DTYPES[train.dtype]).startswith("triton"),
    )


def resolve_seq_len(config: RunConfig, base: PretrainedFolder) -> int:
    """Fill in the sequence length.

    Raises:
        UserError: longer than the model's positions, or angles that depend on the batch.
    """
    positions = base.config.max_position_embeddings
    if base.config.rope_parameters["rope_type"] == "dynamic":
        raise UserError(
            f"{base.path}: rope_type dynamic cannot be trained: its angles depend on the longest text of a batch, so a "
            "document's loss would depend on its neighbours; set rope_type to linear, yarn or llama3 in config.json"
        )
    seq_len = config.train.seq_len or min(positions, 4096)
    if seq_len > positions:
        raise UserError(f"--train.seq_len {seq_len}: the model has {positions} positions; give at most that many")
    if seq_len < 2:
        raise UserError("--train.seq_len 1: a token predicts the next one; give at least 2")
    config.train.seq_len = seq_len
    return seq_len


def resolve_length(config: RunConfig, sequences_in_epoch: int) -> int:
    """Fill in steps, warm-up, decay and the intervals of evaluation and checkpoints, and return the steps.

    Raises:
        UserError: the run is shorter than one step, or than its warm-up.
    """
    train, optim = config.train, config.optim
    per_step = train.batch_size * train.seq_len
    if train.steps is None and train.tokens is not None:
        train.steps = int(train.tokens // per_step)
        if train.steps < 1:
            raise UserError(
                f"--train.tokens {train.tokens:g}: one step takes {per_step:,} tokens; give at least that many"
            )
    if train.steps is None:
        train.steps = sequences_in_epoch // train.batch_size
        if train.steps < 1:
            raise UserError(
                f"one epoch has {sequences_in_epoch} sequences, fewer than --train.batch_size {train.batch_size}; "
                "give --train.steps, a smaller batch or more text"
            )
    _resolve_schedule(optim, train.steps)
    interval = max(1, min(500, train.steps // 10))
    train.checkpoint_every = train.checkpoint_every or interval
    config.eval.every = config.eval.every or interval
    return train.steps


def _resolve_schedule(optim: OptimConfig, steps: int) -> None:
    if optim.warmup_steps is None:
        optim.warmup_steps = round(0.06 * steps)
    if optim.warmup_steps > steps:
        raise UserError(f"--optim.warmup_steps {optim.warmup_steps}: longer than the run of {steps} steps; shorten it")
    if optim.decay_steps is None:
        optim.decay_steps = min(round(0.2 * steps), steps - optim.warmup_steps)
    if optim.schedule == "wsd" and optim.warmup_steps + optim.decay_steps > steps:
        raise UserError(
            f"--optim.decay_steps {optim.decay_steps}: with {optim.warmup_steps} of warm-up longer than the run of "
            f"{steps} steps; shorten it"
        )


def existing_model(output: Path) -> PretrainedFolder | None:
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


def make_model(
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
        for path in base.companions():
            # Files of the other tokenizer would be read before those of the new one.
            if tokenizer is None or path.match("generation_config.json") or path.match("[A-Z]*"):
                shutil.copyfile(path, partial / path.name)
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial)
