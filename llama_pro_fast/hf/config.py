"""Which folder a model's name means, and what its config.json says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import transformers

from llama_pro_fast.errors import UserError
from llama_pro_fast.files import check_regular, first_line
from llama_pro_fast.hf.families import FAMILIES, block_spec, check_rope
from llama_pro_fast.hf.known_shapes import SHAPES

ASSETS = Path(__file__).parent.parent / "assets"
BUILTIN = "builtin:"
CONFIG_FILE = "config.json"

LARGEST = {
    "num_hidden_layers": 2**10,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**40,
}
"""Of the sizes in a config, far above any model's. Larger ones come of damage, and would be worked on for hours."""

# Side files a model folder may carry that stay true for a deeper model: tokenizer, generation settings, licence.
COMPANION_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "*.model",
    "generation_config.json",
    "chat_template*",
    "LICENSE*",
    "USE_POLICY*",
    "NOTICE*",
)


TOKENIZER_FILES = ["*.json", "*.jinja", *COMPANION_PATTERNS]
WANTED = {"model": ["*.safetensors", *TOKENIZER_FILES], "tokenizer": TOKENIZER_FILES, "config": [CONFIG_FILE]}


def resolve(path_or_id: str, *, wanted: Literal["model", "tokenizer", "config"] = "model") -> Path:
    """The local folder of a model: itself, one in the package (``builtin:name``), or the hub's snapshot of an id such
    as ``org/name``.

    Args:
        wanted: what the hub is asked for: everything, all but the weights, or config.json alone.

    Raises:
        UserError: neither a folder nor an id the hub gave us.
    """
    if path_or_id.startswith(BUILTIN):
        packaged = {BUILTIN + path.parent.name: path.parent for path in ASSETS.glob(f"*/{CONFIG_FILE}")}
        if path_or_id not in packaged:
            raise UserError(f"model {path_or_id}: not in the package; there is {', '.join(sorted(packaged))}")
        return packaged[path_or_id]
    if os.path.isdir(path_or_id):
        return Path(path_or_id)
    if path_or_id.count("/") != 1 or path_or_id.startswith((".", "/", "~")):
        raise UserError(f"model {path_or_id}: no such folder (and not a hub id of the form org/name)")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                path_or_id,
                allow_patterns=WANTED[wanted],
                # A second copy of the weights in a format of their authors' own.
                ignore_patterns=["consolidated*", "original/*"],
            )
        )
    except Exception as error:
        raise UserError(
            f"model {path_or_id}: no such folder, and the hub did not give it ({first_line(error)}); "
            "check the name, the network and, for gated models, `hf auth login`"
        ) from error


def read_config(path: Path) -> tuple[dict[str, Any], Any]:
    """A config.json, as it is written and as transformers takes it.

    Raises:
        UserError: it is missing, damaged, or of an architecture this project does not know.
    """
    raw = read_json(path, "a Hugging Face model folder has one")
    architecture, model_type = raw.get("architectures"), raw.get("model_type")
    if isinstance(architecture, list) and architecture:
        architecture = architecture[0]
    known = [(family.architecture, name) for name, family in FAMILIES.items()]
    if (architecture, model_type) not in known:
        supported = ", ".join(f"{family.architecture} ({name})" for name, family in FAMILIES.items())
        raise UserError(
            f"{path}: architecture {architecture} of model_type {model_type} is not supported; supported: {supported}"
        )
    if raw.get("quantization_config") is not None:
        raise UserError(f"{path.parent}: the weights are quantised; give the original bf16/fp16/fp32 checkpoint")
    _check_sizes(path, raw)
    try:
        config = transformers.AutoConfig.from_pretrained(path.parent)
    except Exception as error:
        # Its first line often says only that something is wrong.
        raise UserError(f"{path}: transformers refuses it: {' '.join(str(error).split())}") from error
    if config.model_type != model_type:
        raise UserError(
            f"{path}: transformers takes this {model_type} for a {config.model_type}, which is not supported; remove "
            "layer_types if all blocks are alike"
        )
    # Once more, with what transformers filled in.
    _check_sizes(path, {name: getattr(config, name, None) for name in LARGEST}, required=True)
    try:
        check_rope(config)
        for index in range(config.num_hidden_layers):
            block_spec(config, index)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if config.hidden_act not in ("silu", "swish"):
        raise UserError(f"{path}: hidden_act {config.hidden_act} is not supported (silu is)")
    return raw, config


def _check_sizes(path: Path, config: dict[str, Any], *, required: bool = False) -> None:
    for name, largest in LARGEST.items():
        size = config.get(name)
        if size is None and (not required or name == "head_dim"):
            continue
        if type(size) is not int or not 0 < size <= largest:
            raise UserError(f"{path}: {name} is {size!r:.60}, not a whole number from 1 to {largest}; mend the file")


ROPE_KEYS = ("rope_parameters", "rope_theta", "rope_scaling")


def with_older_rope_keys(raw_config: dict[str, Any], config: Any) -> dict[str, Any]:
    """``raw_config`` with the rotation in the layout from before transformers 5 too.

    Many readers (MLX-LM, Ollama's converter, transformers 4) know only ``rope_theta`` and ``rope_scaling`` and take
    Llama's first rotation where these are missing. What is there stays unless it contradicts ``config``, which is what
    transformers makes of it: `rope_scaling` goes before `rope_parameters`, and what is in either before `rope_theta`.
    """
    rope = rope_of(config)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    result = dict(raw_config)
    if raw_config.get("rope_theta") != rope["rope_theta"]:
        result["rope_theta"] = rope["rope_theta"]
    if raw_config.get("rope_scaling"):
        if raw_config.get("rope_parameters"):
            result["rope_parameters"] = rope
    elif rope["rope_type"] != "default":
        # Some readers look for the one key, some for the other.
        result["rope_scaling"] = scaling | {"type": rope["rope_type"]}
    if rope["rope_type"] == "longrope":  # transformers 4 looks for it here and nowhere else
        result["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return result


def rope_of(config: Any) -> dict[str, Any]:
    """What transformers takes a config's rotation for, without the old name of its type."""
    return {key: value for key, value in config.rope_parameters.items() if key != "type"}


def find_config(path_or_id: str) -> tuple[dict[str, Any], Any]:
    """A model's config without its weights: of a folder, one in the package, a well-known shape, or from the hub.

    Returns:
        As :func:`read_config`; of a well-known shape (`known_shapes.SHAPES`) nothing is read.

    Raises:
        UserError: as :func:`resolve` and :func:`read_config`.
    """
    if path_or_id in SHAPES and not os.path.isdir(path_or_id):
        shape = SHAPES[path_or_id]
        return shape, transformers.AutoConfig.for_model(**shape)
    return read_config(resolve(path_or_id, wanted="config") / CONFIG_FILE)


def read_json(path: Path, why: str) -> dict[str, Any]:
    """A JSON object in a file; ``why`` says what it is for, should it be missing."""
    try:
        if not path.exists():
            raise UserError(f"{path.parent}: no {path.name} in it; {why}")
        check_regular(path)
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not readable as JSON ({first_line(error)}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; download it again")
    return content
