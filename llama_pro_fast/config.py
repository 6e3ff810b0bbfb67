"""Everything a recipe can say, as dataclasses: one field, one option of the command line, one key of the YAML file.

A value is never changed: what a run fills in makes a new one, in the end :class:`Settled`, which is written to the
run's folder and is what ``--resume`` reads.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from llama_pro_fast.errors import UserError


@dataclass(frozen=True)
class Bounds:
    """What a number must satisfy, and what is said of one that does not."""

    holds: Callable[[float], bool]
    otherwise: str


ABOVE_0 = Bounds(lambda value: 0 < value < math.inf, "is not a number above 0")
SEED = Bounds(lambda value: 0 <= value < 2**63, "is not a number from 0 up to 2^63")
SEQUENCES = Bounds(lambda value: 0 < value <= 2**20, "is not a number above 0, and at most 2^20")
THREADS = Bounds(lambda value: 0 < value <= 1024, "is not a number above 0, and at most 1024")
GIBIBYTES = Bounds(lambda value: 0 < value < 2**30, "is not a number of GiB above 0")
NOT_BELOW_0 = Bounds(lambda value: 0 <= value < math.inf, "is not a number from 0 up")
BELOW_1 = Bounds(lambda value: 0 <= value < 1, "is not between 0 and 1 (1 excluded)")
RATIO = Bounds(lambda value: 0 <= value <= 1, "is not between 0 and 1")
BETWEEN_0_AND_1 = Bounds(lambda value: 0 < value < 1, "is not between 0 and 1 (both excluded)")


LARGEST_NUMBER = sys.float_info.max


def number(default: Any, bounds: Bounds) -> Any:
    """A field with bounds, which None and ``auto`` do not have to satisfy."""
    return field(default=default, metadata={"bounds": bounds})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained."""

    path: str | None = None
    """Folder of a Llama-family checkpoint (config.json, safetensors, tokenizer), a hub id, or
    `builtin:prose-3m`, the small base in the package."""

    init: Literal["pretrained", "random"] = "pretrained"
    """`random` draws fresh weights for the architecture in config.json: training a base from scratch."""

    tokenizer: Literal["pretrained", "train"] = "pretrained"
    """`train`, for random weights: a byte-level BPE of the config's vocabulary size, from the training text."""


@dataclass(frozen=True, kw_only=True)
class ExpandConfig:
    """Where the new blocks go. Leave all empty for a model that is already expanded."""

    groups: int | None = None
    """N: cut the L blocks into N groups, balanced when N does not divide L; new blocks end each (paper 3.2)."""

    copies: int = number(1, ABOVE_0)
    """P: new blocks per group, copies of the group's last P blocks."""

    after: list[int] | str | None = None
    """Instead of `groups`: the base's block numbers (from 0) that are followed by new blocks, `3,7,11` or a list."""

    @property
    def wanted(self) -> bool:
        """Whether the recipe asks for an expansion."""
        return self.groups is not None or self.after is not None


@dataclass(frozen=True, kw_only=True)
class Source:
    """One place text comes from."""

    path: str
    """A file, a folder, a pattern such as `crawl/*.jsonl.gz`, a data set of the hub, an address that fsspec opens
    (`s3://...`), `stdlib:code` or `stdlib:prose`."""

    weight: float | None = number(None, NOT_BELOW_0)
    """How often each document stands in an epoch: at 1.5 once, and every other one a second time. Default: 1 for
    `domain`; 0 for `general`, which is then only measured."""

    share: float | None = number(None, BETWEEN_0_AND_1)
    """Instead of a weight: this source's share of the tokens of every step."""

    text: str = "text"
    """The column that holds the text (jsonl, json, csv, parquet, arrow)."""

    subset: str | None = None
    """Of a data set of the hub: its subset (configuration)."""

    split: str | None = None
    """Of a data set of the hub, or of a folder that holds several splits: which one; by default `train`."""

    split_by: str | None = None
    """A column whose value decides whether a row trains or is held out, so that rows of one value (a repository, a
    book) are never on both sides. Default: the row's text."""

    name: str | None = None
    """How reports call it; by default the file's name without ending."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text."""

    domain: str | list[Source] | None = None
    """What to learn: a path, or a list of sources."""

    general: str | list[Source] | None = None
    """What not to forget: a path, or a list of sources. Without one the built-in prose (`stdlib:prose`) is measured."""

    replay: float = number(0.0, BELOW_1)
    """Share of the tokens of every step that comes from the general sources, which are then trained on too."""

    packing: Literal["best_fit", "concat"] = "best_fit"
    """`best_fit` cuts no document that fits a sequence; `concat` lays documents end to end and cuts every sequence."""

    held_out: float = number(0.02, BETWEEN_0_AND_1)
    """Share of the documents kept out of training for evaluation, chosen by a hash of the document."""

    max_bad_share: float = number(0.01, RATIO)
    """Rows that cannot be read are left out and counted; more than this share of a source's rows is refused."""

    drop_duplicates: bool = False
    """Leave out the documents of a source that repeat one before them, character for character."""

    special_tokens: Literal["text", "tokens"] = "text"
    """What the names of control tokens are where they stand in a text: `text`, or the `tokens` themselves. The
    end-of-text token's name ends a document in both."""

    workers: int | None = number(None, THREADS)
    """Processes that tokenise; by default one for each CPU."""

    cache: str | None = None
    """Where tokens are kept between runs; by default `llama-pro-fast` in the user's cache folder."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon`: orthogonalised momentum for matrices, which needs one moment instead of two, and AdamW for the rest. Its
    updates are scaled to the root mean square of AdamW's, so a rate means about the same in both. Its momentum is 0.95;
    `beta1`, `beta2` and `eps` are AdamW's alone."""

    lr: float | None = number(None, ABOVE_0)
    """Peak learning rate. There is no default: it depends on the base. The paper: 2e-4 for LLaMA-2-7B, 2e-5 for
    Mistral-7B; modern bases want the lower end."""

    schedule: Literal["cosine", "wsd"] = "cosine"
    """`cosine` decays from the end of the warm-up; `wsd` (warmup-stable-decay) holds, then decays linearly."""

    warmup_steps: int | None = number(None, NOT_BELOW_0)
    """Steps of linear warm-up; by default 6 % of the run (the paper's share)."""

    decay_steps: int | None = number(None, NOT_BELOW_0)
    """`wsd` only: length of the final decay; by default 20 % of the run."""

    min_lr_ratio: float = number(0.0, RATIO)
    """What the learning rate decays towards, as a share of `lr`."""

    weight_decay: float = number(0.1, NOT_BELOW_0)
    """Decoupled weight decay of matrices; norms, biases and embeddings have none."""

    beta1: float = number(0.9, BELOW_1)
    beta2: float = number(0.95, BELOW_1)
    eps: float = number(1e-8, ABOVE_0)

    clip: float = number(1.0, ABOVE_0)
    """Largest global gradient norm."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run itself."""

    parameters: Literal["new_blocks", "all", "blocks"] = "new_blocks"
    """`new_blocks`: the blocks the checkpoint's manifest names, nothing else. `all`: every parameter. `blocks`: the
    model's own blocks that `train.blocks` names; the base is then not kept."""

    blocks: list[int] | str | None = None
    """With `train.parameters blocks`: block numbers from 0, `24,25,26` or a list."""

    kl_weight: float = number(0.0, NOT_BELOW_0)
    """Of KL(base ‖ now) on the general text of every step, which is added to its loss: the base is the teacher where it
    should not be forgotten. Needs `data.replay`, and new blocks that train."""

    steps: int | None = number(None, ABOVE_0)
    """Optimizer steps. Give this or `tokens`; with neither the run is one epoch."""

    tokens: float | None = number(None, ABOVE_0)
    """Length in tokens, rounded down to whole steps."""

    seq_len: int | None = number(None, ABOVE_0)
    """Tokens per sequence; by default the model's positions, at most 4096."""

    batch_size: int = number(16, SEQUENCES)
    """Sequences per optimizer step."""

    micro_batch_size: int | None = number(None, SEQUENCES)
    """Sequences per forward and backward; divides `batch_size`. By default what fits `memory` and should be fastest."""

    recompute: str = "auto"
    """What blocks recompute in backward instead of keeping: `none`, `mlp`, `all_but_attention` or `block` for all, or a
    letter for each block (`.`, `m`, `a`, `b`). `auto`: as little as fits `memory`."""

    memory: float | Literal["auto"] = number("auto", GIBIBYTES)
    """GiB the run may take on its device; `auto` is what is free there, with something to spare. A run that needs more
    is refused before it loads anything."""

    seed: int = number(0, SEED)
    """Seeds the order of the data and random initial weights."""

    device: Literal["auto", "cpu", "cuda"] = "auto"

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation: bfloat16 on a GPU, float32 on a CPU. Trained weights are always kept in float32."""

    fp8: Literal["none", "backward"] = "none"
    """`backward`: frozen blocks pass the gradient on by products in eight bits (e4m3), for which each of their matrices
    is kept once more in eight bits. Forward, and so every loss and the export, is computed as without. For Ada, Hopper
    and later; a CPU only imitates it."""

    attention: str = "auto"
    """Attention backend; `auto` takes the preferred one that is installed and can serve."""

    deterministic: bool = False
    """Bit-equal repeats on a GPU, at some cost in speed. A CPU repeats bit for bit anyway."""

    threads: int | None = number(None, THREADS)
    """CPU threads; by default what PyTorch chooses."""

    ranks: int = number(1, THREADS)
    """Processes that share every step, a device each: in a plan what is planned for, in a run what torchrun has
    started."""

    sharding: Literal["auto", "replicate", "trained"] = "auto"
    """Of several ranks. `replicate`: all weights are on each, and gradients are sent once a step. `trained`: the blocks
    that train are sharded over them, with gradients and moments. `auto`: the first where that fits."""

    log_every: int = number(10, ABOVE_0)
    """Steps between two lines of log."""

    checkpoint_minutes: float = number(30, ABOVE_0)
    """Minutes between two checkpoints. The last step is always one."""

    checkpoint_every: int | None = number(None, ABOVE_0)
    """Steps between two checkpoints, should these be less than `checkpoint_minutes`."""

    keep_checkpoints: int = number(2, ABOVE_0)
    """How many checkpoints stay on disk."""

    max_bad_steps: int = number(10, ABOVE_0)
    """A step whose loss or gradient is not finite is left out; after so many in a row the run stops."""

    wandb: str | None = None
    """Project of Weights & Biases to log to, beside metrics.jsonl and TensorBoard. Needs the extra `wandb`; without a
    network set WANDB_MODE=offline."""

    @property
    def shards(self) -> int:
        """Over how many ranks what trains is sharded."""
        return self.ranks if self.sharding == "trained" else 1


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Measuring, on held-out text."""

    every: int | None = number(None, ABOVE_0)
    """Steps between two evaluations; by default a tenth of the run, at most 500. There is always one before the first
    step and one after the last."""

    tokens: int | None = number(None, ABOVE_0)
    """At most this many held-out tokens per source; by default 65,536, in a short run as many as let it measure no more
    than it trains."""


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """When a run ends before its last step, saved and exported: asked at each evaluation, of every general text."""

    kl_above: float | None = number(None, ABOVE_0)
    """KL(base ‖ now) above this, in nats per token."""

    general_rise: float | None = number(None, ABOVE_0)
    """The loss above the base's by more than this, in nats per token."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run of `llama-pro-fast train`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    expand: ExpandConfig = field(default_factory=ExpandConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    stop: StopConfig = field(default_factory=StopConfig)

    output: str | None = None
    """The run's folder."""


MAY_STAY_OPEN = (
    "expand.groups",
    "expand.after",
    "data.general",
    "data.cache",
    "data.workers",
    "train.blocks",
    "train.tokens",
    "train.sharding",
    "train.checkpoint_every",
    "train.wandb",
    "stop.kl_above",
    "stop.general_rise",
)
"""Keys that a settled run may leave empty, or `auto`."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A key that was given another value when the run was resumed at ``step``."""

    step: int
    key: str
    before: Any
    after: Any


@dataclass(frozen=True, kw_only=True)
class Settled(RunConfig):
    """A run's configuration with nothing left open: what it computes with, and the content of its config.yaml.

    Raises:
        UserError: a key is still open, or out of its bounds.
    """

    history: list[Change] = field(default_factory=list)
    """What was changed when the run was resumed, oldest first."""

    def __post_init__(self) -> None:
        for key, value, _ in options(self):
            if value in (None, "auto") and key not in MAY_STAY_OPEN:
                raise UserError(f"{key} is not settled; give it a value")
        check_values(self)
        check_micro_batch(self.train)


def options(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """``(key, value, field)`` of every option, section by section; keys are dotted."""
    for each in fields(config):
        value, key = getattr(config, each.name), prefix + each.name
        if is_dataclass(value):
            yield from options(value, f"{key}.")
        else:
            yield key, value, each


def check_values(config: Any, prefix: str = "") -> None:
    """Every value of a configuration, or of its section ``prefix``, of its field's type and within its bounds.

    Raises:
        UserError: naming the option.
    """
    hints = get_type_hints(type(config))
    for each in fields(config):
        value, key = getattr(config, each.name), prefix + each.name
        if is_dataclass(hints[each.name]):
            if not isinstance(value, hints[each.name]):
                raise UserError(f"{key}: {value!r:.60} is no section; give its keys")
            check_values(value, f"{key}.")
            continue
        if not _is_of(value, hints[each.name]):
            wanted = _in_words(hints[each.name])
            hint = "; in YAML one with an exponent needs a point, 1.0e-3" if "number" in wanted else ""
            raise UserError(f"--{key}: {value!r:.60} is not {wanted}{hint if isinstance(value, str) else ''}")
        for row in value if isinstance(value, list) else ():
            if is_dataclass(row):
                check_values(row, f"{key}: ")
        bounds = each.metadata.get("bounds")
        if bounds is not None and value not in (None, "auto") and not bounds.holds(value):
            raise UserError(f"--{key}: {value} {bounds.otherwise}")


def check_micro_batch(train: TrainConfig) -> None:
    """A step is whole micro-batches, as many for each rank.

    Raises:
        UserError: it is not.
    """
    micro, ranks, batch = train.micro_batch_size or 1, train.ranks, train.batch_size
    if batch % ranks:
        raise UserError(
            f"--train.batch_size {batch}: {ranks} processes cannot share it evenly; give a multiple of {ranks}, or "
            "start another number of them"
        )
    if batch // ranks % micro:
        whole = f"--train.batch_size {batch}"
        if ranks > 1:
            whole = f"{batch // ranks}, what each of {ranks} processes has of {whole}"
        raise UserError(f"--train.micro_batch_size: {micro} does not divide {whole}; give a divisor, or leave it out")


def _is_of(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_is_of(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(
            _is_of(part, kind) for pair in value.items() for part, kind in zip(pair, get_args(hint), strict=True)
        )
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_is_of(part, get_args(hint)[0]) for part in value)
    if hint is Any:
        return True
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER
    return isinstance(value, hint)


def _in_words(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_in_words(part) for part in get_args(hint) if part is not NoneType)
    if get_origin(hint) is Literal:
        return " or ".join(get_args(hint))
    if get_origin(hint) is dict:
        return "a section"
    if get_origin(hint) is list:
        return f"a list ({_in_words(get_args(hint)[0])})"
    words = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        Source: "a Source",
        Change: "a Change",
    }
    return words[hint]
