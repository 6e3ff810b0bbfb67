"""Hugging Face model folders, read without loading them.

A :class:`PretrainedFolder` knows the config and, from the headers of the safetensors files alone, where the bytes of
every tensor lie. Expansion, export and the loader all stand on it: bytes are copied and hashed straight from file to
file, and a tensor becomes a `torch.Tensor` only where it is computed with.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers

from llama_pro_fast.digests import combined_digest, tensor_digest
from llama_pro_fast.errors import UserError
from llama_pro_fast.files import check_regular, first_line
from llama_pro_fast.hf.config import COMPANION_PATTERNS, CONFIG_FILE, read_config, read_json
from llama_pro_fast.hf.safetensors import TORCH_DTYPES, TensorEntry, num_not_finite, read_header

CHUNK_BYTES = 8 << 20
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


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
        for file in self.path.iterdir():
            check_regular(file)  # transformers, too, would wait for a pipe's end
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
            index = read_json(self.path / INDEX_FILE, "it maps tensors to shards")
            weight_map = index.get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{self.path / INDEX_FILE}: no weight_map in it; download the file again")
            for name, file in weight_map.items():
                if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                    raise UserError(
                        f"{self.path / INDEX_FILE}: names {file!r:.60} as the file of {name:.200}, and not a "
                        ".safetensors file beside it; download the index again"
                    )
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
            with open(self.path / entry.file, "rb") as file:  # which fills each piece, so that it holds whole values
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

    def read_finite(self, name: str) -> Iterator[memoryview]:
        """As :meth:`read_bytes`; after the last piece values that are not finite are refused.

        Raises:
            UserError: there are some, or the file is damaged.
        """
        entry, bad = self.entries[name], 0
        for piece in self.read_bytes(name):
            yield piece
            if entry.dtype in TORCH_DTYPES:
                bad += num_not_finite(piece, entry.dtype)
        if bad:
            raise UserError(
                f"{self.path / entry.file}: {name} has {bad:,} values that are not finite (NaN or infinity), so the "
                "model cannot compute; download it again, or mend it where it was made"
            )

    def digest(self, name: str) -> str:
        """SHA-256 of a tensor's bytes, which are read once a process as long as their file does not change."""
        return tensor_digest(self.path / self.entries[name].file, name, lambda: self.read_bytes(name))

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in the stored dtype.

        Raises:
            UserError: there is no such tensor, its file is damaged, or not all of it is finite.
        """
        if name not in self.entries:
            raise UserError(f"{self.path}: the config asks for tensor {name} and no weight file holds it")
        entry = self.entries[name]
        # Read, not mapped: the pages of a mapped shard count as this process's memory, gigabytes of them.
        content, position = torch.empty(entry.num_bytes, dtype=torch.uint8), 0
        into = memoryview(content.numpy())
        for piece in self.read_finite(name):
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


def tensor_digests(folder: PretrainedFolder) -> dict[str, str]:
    """The digest of each of a folder's tensors, a few read at a time side by side."""
    # hashlib lets go of the interpreter while it hashes.
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(folder.entries, pool.map(folder.digest, folder.entries), strict=True))


def folder_digest(folder: PretrainedFolder) -> str:
    """One digest for all of a folder's tensors."""
    return combined_digest(tensor_digests(folder))


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
