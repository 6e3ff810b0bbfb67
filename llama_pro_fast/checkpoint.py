"""Checkpoints of a run: the trained parameters, the optimizer, the position in the data, the random state.

    runs/NAME/checkpoints/step-000123/   PyTorch distributed checkpoint (DCP), and COMPLETE, written last

The frozen base is not copied: `COMPLETE` names it by path and digest. A folder without `COMPLETE` is the remains of a
crash and is never read; a step's folder is never written into a second time.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from llama_pro_fast.errors import UserError
from llama_pro_fast.pretrained import PretrainedFolder, writing_to

COMPLETE = "COMPLETE"


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        sequences: sequences consumed; the position in the data.
        tokens: tokens consumed.
    """

    step: int = 0
    sequences: int = 0
    tokens: int = 0

    def advanced(self, *, sequences: int, tokens: int) -> Progress:
        """After one more step over that many."""
        return Progress(self.step + 1, self.sequences + sequences, self.tokens + tokens)


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself.

    Attributes:
        progress: how far the run was.
        model: path of the model folder the run trains.
        model_digest: combined digest of that folder's tensors.
        data: fingerprint of the tokenised text and its order.
    """

    progress: Progress
    model: str
    model_digest: str
    data: str


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def complete_checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted((f for f in folders if (f / COMPLETE).exists()), key=lambda f: int(f.name.removeprefix("step-")))


def read_info(folder: Path) -> CheckpointInfo:
    """What ``folder``'s COMPLETE says.

    Raises:
        UserError: it is not readable.
    """
    try:
        row = json.loads((folder / COMPLETE).read_text())
        return CheckpointInfo(Progress(**row.pop("progress")), **row)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / COMPLETE}: not readable; delete this checkpoint to use the one before") from error


def save(run: Path, state: dict[str, Any], info: CheckpointInfo, *, keep: int) -> Path:
    """Write a checkpoint and drop the oldest beyond ``keep``.

    Raises:
        UserError: the place cannot be written or is full; earlier checkpoints stand.
    """
    folder = folder_of(run, info.progress.step)
    with writing_to(folder):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        with _single_process():
            dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, sync_files=True), no_dist=True)
        # The marker comes after everything it vouches for is on disk.
        marker = folder / (COMPLETE + ".new")
        with open(marker, "w") as file:
            json.dump(asdict(info), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        marker.rename(folder / COMPLETE)
    for old in complete_checkpoints(run)[:-keep]:
        (old / COMPLETE).unlink()
        shutil.rmtree(old)
    return folder


def load(folder: Path, state: dict[str, Any]) -> None:
    """Read a checkpoint into ``state`` in place.

    Raises:
        UserError: the checkpoint is damaged or of another model.
    """
    try:
        with _single_process():
            dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    except Exception as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{folder}: cannot be read ({text}); delete this folder to use the checkpoint before"
        ) from error


def restore(folder: Path, state: dict[str, Any], *, model: PretrainedFolder, model_digest: str, data: str) -> Progress:
    """Read a checkpoint of this very run into ``state`` in place, random state included.

    Raises:
        UserError: it is damaged, or the model or the text are not those it was made with.
    """
    info = read_info(folder)
    if info.model_digest != model_digest:
        raise UserError(
            f"{model.path}: not the weights this run was started on (digest {model_digest}, checkpoint {folder} says "
            f"{info.model_digest}); put them back"
        )
    if info.data != data:
        raise UserError(
            f"{folder}: the training text has changed since it was written, so the order of the data is another; put "
            "the text back, or start a new run"
        )
    load(folder, state)
    set_random_state(state["random"])
    return info.progress


def random_state() -> dict[str, torch.Tensor]:
    """The states of PyTorch's generators, as tensors."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def _single_process() -> Iterator[None]:
    """DCP for one process: without its warning, at every call, that no process group is there, and with the errors a
    file system raises as they are (DCP wraps them in a BaseException)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        try:
            yield
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise cause from error
