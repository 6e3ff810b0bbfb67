"""A run's model as a checkpoint has it, without an export: the folder that it trains, what is trained laid over it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from llama_pro_fast.digests import tensor_digest
from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion.lineage import difference, model_identity
from llama_pro_fast.hf.config import resolve
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.hf.loading import EMBEDDING, HEAD, hf_tensors
from llama_pro_fast.hf.safetensors import TORCH_DTYPES, TensorEntry
from llama_pro_fast.resume import load_config
from llama_pro_fast.runs.checkpoint import chosen, load, newest, stored_tensors
from llama_pro_fast.runs.marker import COMPLETE, CheckpointInfo, read_info, step_of


def trained_folder(run: Path) -> PretrainedFolder:
    """The model's folder that a run trains, which its last complete checkpoint names."""
    return _folder_of(run, _info(run, _checkpoint_of(run)))


def _checkpoint_of(run: Path, from_step: int | None = None) -> Path:
    if (checkpoint := chosen(run, from_step)) is None:
        raise UserError(f"{run}: has no complete checkpoint yet; resume it with --output {run} --resume")
    return checkpoint


def _info(run: Path, checkpoint: Path) -> CheckpointInfo:
    try:
        return read_info(checkpoint)
    except UserError:
        newest(run, step_of(checkpoint))  # refuses it too, and says which one before it is whole
        raise


def _folder_of(run: Path, info: CheckpointInfo) -> PretrainedFolder:
    """Where the checkpoint says, or where config.yaml does since the model was moved; its identity tells."""
    there = run / info.model
    return PretrainedFolder(there if there.is_dir() else resolve(load_config(run).model.path))


class CheckpointFolder(PretrainedFolder):
    """A run's model as a checkpoint has it, which nobody has written: the folder that the run trains, with the
    checkpoint's tensors in place of its own, each cast once to the dtype it has there. An export holds the same bytes.

    Args:
        from_step: take the checkpoint of that step; by default the last complete one.

    Attributes:
        run, checkpoint, step: what it is of.

    Raises:
        UserError: there is no such checkpoint, its marker is damaged, or the folder is gone.
    """

    def __init__(self, run: Path, from_step: int | None = None) -> None:
        self.run, self.checkpoint = run, _checkpoint_of(run, from_step)
        self.step, self._lock, self._proved = step_of(self.checkpoint), threading.Lock(), False
        super().__init__(_folder_of(run, _info(run, self.checkpoint)).path)

    def check(self) -> None:
        """Prove both parts, once: every byte of the checkpoint, and that the folder is the one it was made with.

        Raises:
            UserError: one of them is not what it was.
        """
        if self._proved:
            return
        _, info = newest(self.run, self.step)
        if (changed := difference(info.identity, model_identity(PretrainedFolder(self.path)))) is not None:
            raise UserError(f"{self.path}: is not the model {self.run} was trained on any more: {changed}; put it back")
        self._proved = True

    @functools.cached_property
    def _trained(self) -> _TrainedTensors:
        return _TrainedTensors(self.checkpoint, PretrainedFolder(self.path))

    def read_bytes(self, name: str, factor: float = 1.0) -> Iterator[memoryview]:
        """The bytes of a tensor; with a factor it is multiplied by that before it is cast."""
        with self._lock:  # digests are taken by several threads
            plain = name not in self._trained.names and factor == 1
            tensor = None if plain else self._trained.cast(self.entries[name], factor)
        if tensor is None:
            yield from super().read_bytes(name)
        else:
            yield memoryview(tensor.flatten().view(torch.uint8).numpy())

    def digest(self, name: str) -> str:
        with self._lock:
            trained = name in self._trained.names
        if not trained:
            return super().digest(name)
        return tensor_digest(self.checkpoint / COMPLETE, name, lambda: self.read_bytes(name))


class _TrainedTensors:
    """A checkpoint's trained parameters under Hugging Face names, one of ours in memory at a time."""

    def __init__(self, checkpoint: Path, base: PretrainedFolder) -> None:
        self.checkpoint = checkpoint
        self.base, self.config = base, base.config
        self.ours = {
            name.removeprefix("model."): empty
            for name, empty in stored_tensors(checkpoint).items()
            if name.startswith("model.")
        }
        self.names = {hf: name for name, empty in self.ours.items() for hf, _ in hf_tensors(self.config, name, empty)}
        if self.config.tie_word_embeddings and EMBEDDING in self.names and HEAD in base.entries:
            self.names[HEAD] = self.names[EMBEDDING]
        self.held: tuple[str, torch.Tensor] | None = None

    def cast(self, entry: TensorEntry, factor: float = 1.0) -> torch.Tensor:
        """A tensor times ``factor`` in the dtype the base stores it in: trained, or the base's.

        Raises:
            UserError: it holds a number that is not finite.
        """
        tensor = self._tensor(entry.name) if entry.name in self.names else self.base.tensor(entry.name)
        if factor != 1:
            tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor
        tensor = tensor.to(TORCH_DTYPES[entry.dtype]).contiguous()
        if not tensor.isfinite().all():
            remedy = "lower --scale, or " if factor > 1 else ""
            raise UserError(
                f"{self.checkpoint}: {entry.name} is not finite in {entry.dtype}; {remedy}take an earlier checkpoint "
                "with --from_step, and lower --optim.lr"
            )
        return tensor

    def _tensor(self, hf_name: str) -> torch.Tensor:
        ours = self.names[hf_name]
        if self.held is None or self.held[0] != ours:
            tensor = torch.empty_like(self.ours[ours], device="cpu")
            load(self.checkpoint, {f"model.{ours}": tensor})
            self.held = ours, tensor
        parts = dict(hf_tensors(self.config, ours, self.held[1]))
        return parts[EMBEDDING if hf_name == HEAD and hf_name not in parts else hf_name]
