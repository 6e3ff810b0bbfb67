"""A run's model as an ordinary Hugging Face folder.

Works on any run that has a complete checkpoint, finished or not. Tensors that did not train are copied byte for byte
from the folder the run trains; trained ones are cast once to the dtype they have there. Nothing is held but one tensor
at a time."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from llama_pro_fast.config import Settled
from llama_pro_fast.digests import tensor_digest
from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion.lineage import difference, intact_bases, model_identity
from llama_pro_fast.expansion.manifest import MANIFEST_KEY, Manifest
from llama_pro_fast.expansion.rewrite import write_json
from llama_pro_fast.files import new_folder
from llama_pro_fast.hf.config import CONFIG_FILE, resolve, with_older_rope_keys
from llama_pro_fast.hf.folder import INDEX_FILE, SINGLE_FILE, PretrainedFolder
from llama_pro_fast.hf.loading import EMBEDDING, HEAD, hf_tensors
from llama_pro_fast.hf.safetensors import TORCH_DTYPES, TensorEntry, write_header
from llama_pro_fast.resume import load_config
from llama_pro_fast.runs.checkpoint import chosen, load, newest, stored_tensors
from llama_pro_fast.runs.marker import COMPLETE, CheckpointInfo, read_info, step_of


def export_run(run: Path, out: Path | None = None, *, from_step: int | None = None) -> tuple[Path, int]:
    """Export the run's last complete checkpoint.

    Args:
        run: the run's folder.
        out: where to; by default ``run/export``, which an earlier export of the same run may occupy.
        from_step: take the checkpoint of that step instead.

    Returns:
        The export's folder, and the step it is of.

    Raises:
        UserError: no run, no complete checkpoint or a damaged one, its base is gone or changed, ``out`` is taken, full
            or not writable.
    """
    config, folder = load_config(run), CheckpointFolder(run, from_step)
    try:
        folder.check()
        _export(folder, config, out)
    except UserError:
        if from_step is not None or folder.checkpoint.exists():
            raise
        return export_run(run, out)  # the run goes on, and has given this one up for a newer one
    return out or run / "export", folder.step


def _export(folder: CheckpointFolder, config: Settled, out: Path | None) -> None:
    with new_folder(out or folder.run / "export", replace=out is None) as partial:
        for file in folder.files:
            entries = [entry for entry in folder.entries.values() if entry.file == file]
            with open(partial / file, "wb") as target:
                write_header(target, [(e.name, e.dtype, e.shape, e.num_bytes) for e in entries])
                for entry in entries:
                    for piece in folder.read_bytes(entry.name):
                        target.write(piece)
        index = [] if folder.files == [SINGLE_FILE] else [folder.path / INDEX_FILE]
        for path in [*index, *folder.companions()]:
            shutil.copyfile(path, partial / path.name)
        raw_config = with_older_rope_keys(folder.raw_config, folder.config)
        if (manifest := Manifest.from_config(raw_config)) is not None:
            intact = config.train.parameters != "all" and intact_bases(PretrainedFolder(folder.path))[-1]
            raw_config[MANIFEST_KEY] = dataclasses.replace(manifest, base_intact=intact).to_config()
        write_json(partial / CONFIG_FILE, raw_config)


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

    def read_bytes(self, name: str) -> Iterator[memoryview]:
        with self._lock:  # digests are taken by several threads
            tensor = self._trained.cast(self.entries[name]) if name in self._trained.names else None
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
        self.config = base.config
        self.ours = {
            name.removeprefix("model."): empty
            for name, empty in stored_tensors(checkpoint).items()
            if name.startswith("model.")
        }
        self.names = {hf: name for name, empty in self.ours.items() for hf, _ in hf_tensors(self.config, name, empty)}
        if self.config.tie_word_embeddings and EMBEDDING in self.names and HEAD in base.entries:
            self.names[HEAD] = self.names[EMBEDDING]
        self.held: tuple[str, torch.Tensor] | None = None

    def cast(self, entry: TensorEntry) -> torch.Tensor:
        """A trained tensor in the dtype the base stores it in.

        Raises:
            UserError: it holds a number that is not finite.
        """
        tensor = self._tensor(entry.name).to(TORCH_DTYPES[entry.dtype]).contiguous()
        if not tensor.isfinite().all():
            raise UserError(
                f"{self.checkpoint}: {entry.name} is not finite in {entry.dtype}; take an earlier checkpoint with "
                "--from_step, and lower --optim.lr"
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
