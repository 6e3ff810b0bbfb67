"""The proof that an expanded checkpoint computes what its base computes. It believes only files, read anew:

1. every tensor of the base is there, byte for byte; a new block's tensors are byte-equal to those of the block it
   copies, or all zero; there is none beside them; and the config describes every block as it describes its source;
2. block by block, on real text and in the checkpoint's dtype, every new block gives back its input (`torch.equal`).
   Old blocks have the same bytes and so, by induction over depth, the same input and output as in the base: the final
   hidden states are equal, and so are the logits;
3. where memory allows, the whole of it once more in stock transformers: the two models' logits, `torch.equal`.

1 and 2 hold one block in memory at a time, so a model of any size is proved.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
import transformers

from llama_pro_fast.digests import combined_digest
from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion.manifest import Manifest
from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.expansion.rewrite import Progress, block_tensor_name, split_name, write_expanded
from llama_pro_fast.files import new_folder
from llama_pro_fast.hf.config import CONFIG_FILE, ROPE_KEYS, rope_of
from llama_pro_fast.hf.families import block_spec, window_within
from llama_pro_fast.hf.folder import PretrainedFolder, no_progress_bars
from llama_pro_fast.hf.loading import EMBEDDING, load_block, load_embedding, rotary_tables
from llama_pro_fast.hf.safetensors import TORCH_DTYPES
from llama_pro_fast.host import available_memory
from llama_pro_fast.model.batch import BlockContext, PackedBatch
from llama_pro_kernels import select_attention_backend

PASSAGES = (
    "The harbour town lies where two rivers meet. In winter the ferries stop before noon, because the ice that "
    "drifts down from the northern valley piles up against the piers; then letters wait on the far bank "
    "for a day or two, and nobody minds. The baker's daughter once skated across with the post and was scolded by "
    "the whole street.",
    "def running_mean(values, width):\n"
    '    """Mean of each window of `width` neighbouring values."""\n'
    "    total = sum(values[:width])\n"
    "    means = [total / width]\n"
    "    for left, right in zip(values, values[width:]):\n"
    "        total += right - left\n"
    "        means.append(total / width)\n"
    "    return means\n",
    "Let $n$ be odd, so $n = 2k + 1$. Then $n^2 = 4k(k + 1) + 1$, and one of $k$, $k + 1$ is even; "
    "therefore $n^2 \\equiv 1 \\pmod 8$.",
)
RANDOM_LENGTHS = (64, 48, 32)


class IdentityError(UserError):
    """The expanded checkpoint is not its base; the message says where."""


@dataclass(frozen=True)
class IdentityProof:
    """What was compared and found equal.

    Attributes:
        old_tensors: tensors of the base, byte-identical.
        copied_tensors: tensors of new blocks byte-identical to their source.
        zeroed_tensors: tensors of new blocks that are all zero.
        new_blocks: blocks whose output was bit for bit their input.
        dtype: of the checkpoint and of the computation.
        tokens: how many tokens of text the blocks saw.
        random_ids: why the tokens were seeded random ids and not text, or None.
        max_logit_difference: max |Δlogit| between base and expanded model in stock transformers: 0.0, or None when
            the models were not loaded whole.
        logits_skipped: why they were not, or None.
    """

    old_tensors: int
    copied_tensors: int
    zeroed_tensors: int
    new_blocks: int
    dtype: torch.dtype
    tokens: int
    random_ids: str | None
    max_logit_difference: float | None
    logits_skipped: str | None

    def summary(self) -> str:
        """The proof in one line."""
        logits = "not computed whole" if self.logits_skipped else f"max |Δlogit| = {self.max_logit_difference}"
        return (
            f"{self.old_tensors} tensors of the base byte-identical, {self.new_blocks} new blocks return their input "
            f"bit for bit, {logits}"
        )


def expand_and_prove(
    base: PretrainedFolder, out: str | os.PathLike[str], plan: ExpansionPlan, *, progress: Progress | None = None
) -> IdentityProof:
    """Write ``base``, expanded by ``plan``, to the new folder ``out``, which comes into being only once it is proved.

    Raises:
        UserError: the base is damaged, ``out`` is there already or cannot be written, or the disk is too small.
        IdentityError: the proof fails.
    """
    with new_folder(out) as partial:
        write_expanded(base, partial, plan, progress=progress)
        return prove_identity(base, PretrainedFolder(partial), progress=progress)


def prove_identity(
    base: PretrainedFolder, expanded: PretrainedFolder, *, progress: Progress | None = None
) -> IdentityProof:
    """Prove that ``expanded``, made from ``base`` by its newest generation of new blocks, is the same function.

    Raises:
        IdentityError: it is not.
        UserError: a file is damaged.
    """
    manifest = Manifest.from_config(expanded.raw_config)
    if manifest is None:
        raise IdentityError(f"{expanded.path / CONFIG_FILE}: not an expanded model")
    old, copied, zeroed = _prove_files(base, expanded, manifest, progress)
    dtype = TORCH_DTYPES[base.entries[EMBEDDING].dtype]
    documents, random_ids = _documents(base)
    batch = PackedBatch.from_documents(documents)
    _prove_blocks(expanded, manifest, batch, dtype, progress)

    needed, available = sum(entry.num_bytes for entry in expanded.entries.values()), available_memory()
    difference = skipped = None
    if 2 * needed < available:
        difference = _prove_logits(base, expanded, documents, dtype)
    else:
        skipped = f"{needed / 1e9:,.1f} GB of weights, {available / 1e9:,.1f} GB of memory free"
    return IdentityProof(
        old_tensors=old,
        copied_tensors=copied,
        zeroed_tensors=zeroed,
        new_blocks=len(manifest.trained_blocks),
        dtype=dtype,
        tokens=len(batch.input_ids),
        random_ids=random_ids,
        max_logit_difference=difference,
        logits_skipped=skipped,
    )


def _prove_files(
    base: PretrainedFolder, expanded: PretrainedFolder, manifest: Manifest, progress: Progress | None
) -> tuple[int, int, int]:
    for key, value in base.raw_config.items():
        if "layer" not in key and key not in ("_name_or_path", "block_expansion", *ROPE_KEYS):
            _require(expanded.raw_config.get(key) == value, expanded, CONFIG_FILE, f"{key} is not the base's")
    # One rotation may be written in several ways; what counts is what transformers reads.
    same_angles = rope_of(expanded.config) == rope_of(base.config)
    _require(same_angles, expanded, CONFIG_FILE, "its rotation (rope_theta, rope_scaling, …) is not the base's")

    new = {row.index: row for row in manifest.new_blocks if row.index in manifest.trained_blocks}
    old_indices = [index for index in range(expanded.config.num_hidden_layers) if index not in new]
    depth = base.config.num_hidden_layers
    _require(len(old_indices) == depth, expanded, CONFIG_FILE, f"not {depth} old blocks, the base's number")
    sources = {index: block for block, index in enumerate(old_indices)} | {i: row.copy_of for i, row in new.items()}

    for index, source in sources.items():
        # No text of the proof is as long as a window: what a block attends to must be read.
        specs = block_spec(expanded.config, index), block_spec(base.config, source)
        _require(specs[0] == specs[1], expanded, CONFIG_FILE, f"block {index} is not described as the base's {source}")

    origins: dict[str, tuple[str, bool, bool]] = {}  # name -> the base's name, is a copy, is zeroed
    for name in base.entries:
        if (split := split_name(name)) is None:
            origins[name] = (name, False, False)
            continue
        block, rest = split
        for index, source in sources.items():
            if source == block:
                zero = index in new and rest.rpartition(".")[0] in new[index].zeroed
                origins[block_tensor_name(index, rest)] = (name, index in new, zero)
    for name in origins.keys() ^ expanded.entries.keys():
        raise IdentityError(f"{expanded.path}: {name} is {'missing' if name in origins else 'one tensor too many'}")

    total = sum(entry.num_bytes for entry in expanded.entries.values())
    counts, digests, done = {"old": 0, "copied": 0, "zeroed": 0}, {}, 0
    for name, entry in expanded.entries.items():
        source, is_copy, is_zero = origins[name]
        original = base.entries[source]
        _require(
            (entry.dtype, entry.shape) == (original.dtype, original.shape), expanded, name, "another type or shape"
        )
        if is_zero:
            zeros = not any(np.frombuffer(piece, np.uint8).any() for piece in expanded.read_bytes(name))
            _require(zeros, expanded, name, "a new block's output projection is not zero")
        else:
            if source not in digests:
                digests[source] = base.digest(source)
            _require(expanded.digest(name) == digests[source], expanded, name, f"not the bytes of the base's {source}")
        counts["zeroed" if is_zero else "copied" if is_copy else "old"] += 1
        done += entry.num_bytes
        if progress:
            progress("comparing files", done, total)
    made_from = manifest.generations[-1].digest
    _require(
        combined_digest(digests) == made_from, expanded, CONFIG_FILE, "its manifest has another digest of the base"
    )
    return counts["old"], counts["copied"], counts["zeroed"]


@torch.no_grad()
def _prove_blocks(
    expanded: PretrainedFolder, manifest: Manifest, batch: PackedBatch, dtype: torch.dtype, progress: Progress | None
) -> None:
    depth = expanded.config.num_hidden_layers
    tables = rotary_tables(expanded.config, batch.max_seqlen)
    backend = select_attention_backend(
        "cpu",
        dtype,
        window=window_within(expanded.config, batch.max_seqlen),
        head_dim=block_spec(expanded.config, 0).head_dim,
    )
    context = BlockContext.for_batch(batch, rotary_tables=tables, attention=backend)
    x = load_embedding(expanded, dtype=dtype)(batch.input_ids)
    for index in range(depth):
        y = load_block(expanded, index, dtype=dtype)(x, context)
        identical = index not in manifest.trained_blocks or torch.equal(x, y)
        if not torch.isfinite(y).all():
            raise _overflow(expanded, f"what block {index} computes", dtype)
        _require(identical, expanded, f"block {index}", "its output is not its input")
        x = y
        if progress:
            progress("running blocks", index + 1, depth)


def _prove_logits(
    base: PretrainedFolder, expanded: PretrainedFolder, documents: list[list[int]], dtype: torch.dtype
) -> float:
    before, after = (_logits(folder, documents, dtype) for folder in (base, expanded))
    if not all(torch.isfinite(logits).all() for logits in before):
        raise _overflow(base, "the logits", dtype)
    difference = max(float((a.double() - b.double()).abs().max()) for a, b in zip(before, after, strict=True))
    equal = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    _require(equal, expanded, "logits", f"max |Δlogit| is {difference}, not 0.0, in stock transformers ({dtype})")
    return difference


@torch.no_grad()
def _logits(folder: PretrainedFolder, documents: list[list[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    with no_progress_bars():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder.path, dtype=dtype).eval()
    for parameter in model.parameters():
        # Loading maps the files, and a CPU product may round otherwise where its weights start off a cache line: two
        # folders would differ by where their tensors happen to lie. A copy of one's own is aligned.
        parameter.data = parameter.data.clone()
    return [model(input_ids=torch.tensor([document]), use_cache=False).logits for document in documents]


def _documents(base: PretrainedFolder) -> tuple[list[list[int]], str | None]:
    longest = base.config.max_position_embeddings
    try:
        tokenizer = base.tokenizer()
    except UserError as error:
        generator = torch.Generator().manual_seed(0)
        lengths = [min(length, longest) for length in RANDOM_LENGTHS]
        documents = [torch.randint(base.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
        return documents, str(error)
    return [tokenizer(passage)["input_ids"][:longest] for passage in PASSAGES], None


def _overflow(folder: PretrainedFolder, what: str, dtype: torch.dtype) -> UserError:
    # The weights are finite: that was looked at when they were read.
    remedy = (
        "the base needs a wider one, convert its weights to bfloat16 or float32"
        if dtype == torch.float16
        else "weights of the base are too large, take another copy of it"
    )
    return UserError(f"{folder.path}: {what} is not finite in {dtype}, the checkpoint's; {remedy}")


def _require(holds: bool, folder: PretrainedFolder, what: str, otherwise: str) -> None:
    if not holds:
        raise IdentityError(
            f"{folder.path}: the expanded model is not its base: {what}: {otherwise}; nothing was kept, "
            "check the disk and expand again"
        )
