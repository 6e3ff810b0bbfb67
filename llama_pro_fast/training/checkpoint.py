"""Checkpoints of a run: the trained parameters, the optimizer, the position in the data, the random state.

    runs/NAME/checkpoints/step-000123/   PyTorch distributed checkpoint (DCP), and COMPLETE, written last

The frozen base is not copied: `COMPLETE` names it by path and digest. A folder without `COMPLETE` is the remains of a
crash: never read, never written into, and swept away before the next save.
"""

from __future__ import annotations

import json
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
from llama_pro_fast.files import first_line, sync, writing_to
from llama_pro_fast.resume import check_unchanged

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
        model: path of the model folder the run trains, relative to the run where it lies in it (a run can be moved).
        model_digest: combined digest of that folder's tensors.
        data: fingerprint of the training text and its order.
        measured: fingerprint of the held-out text.
        unlogged: losses of the last steps that no row of the metrics holds yet.
    """

    progress: Progress
    model: str
    model_digest: str
    data: str
    measured: str
    unlogged: list[float]


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
        for remains in (run / "checkpoints").glob("step-*"):
            if not (remains / COMPLETE).exists():
                shutil.rmtree(remains)
        folder.mkdir(parents=True)
        with _single_process():
            dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, sync_files=True), no_dist=True)
        # The marker comes after everything it vouches for is on disk, and the old ones go after it is.
        marker = folder / (COMPLETE + ".new")
        marker.write_text(json.dumps(asdict(info), indent=1))
        sync(marker)
        marker.rename(folder / COMPLETE)
        sync(folder)
        sync(folder.parent)
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
        raise UserError(
            f"{folder}: cannot be read ({first_line(error)}); if damaged, delete this folder to use the one before"
        ) from error


def restore(folder: Path, state: dict[str, Any], *, model_digest: str, data: str) -> CheckpointInfo:
    """Read a checkpoint of this very run into ``state`` in place, random state included.

    Raises:
        UserError: it is damaged, or the model or the text are not those it was made with.
    """
    info = read_info(folder)
    check_unchanged(folder, model=info.model, model_digest=(info.model_digest, model_digest), data=(info.data, data))
    load(folder, state)
    torch.set_rng_state(state["random"]["cpu"])
    if "cuda" in state["random"]:
        torch.cuda.set_rng_state(state["random"]["cuda"])
    return info


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of the generators a run on ``device`` draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


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
