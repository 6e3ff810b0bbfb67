"""Block expansion (LLaMA Pro, arXiv 2401.02415, section 3.2): where new blocks go, and the rewrite of a checkpoint.

L blocks are cut into N groups; after each group stand P copies of the group's last P blocks. A copy whose output
projections are zero adds nothing to the residual stream, so the expanded model computes what its base computes:

    y = s + down_proj(·) = s + 0,   s = x + o_proj(·) = x + 0        hence y = x, bit for bit

Everything else in a copy, both norms included, is kept: were a norm's weight zero instead, the gated FFN would have no
gradient either and never start to learn (paper, appendix A).

:class:`ExpansionPlan` says where, :class:`~llama_pro_fast.manifest.Manifest` is its record in ``config.json``,
:func:`write_expanded` moves the bytes from file to file, a few megabytes at a time.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_pro_fast.config import ExpandConfig
from llama_pro_fast.errors import UserError
from llama_pro_fast.manifest import MANIFEST_KEY, ZEROED, Manifest, ModelId
from llama_pro_fast.model import check_tensors
from llama_pro_fast.pretrained import (
    CHUNK_BYTES,
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    PretrainedFolder,
    TensorEntry,
    combined_digest,
    write_header,
)
from llama_pro_fast.trained import Trained

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is (bytes, or blocks)."""

# The number must end at a dot: "model.layers.2" is also how 20 to 29 begin.
_BLOCK_TENSOR = re.compile(r"model\.layers\.(\d+)\.(.+)")


def split_name(name: str) -> tuple[int, str] | None:
    """``model.layers.12.mlp.up_proj.weight`` -> ``(12, "mlp.up_proj.weight")``; None outside the blocks."""
    match = _BLOCK_TENSOR.fullmatch(name)
    return match and (int(match[1]), match[2])


def block_tensor_name(index: int, rest: str) -> str:
    return f"model.layers.{index}.{rest}"


# -- the plan ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpansionPlan:
    """Which block each block of the expanded model comes from.

    Attributes:
        sources: for every block of the expanded model, the block of the model being expanded that it is or copies.
        is_new: for every block of the expanded model, whether it is a copy.
    """

    sources: tuple[int, ...]
    is_new: tuple[bool, ...]

    @classmethod
    def from_groups(cls, num_layers: int, groups: int, copies: int = 1) -> ExpansionPlan:
        """The paper's form: N groups, as equal as they can be, P copies after each.

        Raises:
            UserError: no groups, more groups than blocks, or more copies than the smallest group has blocks.
        """
        if not 1 <= groups <= num_layers:
            raise UserError(
                f"--expand.groups {groups}: the model has {num_layers} blocks; give a number from 1 to {num_layers}"
            )
        smallest = num_layers // groups
        if copies > smallest:
            raise UserError(
                f"--expand.copies {copies}: the smallest of {groups} groups of {num_layers} blocks has {smallest}; "
                "give fewer copies or fewer groups"
            )
        return cls.from_after(num_layers, [(group + 1) * num_layers // groups - 1 for group in range(groups)], copies)

    @classmethod
    def from_after(cls, num_layers: int, after: list[int], copies: int = 1) -> ExpansionPlan:
        """Each block k in ``after`` (from 0, any order) is followed by copies of the blocks k-P+1 … k.

        Raises:
            UserError: a block that is not there or is named twice, none at all, or too few blocks before it to copy.
        """
        if copies < 1:
            raise UserError(f"--expand.copies {copies}: give 1 or more")
        if not after:
            raise UserError("--expand.after: no block is named; give block numbers such as 3,7,11")
        for block in after:
            if not 0 <= block < num_layers:
                raise UserError(f"--expand.after {block}: the model has blocks 0 to {num_layers - 1}")
            if after.count(block) > 1:
                raise UserError(
                    f"--expand.after {block}: named twice; for several new blocks in one place give --expand.copies"
                )
            if block - copies + 1 < 0:
                raise UserError(
                    f"--expand.after {block}: {copies} copies need {copies} blocks, there are {block + 1} up to it"
                )
        sources: list[int] = []
        is_new: list[bool] = []
        for block in range(num_layers):
            sources.append(block)
            is_new.append(False)
            if block in after:
                sources.extend(range(block - copies + 1, block + 1))
                is_new.extend([True] * copies)
        return cls(tuple(sources), tuple(is_new))

    @classmethod
    def from_config(cls, num_layers: int, config: ExpandConfig) -> ExpansionPlan:
        """What a recipe or command line asks for.

        Raises:
            UserError: both or neither of ``groups`` and ``after`` are given, or one of them cannot be followed.
        """
        if (config.groups is None) == (config.after is None):
            given = "none" if config.groups is None else "each"
            raise UserError(
                f"--expand.groups and --expand.after: {given} of them is given; give one, such as --expand.groups 8"
            )
        if config.groups is not None:
            return cls.from_groups(num_layers, config.groups, config.copies)
        after = config.after
        if isinstance(after, str):
            try:
                after = [int(block) for block in after.split(",")]
            except ValueError as error:
                raise UserError(f"--expand.after {after}: not a list of block numbers such as 3,7,11") from error
        return cls.from_after(num_layers, after, config.copies)

    @property
    def num_old(self) -> int:
        return len(self.sources) - sum(self.is_new)

    @property
    def num_layers(self) -> int:
        """Blocks of the expanded model."""
        return len(self.sources)

    @property
    def new_indices(self) -> tuple[int, ...]:
        """The new blocks, in the expanded model's numbering."""
        return tuple(index for index, new in enumerate(self.is_new) if new)

    @property
    def old_indices(self) -> tuple[int, ...]:
        """``old_indices[k]`` is where block k stands in the expanded model."""
        return tuple(index for index, new in enumerate(self.is_new) if not new)

    @property
    def trained(self) -> Trained:
        """The new blocks, and nothing else."""
        return Trained(self.num_layers, self.new_indices)


# -- the rewrite ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One tensor of the expanded checkpoint: its name, the base's tensor it is or copies, and how."""

    name: str
    source: TensorEntry
    is_old: bool
    is_zero: bool


def write_expanded(
    base: PretrainedFolder, folder: Path, plan: ExpansionPlan, *, progress: Progress | None = None
) -> Manifest:
    """Write the expanded checkpoint into ``folder``, which exists and is empty.

    Weights move as raw bytes, so their dtype, the sharding and the shards' names stay; each new block lies in the
    shards of the tensors it copies. Tokenizer and other companion files are copied.

    Raises:
        UserError: config and weights of the base disagree, its manifest is damaged, or the disk is too small; nothing
            has been written then.
    """
    assert plan.num_old == base.config.num_hidden_layers
    check_tensors(base)
    previous = Manifest.from_config(base.raw_config)
    shards: dict[str, list[_Row]] = {file: [] for file in base.files}
    for entry in base.entries.values():
        shards[entry.file].extend(_rows(entry, plan))
    total = sum(row.source.num_bytes for rows in shards.values() for row in rows)
    _check_space(folder, total)

    digests: dict[str, str] = {}
    done = 0
    for file, rows in shards.items():
        with open(folder / file, "wb", buffering=0) as out:
            write_header(out, [(row.name, row.source.dtype, row.source.shape, row.source.num_bytes) for row in rows])
            for row in rows:
                digest = hashlib.sha256()
                for piece in _zeros(row.source.num_bytes) if row.is_zero else base.read_bytes(row.source.name):
                    if row.is_old:
                        digest.update(piece)
                    _write_all(out, piece)
                    done += len(piece)
                    if progress:
                        progress("writing", done, total)
                if row.is_old:
                    digests[row.source.name] = digest.hexdigest()

    if list(shards) != [SINGLE_FILE]:
        weight_map = {row.name: file for file, rows in shards.items() for row in rows}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX_FILE, index)
    for companion in base.companions():
        shutil.copyfile(companion, folder / companion.name)
    made_from = ModelId(base.name, combined_digest(digests), plan.num_old)
    manifest = Manifest.of_expansion(previous, made_from, plan)
    write_json(folder / CONFIG_FILE, expanded_config(_explicit_config(base), plan, manifest))
    return manifest


def expanded_config(raw_config: dict[str, Any], plan: ExpansionPlan, manifest: Manifest) -> dict[str, Any]:
    """The base's ``config.json`` with more layers, longer per-layer lists and the manifest; all else as it was."""
    config = {key: value for key, value in raw_config.items() if key != "_name_or_path"}  # it names the base
    config["num_hidden_layers"] = plan.num_layers
    for key, value in raw_config.items():
        # The length alone proves nothing: a model of two layers may have two end-of-sequence tokens.
        if "layer" in key and isinstance(value, list) and len(value) == plan.num_old:
            config[key] = [value[source] for source in plan.sources]
    if isinstance(first := config.get("max_window_layers"), int):
        # For readers that know only this rule. It cannot say a full block above a sliding one, as several copies at a
        # time can make it: there only layer_types is right.
        config["max_window_layers"] = sum(source < first for source in plan.sources)
    config[MANIFEST_KEY] = manifest.to_config()
    return config


def _explicit_config(base: PretrainedFolder) -> dict[str, Any]:
    """The base's ``config.json`` with its ``layer_types`` written out, where its family has such.

    Older ones leave them to a rule on a block's number, which is another number after an expansion.
    """
    layer_types = getattr(base.config, "layer_types", None)
    return base.raw_config if layer_types is None else base.raw_config | {"layer_types": list(layer_types)}


def _rows(entry: TensorEntry, plan: ExpansionPlan) -> Iterator[_Row]:
    if (split := split_name(entry.name)) is None:
        yield _Row(entry.name, entry, is_old=True, is_zero=False)
        return
    block, rest = split
    for index, (source, new) in enumerate(zip(plan.sources, plan.is_new, strict=True)):
        if source == block:
            zero = new and rest.rpartition(".")[0] in ZEROED
            yield _Row(block_tensor_name(index, rest), entry, is_old=not new, is_zero=zero)


def _zeros(num_bytes: int) -> Iterator[memoryview]:
    zeros = memoryview(bytes(min(CHUNK_BYTES, num_bytes)))
    for start in range(0, num_bytes, CHUNK_BYTES):
        yield zeros[: num_bytes - start]


def _write_all(file, piece: memoryview) -> None:
    # An unbuffered file may take less than it is given: Linux stops at 2 GiB, a full disk at its last free block.
    while piece:
        piece = piece[file.write(piece) :]


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder.parent}: the expanded model needs {needed / 1e9:,.2f} GB and {free / 1e9:,.2f} GB are free; "
            "free space or give another place"
        )


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
