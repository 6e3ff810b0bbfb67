"""A run's model as an ordinary Hugging Face folder.

Works on any run that has a complete checkpoint, finished or not. Tensors that did not train are copied byte for byte
from the folder the run trains; trained ones are cast once to the dtype they have there. Nothing is held but one tensor
at a time."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp

from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion.lineage import intact_bases
from llama_pro_fast.expansion.manifest import MANIFEST_KEY, Manifest
from llama_pro_fast.expansion.rewrite import write_json
from llama_pro_fast.files import first_line, new_folder
from llama_pro_fast.hf.config import CONFIG_FILE, with_older_rope_keys
from llama_pro_fast.hf.folder import INDEX_FILE, SINGLE_FILE, PretrainedFolder, folder_digest
from llama_pro_fast.hf.loading import EMBEDDING, HEAD, hf_tensors
from llama_pro_fast.hf.safetensors import TORCH_DTYPES, TensorEntry, write_header
from llama_pro_fast.resume import load_config
from llama_pro_fast.training.checkpoint import complete_checkpoints, load, read_info


def export_run(run: Path, out: Path | None = None) -> tuple[Path, int]:
    """Export the run's last complete checkpoint.

    Args:
        run: the run's folder.
        out: where to; by default ``run/export``, which an earlier export of the same run may occupy.

    Returns:
        The export's folder, and the step it is of.

    Raises:
        UserError: no run, no complete checkpoint, its base is gone or changed, ``out`` is taken, full or not writable.
    """
    config = load_config(run)
    checkpoint = last_checkpoint(run)
    info = read_info(checkpoint)
    base = trained_folder(run)
    if folder_digest(base) != info.model_digest:
        raise UserError(f"{base.path}: not the weights {run} was trained on any more; put them back")
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
            intact = config.train.parameters != "all" and intact_bases(base)[-1]
            raw_config[MANIFEST_KEY] = dataclasses.replace(manifest, base_intact=intact).to_config()
        write_json(partial / CONFIG_FILE, raw_config)
    return out or run / "export", info.progress.step


def last_checkpoint(run: Path) -> Path:
    """The run's last complete checkpoint.

    Raises:
        UserError: it has none.
    """
    checkpoints = complete_checkpoints(run)
    if not checkpoints:
        raise UserError(f"{run}: has no complete checkpoint yet; resume it with --output {run} --resume")
    return checkpoints[-1]


def trained_folder(run: Path) -> PretrainedFolder:
    """The model's folder that a run trains, which its last complete checkpoint names."""
    return PretrainedFolder(run / read_info(last_checkpoint(run)).model)


class _TrainedTensors:
    """A checkpoint's trained parameters under Hugging Face names, one of ours in memory at a time."""

    def __init__(self, checkpoint: Path, base: PretrainedFolder) -> None:
        self.checkpoint = checkpoint
        self.config = base.config
        try:
            metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        except Exception as error:
            raise UserError(
                f"{checkpoint}: cannot be read ({first_line(error)}); delete it to use the one before"
            ) from error
        self.ours: dict[str, torch.Tensor] = {
            key.removeprefix("model."): torch.empty(row.size, dtype=row.properties.dtype, device="meta")
            for key, row in metadata.items()
            if key.startswith("model.")
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
                f"{self.checkpoint}: {entry.name} is not finite in {entry.dtype}; delete this folder to use the "
                "checkpoint before, and lower --optim.lr"
            )
        return tensor

    def _tensor(self, hf_name: str) -> torch.Tensor:
        ours = self.names[hf_name]
        if self.held is None or self.held[0] != ours:
            tensor = torch.empty_like(self.ours[ours], device="cpu")
            load(self.checkpoint, {"model": {ours: tensor}})
            self.held = ours, tensor
        parts = dict(hf_tensors(self.config, ours, self.held[1]))
        return parts[EMBEDDING if hf_name == HEAD and hf_name not in parts else hf_name]
