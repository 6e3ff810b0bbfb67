"""Block expansion (LLaMA Pro, arXiv 2401.02415, section 3.2): the rewrite of a checkpoint.

A copy whose output projections are zero adds nothing to the residual stream, so the expanded model computes what its
base computes:

    y = s + down_proj(·) = s + 0,   s = x + o_proj(·) = x + 0        hence y = x, bit for bit

Everything else in a copy, both norms included, is kept: were a norm's weight zero instead, the gated FFN would have no
gradient either and never start to learn (paper, appendix A).

The bytes move from file to file, a few megabytes at a time.
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

from llama_pro_fast.digests import combined_digest
from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion.manifest import MANIFEST_KEY, ZEROED, Manifest, ModelId
from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.hf.config import CONFIG_FILE, with_older_rope_keys
from llama_pro_fast.hf.folder import CHUNK_BYTES, INDEX_FILE, SINGLE_FILE, PretrainedFolder
from llama_pro_fast.hf.loading import check_tensors
from llama_pro_fast.hf.safetensors import TensorEntry, write_header

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
        UserError: config and weights of the base disagree, its manifest is damaged, or the disk is too small, and
            nothing has been written then; or a file of the base is damaged, or holds values that are not finite.
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
                for piece in _zeros(row.source.num_bytes) if row.is_zero else base.read_finite(row.source.name):
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
    """The base's ``config.json`` with its rotation as older readers know it and its ``layer_types`` written out, where
    its family has such.

    Older ones leave them to a rule on a block's number, which is another number after an expansion.
    """
    layer_types = getattr(base.config, "layer_types", None)
    config = with_older_rope_keys(base.raw_config, base.config)
    return config if layer_types is None else config | {"layer_types": list(layer_types)}


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
