"""A run's model as an ordinary Hugging Face folder.

Works on any run that has a complete checkpoint, finished or not. Tensors that did not train are copied byte for byte
from the folder the run trains; trained ones are cast once to the dtype they have there. Nothing is held but one tensor
at a time."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch

from llama_pro_fast.config import Settled
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
from llama_pro_fast.runs.checkpoint import complete_checkpoints, load, newest, stored_tensors
from llama_pro_fast.runs.marker import CheckpointInfo, read_info


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
    config = load_config(run)
    checkpoint, info = last_checkpoint(run, from_step)
    try:
        _export(run, config, checkpoint, info, out)
    except UserError:
        if from_step is not None or checkpoint.exists():
            raise
        return export_run(run, out)  # the run goes on, and has given this one up for a newer one
    return out or run / "export", info.progress.step


def _export(run: Path, config: Settled, checkpoint: Path, info: CheckpointInfo, out: Path | None) -> None:
    base = _folder_of(run, info)
    if (changed := difference(info.identity, model_identity(base))) is not None:
        raise UserError(f"{base.path}: is not the model {run} was trained on any more: {changed}; put it back")
    trained = _TrainedTensors(checkpoint, base)
    with new_folder(out or run / "export", replace=out is None) as partial:
        for file in base.files:
            entries = [entry for entry in base.entries.values() if entry.file == file]
            with open(partial / file, "wb") as target:
                write_header(target, [(e.name, e.dtype, e.shape, e.num_bytes) for e in entries])
                for entry in entries:
                    if entry.name in trained.names:
                        target.write(trained.cast(entry).view(torch.uint8).numpy().data)
                    else:
                        for piece in base.read_bytes(entry.name):
                            target.write(piece)
        index = [] if base.files == [SINGLE_FILE] else [base.path / INDEX_FILE]
        for path in [*index, *base.companions()]:
            shutil.copyfile(path, partial / path.name)
        raw_config = with_older_rope_keys(base.raw_config, base.config)
        if (manifest := Manifest.from_config(raw_config)) is not None:
            intact = config.train.parameters == "new_blocks" and intact_bases(base)[-1]
            raw_config[MANIFEST_KEY] = dataclasses.replace(manifest, base_intact=intact).to_config()
        write_json(partial / CONFIG_FILE, raw_config)


def last_checkpoint(run: Path, from_step: int | None = None) -> tuple[Path, CheckpointInfo]:
    """The run's last complete checkpoint, or the one asked for, and what it says.

    Raises:
        UserError: it has none, or that is damaged.
    """
    found = newest(run, from_step)
    if found is None:
        raise UserError(f"{run}: has no complete checkpoint yet; resume it with --output {run} --resume")
    return found


def trained_folder(run: Path) -> PretrainedFolder:
    """The model's folder that a run trains, which its last complete checkpoint names."""
    checkpoints = complete_checkpoints(run)
    return _folder_of(run, read_info(checkpoints[-1]) if checkpoints else last_checkpoint(run)[1])


def _folder_of(run: Path, info: CheckpointInfo) -> PretrainedFolder:
    """Where the checkpoint says, or where config.yaml does since the model was moved; its identity tells."""
    there = run / info.model
    return PretrainedFolder(there if there.is_dir() else resolve(load_config(run).model.path))


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
