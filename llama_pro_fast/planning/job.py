"""What a plan is asked: a model as it will be trained (`Job`), on a device, with what is already decided (`Question`).

A run and the verb `plan` ask by the same function. They differ in what they know: a run has found its attention backend
and read its text; `plan` assumes both (:func:`assume`), and says so.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llama_pro_fast.config import RunConfig
from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.hf.families import block_spec, window_within
from llama_pro_fast.model.batch import padded_boundaries
from llama_pro_fast.model.decoder import DTYPES
from llama_pro_fast.model.policy import BlockClass, Recompute
from llama_pro_fast.model.spec import BlockSpec
from llama_pro_fast.model.trained import Trained
from llama_pro_fast.planning.cost import matrices, num_trained_parameters, transposed_matrices
from llama_pro_fast.planning.devices import GIB, Device
from llama_pro_kernels import select_attention_backend
from llama_pro_kernels.attention_selection import BACKENDS
from llama_pro_kernels.linear import E4M3_MULTIPLE

DOCUMENT = 512
"""Tokens of a document on average, until the text is known."""
TOKENS = 1e9
"""Length of a run that does not say its own."""
LETTERS = {Recompute.NONE: ".", Recompute.MLP: "m", Recompute.ALL_BUT_ATTENTION: "a", Recompute.BLOCK: "b"}
"""How a strip of blocks shows what each recomputes."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What of a run decides its memory and its work.

    Attributes:
        config: the model's transformers config, expanded if it will be.
        trained: which of its blocks train.
        dtype: of the computation.
        seq_len: tokens per sequence.
        attention: the attention backend's name.
        triton: whether the operations are Triton kernels or the reference in PyTorch.
        document: tokens of a document on average, before it is cut at a sequence's end.
        muon: whether matrices of blocks have Muon's one moment instead of AdamW's two.
        taught: share of the tokens on which the base teaches.
        shards: ranks over which trained blocks, their gradients and their moments are sharded.
        eight_bits: whether frozen blocks make backward's products in e4m3.
    """

    config: Any
    trained: Trained
    dtype: torch.dtype = torch.bfloat16
    seq_len: int = 4096
    attention: str = "flash"
    triton: bool = True
    document: float = DOCUMENT
    muon: bool = False
    taught: float = 0.0
    shards: int = 1
    eight_bits: bool = False

    @functools.cached_property
    def specs(self) -> list[BlockSpec]:
        return [block_spec(self.config, index) for index in range(self.config.num_hidden_layers)]

    @functools.cached_property
    def num_trained(self) -> int:
        return num_trained_parameters(self.config, self.trained)

    @property
    def num_in_blocks(self) -> int:
        """Parameters of blocks that train."""
        return len(self.trained.blocks) * self.specs[0].num_parameters()

    def held(self, count: int) -> int:
        """How many of ``count`` numbers, one or more for each trained parameter, are on a rank."""
        if self.shards == 1:
            return count
        in_blocks = count * self.num_in_blocks // self.num_trained
        return count - in_blocks + -(-in_blocks // self.shards)

    @property
    def num_moments(self) -> int:
        """Numbers that the optimizer keeps of what trains, on all ranks over which it is sharded."""
        in_matrices = len(self.trained.blocks) * sum(matrices(self.specs[0]).values())
        return 2 * self.num_trained - (in_matrices if self.muon else 0)

    @property
    def checkpoint_bytes(self) -> int:
        return 4 * (self.num_trained + self.num_moments)

    def documents(self, micro_batch_size: int) -> int:
        """How many a micro-batch has at most, empty ones that pad the boundaries included; a quarter above the mean."""
        pieces = 1.25 * micro_batch_size * self.seq_len / self.document + micro_batch_size
        return padded_boundaries(math.ceil(pieces) + 1) - 1

    def expanded(self, base: Any, plan: ExpansionPlan, *, everything: bool = False) -> Job:
        """The same of ``base`` expanded by ``plan``, whose new blocks train, or everything does."""
        trained = Trained.all_of(plan.num_layers) if everything else plan.trained
        return dataclasses.replace(self, config=expanded_shape(base, plan), trained=trained)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be planned.

    Attributes:
        job: the model as it will be trained.
        device: what it runs on.
        usable: bytes of it.
        batch_size: sequences per optimizer step, of each rank.
        ranks: processes that share a step, a device each.
        micro_batch_size, recompute: None where they are to be chosen.
        model: its name, as the user gave it.
        base, expansion: the config before the expansion, and how; None where the run makes none.
        tokens: length of the run.
        price: of an hour of the device, in the reader's currency; None leaves costs out.
        assumed: in words, what only a run can know.
    """

    job: Job
    device: Device
    usable: int
    batch_size: int
    ranks: int = 1
    micro_batch_size: int | None = None
    recompute: tuple[Recompute, ...] | None = None
    model: str = ""
    base: Any = None
    expansion: ExpansionPlan | None = None
    tokens: float = TOKENS
    price: float | None = None
    assumed: str = ""


def ask(
    config: RunConfig,
    base: Any,
    trained: Trained,
    expansion: ExpansionPlan | None,
    device: Device,
    *,
    triton: bool,
    document: float | None = None,
    price: float | None = None,
    assumed: str = "",
) -> Question:
    """The question that a run puts, or a command line of `plan`.

    Args:
        config: with sequence length, dtype and attention settled or assumed.
        base: transformers' config of the model, before the expansion where the run makes one.
        trained: what trains of the model as it will be.
        document: tokens of a document on average; None before the text is known.

    Raises:
        UserError: the recomputation asked for is not of this model; there is nothing to make in eight bits, or the
            device cannot.
    """
    train = config.train
    if train.fp8 == "backward":
        if BlockClass.FROZEN not in trained.classes:
            raise UserError(
                "--train.fp8 backward: no frozen block lies above the lowest one that trains, so there is no product "
                "to make in eight bits; give --train.fp8 none"
            )
        if not transposed_matrices(block_spec(base, 0), BlockClass.FROZEN):
            raise UserError(
                f"--train.fp8 backward: of this model's matrices none has two sides that are multiples of "
                f"{E4M3_MULTIPLE}; give --train.fp8 none"
            )
        if not device.eight_bits:
            raise UserError(
                f"--train.fp8 backward: {device.title} does not multiply eight-bit floats, which Ada, Hopper and later "
                "cards do; give --train.fp8 none"
            )
        if train.dtype != "bfloat16" and not device.is_cpu:
            raise UserError(
                f"--train.fp8 backward: a card's eight-bit products come out in bfloat16, and --train.dtype is "
                f"{train.dtype}; give --train.dtype bfloat16, or --train.fp8 none"
            )
    job = Job(
        config=base if expansion is None else expanded_shape(base, expansion),
        trained=trained,
        dtype=DTYPES[train.dtype],
        seq_len=train.seq_len,
        attention=train.attention,
        triton=triton,
        document=document or DOCUMENT,
        muon=config.optim.name == "muon",
        taught=_taught(config),
        shards=train.shards,
        eight_bits=train.fp8 == "backward",
    )
    per_step = train.batch_size * train.seq_len
    return Question(
        job=job,
        device=device,
        usable=device.usable if train.memory == "auto" else int(train.memory * GIB),
        batch_size=train.batch_size // train.ranks,
        ranks=train.ranks,
        micro_batch_size=train.micro_batch_size,
        recompute=None if train.recompute == "auto" else parse_recompute(train.recompute, trained.classes),
        model=config.model.path,
        base=base,
        expansion=expansion,
        tokens=train.tokens or (train.steps or 0) * per_step or TOKENS,
        price=price,
        assumed=assumed,
    )


def _taught(config: RunConfig) -> float:
    """Share of a step's tokens on which the base teaches: replay, or the general sources' shares; half where these have
    weights, whose share only the text tells."""
    given = config.data.general if isinstance(config.data.general, list) else []
    shares = sum(source.share or 0.0 for source in given)
    return (config.data.replay or shares or 0.5) if config.train.kl_weight else 0.0


def assume(config: RunConfig, model: Any, device: Device, *, here: bool) -> tuple[RunConfig, str]:
    """``config`` with what a run on ``device`` would settle: sequence length, dtype and attention backend.

    By default bfloat16, and on a CPU float32. The backend is the one a run would take, or where the device is not here
    PyTorch's flash attention.

    Returns:
        The configuration, and in words what of it only a run can know.

    Raises:
        UserError: the sequence is longer than the model allows, or the backend asked for is not of this device.
    """
    train, seq_len = config.train, sequence_length(config, model)
    dtype = train.dtype if train.dtype != "auto" else "float32" if device.is_cpu else "bfloat16"
    attention, kind, assumed = train.attention, "cpu" if device.is_cpu else "cuda", []
    if here or device.is_cpu:
        attention = attention_backend(config, model, torch.device(kind), dtype, seq_len)
    elif attention == "auto":
        attention = "reference" if dtype == "float32" else "flash"
        assumed.append(f"attention {attention}")
    elif attention not in BACKENDS or BACKENDS[attention].device not in (kind, None):
        served = [name for name, backend in BACKENDS.items() if backend.device in (kind, None)]
        raise UserError(f"--train.attention {attention}: is not for {device.title}; give auto, {', '.join(served)}")
    train = dataclasses.replace(train, seq_len=seq_len, dtype=dtype, attention=attention)
    assumed.append(f"documents of {DOCUMENT} tokens on average")
    return dataclasses.replace(config, train=train), ", ".join(assumed)


def attention_backend(config: RunConfig, model: Any, device: torch.device, dtype: str, seq_len: int) -> str:
    """The attention backend of a run on a device that is here.

    Raises:
        UserError: the one asked for is not there, or cannot do what the model or the run needs.
    """
    try:
        return select_attention_backend(
            device,
            DTYPES[dtype],
            requested=config.train.attention,
            window=window_within(model, seq_len),
            head_dim=block_spec(model, 0).head_dim,
            deterministic=config.train.deterministic,
        )
    except ValueError as error:
        raise UserError(f"--train.attention: {error}") from error


def sequence_length(config: RunConfig, model: Any) -> int:
    """Tokens per sequence: as the recipe says, else the model's positions, at most 4096.

    Raises:
        UserError: longer than the model's positions, or angles that depend on the batch.
    """
    positions = model.max_position_embeddings
    if model.rope_parameters["rope_type"] == "dynamic":
        raise UserError(
            f"{config.model.path}: rope_type dynamic cannot be trained: its angles depend on the longest text of a "
            "batch, so a document's loss would depend on its neighbours; set rope_type to linear, yarn or llama3 in "
            "config.json"
        )
    seq_len = config.train.seq_len or min(positions, 4096)
    if seq_len > positions:
        raise UserError(
            f"--train.seq_len {seq_len}: {config.model.path} has {positions} positions; give at most that many"
        )
    if seq_len < 2:
        raise UserError("--train.seq_len 1: a token predicts the next one; give at least 2")
    return seq_len


def expanded_shape(config: Any, plan: ExpansionPlan) -> Any:
    """The config of ``config``'s model expanded by ``plan``, as far as blocks' shapes go."""
    changed = copy.deepcopy(config)
    changed.num_hidden_layers = plan.num_layers
    if getattr(config, "layer_types", None) is not None:
        changed.layer_types = [config.layer_types[source] for source in plan.sources]
    return changed


def recompute_text(recompute: Sequence[Recompute], first: int) -> str:
    """A policy's name where all blocks with a backward share it, else a strip of :data:`LETTERS`, a letter a block."""
    above = set(recompute[first:])
    return above.pop().value if len(above) == 1 else "".join(LETTERS[policy] for policy in recompute)


def parse_recompute(text: str, classes: Sequence[BlockClass]) -> tuple[Recompute, ...]:
    """The inverse of :func:`recompute_text`.

    Raises:
        UserError: neither a policy's name nor a letter for each block.
    """
    names = {policy.value: policy for policy in Recompute}
    if text in names:
        return tuple(Recompute.NONE if kind is BlockClass.PREFIX else names[text] for kind in classes)
    by_letter = {letter: policy for policy, letter in LETTERS.items()}
    if len(text) != len(classes) or not set(text) <= set(by_letter):
        raise UserError(
            f"--train.recompute {text}: give auto, {', '.join(names)}, or a letter for each of the {len(classes)} "
            "blocks: " + ", ".join(f"{letter} {policy.value}" for letter, policy in by_letter.items())
        )
    return tuple(by_letter[letter] for letter in text)
