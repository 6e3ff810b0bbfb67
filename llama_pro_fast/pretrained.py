"""Hugging Face model folders, read without loading them.

A :class:`PretrainedFolder` knows the config and, from the headers of the safetensors files alone, where the bytes of
every tensor lie. Expansion, export and the loader all stand on it: bytes are copied and hashed straight from file to
file, and a tensor becomes a `torch.Tensor` only where it is computed with.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from llama_pro_fast.errors import UserError
from llama_pro_fast.families import FAMILIES, BlockSpec, check_rope
from llama_pro_fast.files import first_line
from llama_pro_fast.shapes import SHAPES

ASSETS = Path(__file__).parent / "assets"
BUILTIN = "builtin:"
CHUNK_BYTES = 8 << 20
ALIGNMENT = 64
CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

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


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ``dtype`` in safetensors' spelling (``"BF16"``), ``offset`` in bytes from file start."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class PretrainedFolder:
    """A model folder in the Hugging Face layout: ``config.json`` and single or sharded safetensors.

    Args:
        path: the folder.

    Raises:
        UserError: the folder, its config or a shard is missing, damaged or of an architecture this project does not
            know; the message names the file and the remedy.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"model folder {self.path} does not exist; give a folder with {CONFIG_FILE}")
        self.raw_config, self.config = read_config(self.path / CONFIG_FILE)

    # -- what there is -------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The hub id of a hub snapshot (``…/models--org--name/snapshots/<commit>``), else the folder's name.

        Not the config's ``_name_or_path``: in a fine-tuned model that is often its parent's.
        """
        *_, repository, parent, name = ("", "", *self.path.resolve().parts)
        if parent == "snapshots" and repository.startswith("models--"):
            return repository.removeprefix("models--").replace("--", "/")
        return name

    @functools.cached_property
    def entries(self) -> dict[str, TensorEntry]:
        """Every tensor by name, in file order; headers are read on first use."""
        return self._read_headers()

    @property
    def files(self) -> list[str]:
        """The weight files' names, sorted."""
        return sorted({entry.file for entry in self.entries.values()})

    def _read_headers(self) -> dict[str, TensorEntry]:
        # Where both are there, transformers reads the single file.
        if (self.path / SINGLE_FILE).exists():
            weight_map, files = None, [SINGLE_FILE]
        elif (self.path / INDEX_FILE).exists():
            index = _read_json(self.path / INDEX_FILE, "it maps tensors to shards")
            weight_map = index.get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{self.path / INDEX_FILE}: no weight_map in it; download the file again")
            files = sorted(set(weight_map.values()))
        else:
            others = sorted(p.name for p in self.path.glob("*.bin")) or sorted(p.name for p in self.path.glob("*.pth"))
            hint = (
                f"{others[0]} is in the old pickle format: convert it with transformers' save_pretrained"
                if others
                else f"looked for {SINGLE_FILE} and {INDEX_FILE}"
            )
            raise UserError(f"{self.path}: no safetensors weights; {hint}")
        entries: dict[str, TensorEntry] = {}
        for file in files:
            for entry in read_header(self.path / file):
                if entry.name in entries:
                    raise UserError(f"{self.path}: tensor {entry.name} is in {entries[entry.name].file} and in {file}")
                entries[entry.name] = entry
        for name, file in (weight_map or {}).items():
            if name not in entries or entries[name].file != file:
                raise UserError(
                    f"{self.path / INDEX_FILE}: says {name} is in {file}, which does not hold it; "
                    "index and shards are of different checkpoints, download them again"
                )
        return entries

    # -- bytes and tensors ---------------------------------------------------------------------------------------

    def read_bytes(self, name: str) -> Iterator[memoryview]:
        """The raw bytes of a tensor, piece by piece."""
        entry = self.entries[name]
        try:
            with open(self.path / entry.file, "rb", buffering=0) as file:
                file.seek(entry.offset)
                left = entry.num_bytes
                buffer = memoryview(bytearray(min(CHUNK_BYTES, left)))
                while left:
                    count = file.readinto(buffer[: min(len(buffer), left)])
                    if not count:
                        raise UserError(f"{self.path / entry.file}: ends inside {name}; the file is cut short")
                    yield buffer[:count]
                    left -= count
        except OSError as error:
            # Told apart here, or the caller's `writing_to` would blame the folder that is being written.
            raise UserError(f"{self.path / entry.file}: cannot be read: {error.strerror}; check the disk") from error

    def digest(self, name: str) -> str:
        """SHA-256 of a tensor's bytes."""
        digest = hashlib.sha256()
        for piece in self.read_bytes(name):
            digest.update(piece)
        return digest.hexdigest()

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in the stored dtype.

        Raises:
            UserError: there is no such tensor, or its file is damaged.
        """
        if name not in self.entries:
            raise UserError(f"{self.path}: the config asks for tensor {name} and no weight file holds it")
        entry = self.entries[name]
        # Read, not mapped: the pages of a mapped shard count as this process's memory, gigabytes of them.
        content, position = torch.empty(entry.num_bytes, dtype=torch.uint8), 0
        into = memoryview(content.numpy())
        for piece in self.read_bytes(name):
            into[position : position + len(piece)] = piece
            position += len(piece)
        return content.view(TORCH_DTYPES[entry.dtype]).view(entry.shape)

    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        """The folder's tokenizer.

        Raises:
            UserError: there is none, it does not load, or it has more tokens than the model has embeddings.
        """
        if not any((self.path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise UserError(f"{self.path}: no tokenizer in it; copy tokenizer.json (or tokenizer.model) there")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.path)
        except Exception as error:
            raise UserError(f"{self.path}: its tokenizer does not load: {first_line(error)}") from error
        # A vocabulary may have holes: what counts is the largest id.
        size = max(tokenizer.get_vocab().values(), default=0) + 1
        if size > self.config.vocab_size:
            raise UserError(
                f"{self.path}: the tokenizer has {size} tokens, the model {self.config.vocab_size} "
                "embeddings; use the tokenizer the model was trained with, or resize the model's embeddings first"
            )
        return tokenizer

    def companions(self) -> list[Path]:
        """The files beside the weights that belong to an export too (tokenizer, generation config, licence)."""
        found = {path for pattern in COMPANION_PATTERNS for path in self.path.glob(pattern) if path.is_file()}
        return sorted(found)


def resolve(path_or_id: str, *, weights: bool = True) -> Path:
    """The local folder of a model: itself, one in the package (``builtin:name``), or the hub's snapshot of an id such
    as ``org/name``.

    Args:
        weights: whether the hub is asked for more than config.json.

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
                allow_patterns=["*.safetensors", "*.json", "*.jinja", *COMPANION_PATTERNS] if weights else CONFIG_FILE,
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
    raw = _read_json(path, "a Hugging Face model folder has one")
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
    try:
        check_rope(config)
        for index in range(config.num_hidden_layers):
            BlockSpec.from_config(config, index)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if config.hidden_act not in ("silu", "swish"):
        raise UserError(f"{path}: hidden_act {config.hidden_act} is not supported (silu is)")
    return raw, config


def find_config(path_or_id: str) -> tuple[dict[str, Any], Any]:
    """A model's config without its weights: of a folder, one in the package, a well-known shape, or from the hub.

    Returns:
        As :func:`read_config`; of a well-known shape (`shapes.SHAPES`) nothing is read.

    Raises:
        UserError: as :func:`resolve` and :func:`read_config`.
    """
    if path_or_id in SHAPES and not os.path.isdir(path_or_id):
        shape = SHAPES[path_or_id]
        return shape, transformers.AutoConfig.for_model(**shape)
    return read_config(resolve(path_or_id, weights=False) / CONFIG_FILE)


def read_header(path: Path) -> list[TensorEntry]:
    """The table of one safetensors file: 8 bytes of length, then JSON (format: huggingface.co/docs/safetensors).

    Raises:
        UserError: the file is missing, is not safetensors, or is shorter or longer than its table says.
    """
    remedy = "download it again"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise UserError(f"{path}: damaged (not a safetensors file); {remedy}")
            table = json.loads(file.read(length))
        table.pop("__metadata__", None)
        start = 8 + length
        entries = [
            TensorEntry(
                name=name,
                file=path.name,
                dtype=row["dtype"],
                shape=tuple(row["shape"]),
                offset=start + row["data_offsets"][0],
                num_bytes=row["data_offsets"][1] - row["data_offsets"][0],
            )
            for name, row in table.items()
        ]
    except FileNotFoundError as error:
        raise UserError(f"{path}: the index names this shard and it is not there; {remedy}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged (its header is not readable); {remedy}") from error
    entries.sort(key=lambda entry: entry.offset)
    end = start
    for entry in entries:
        if entry.offset != end or entry.num_bytes < 0:
            raise UserError(f"{path}: damaged (its tensors overlap or leave gaps); {remedy}")
        width = TORCH_DTYPES[entry.dtype].itemsize if entry.dtype in TORCH_DTYPES else None
        if width and math.prod(entry.shape) * width != entry.num_bytes:
            raise UserError(f"{path}: damaged ({entry.name} has not the bytes its shape asks for); {remedy}")
        end += entry.num_bytes
    if end != size:
        raise UserError(f"{path}: damaged ({size:,} bytes where its header says {end:,}); {remedy}")
    return entries


def write_header(file, entries: list[tuple[str, str, tuple[int, ...], int]]) -> None:
    """Write the table of a safetensors file for tensors ``(name, dtype, shape, num_bytes)`` in this order."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, num_bytes in entries:
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    header = json.dumps(table, separators=(",", ":")).encode()
    # Readers map the file, and a product may round otherwise where its weights do not start on a cache line.
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    file.write(len(header).to_bytes(8, "little") + header)


def combined_digest(digests: dict[str, str]) -> str:
    """One digest for a set of tensors, whatever shards they lie in: SHA-256 over sorted ``name:digest`` lines."""
    lines = "".join(f"{name}:{digests[name]}\n" for name in sorted(digests))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def folder_digest(folder: PretrainedFolder) -> str:
    """One digest for all of a folder's tensors, read once, a few at a time side by side."""
    # hashlib lets go of the interpreter while it hashes.
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = dict(zip(folder.entries, pool.map(folder.digest, folder.entries), strict=True))
    return combined_digest(digests)


def _read_json(path: Path, why: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent}: no {path.name} in it; {why}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({first_line(error)}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; download it again")
    return content


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers draws bars of its own when it reads and writes weights; here they would cut through our lines."""
    logging = transformers.utils.logging
    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            logging.enable_progress_bar()
