"""Checkpoints of a run: the trained parameters, the optimizer, the random state, the position in the data.

    runs/NAME/checkpoints/step-000123/   shard-*.safetensors   PyTorch distributed checkpoint (DCP), safetensors storage
                                         COMPLETE              written last: all that is no tensor, and what proves it

A folder with COMPLETE (marker.py) is a checkpoint, and is believed only once all that this says holds; one without it
is what a crash has left: never read, never written into, swept away before the next save. Any other name in
`checkpoints/` is the user's, and left alone. The frozen base is not copied but named by path and digest.
"""

from __future__ import annotations

import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from llama_pro_fast.console import say
from llama_pro_fast.errors import UserError
from llama_pro_fast.files import first_line, sync, why_refused, writing_to
from llama_pro_fast.ranks import ALONE, Ranks
from llama_pro_fast.resume import CONFIG_NAME
from llama_pro_fast.runs.marker import COMPLETE, STEP, CheckpointInfo, digests_of, read_marker, step_of, write_marker


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was written: where, how large in bytes, and the seconds it took."""

    folder: Path
    num_bytes: int
    seconds: float


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def complete_checkpoints(run: Path) -> list[Path]:
    """The run's folders that call themselves complete, oldest first; whether they are is for :func:`verified`."""
    try:
        return [folder for folder in _ours(run) if (folder / COMPLETE).exists()]
    except OSError as error:
        raise UserError(f"{error.filename or run / 'checkpoints'}: cannot be read: {why_refused(error)}") from error


def chosen(run: Path, step: int | None = None) -> Path | None:
    """The folder of the run's last checkpoint, or of that step's; None where it has none. It is not proved yet.

    Raises:
        UserError: there is none of the step.
    """
    complete = complete_checkpoints(run)
    if step is None:
        return complete[-1] if complete else None
    if (folder := folder_of(run, step)) not in complete:
        there = ", ".join(str(step_of(f)) for f in complete) or "none"
        raise UserError(f"--from_step {step}: {run} has no checkpoint of that step; there is {there}")
    return folder


def newest(run: Path, step: int | None = None) -> tuple[Path, CheckpointInfo] | None:
    """The run's last checkpoint, proved by its digests; None where it has none.

    Args:
        step: take that one instead, as the user asked.

    Raises:
        UserError: it is damaged, or not there; the newest good one is named, and never taken unasked.
    """
    if (folder := chosen(run, step)) is None:
        return None
    try:
        return folder, verified(folder)
    except UserError as error:
        before = [other for other in complete_checkpoints(run) if step_of(other) < step_of(folder)]
        for other in reversed(before):
            try:
                verified(other)
            except UserError:
                continue
            raise UserError(
                f"{error}; {other.name} before it is whole: --from_step {step_of(other)} takes it"
            ) from None
        raise UserError(f"{error}; there is no whole one before it: put it back from a copy, or start anew") from None


def verified(folder: Path) -> CheckpointInfo:
    """What ``folder`` says of itself, once every byte is as it was written.

    Raises:
        UserError: it is not; the message names the file.
    """
    info, files = read_marker(folder / COMPLETE)
    for name in sorted(path.name for path in folder.glob("*.safetensors") if path.name not in files):
        raise UserError(f"{folder}: holds {name}, which was not written with it")
    try:
        sizes = {name: (folder / name).stat().st_size if (folder / name).is_file() else None for name in files}
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {why_refused(error)}") from error
    for name, entry in files.items():
        if sizes[name] != entry["bytes"]:
            found = "is not there" if sizes[name] is None else f"has {sizes[name]:,} bytes, not {entry['bytes']:,}"
            raise UserError(f"{folder}: damaged: {name} {found}")
    for name, digest in digests_of(folder, files).items():
        if digest != files[name]["sha256"]:
            raise UserError(f"{folder}: damaged: {name} does not hold the bytes that were written")
    return info


def save(
    run: Path,
    tensors: Mapping[str, torch.Tensor],
    info: CheckpointInfo,
    *,
    keep: int,
    purge: bool = True,
    entering: Callable[[str], None] = lambda phase: None,
    ranks: Ranks = ALONE,
) -> Saved:
    """Write a checkpoint and drop the oldest beyond ``keep``.

    Args:
        purge: whether any is to be dropped now.
        tensors: where some are sharded (DTensor) every rank writes files, else the first alone.
        entering: told "saving", and "completing" once everything but COMPLETE is written.

    Raises:
        UserError: the place cannot be written or is full; nothing half-written stays, and earlier checkpoints stand.
    """
    started, folder, files = time.perf_counter(), folder_of(run, info.progress.step), {}
    entering("saving")
    try:
        with ranks.together(), writing_to(folder):
            if ranks.leads:
                _make_room(run, folder)
        own: dict[str, dict[str, Any]] = {}
        with ranks.together(), writing_to(folder):
            if ranks.leads or any(isinstance(each, DTensor) for each in tensors.values()):
                _write(folder, tensors, ranks)
                own = _written(folder, ranks.number)
        written = ranks.gather(own)
        with ranks.together(), writing_to(folder):
            if ranks.leads:
                files = _found(folder, written)
                sync(folder)
                entering("completing")
                # The marker comes after everything it vouches for is on disk, and the old ones go after it is.
                write_marker(folder / COMPLETE, info, files)
                sync(folder.parent)
                if purge:
                    _purge(run, keep)
    except BaseException:
        if ranks.leads and not (folder / COMPLETE).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise
    num_bytes = sum(entry["bytes"] for entry in files.values())
    return Saved(folder, num_bytes, time.perf_counter() - started)


def _make_room(run: Path, folder: Path) -> None:
    if not (run / CONFIG_NAME).is_file():
        raise UserError(f"{run}: the run's folder is gone, and with it what a checkpoint would need; nothing was saved")
    for remains in _ours(run):
        if not (remains / COMPLETE).exists() and not remains.is_symlink():
            shutil.rmtree(remains)
    folder.mkdir(parents=True)


def _write(folder: Path, tensors: Mapping[str, torch.Tensor], ranks: Ranks) -> None:
    sharded = any(isinstance(each, DTensor) for each in tensors.values())
    with _plain_errors():
        writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_spread(tensors), save_distributed=True)
        dcp.save(
            dict(tensors),
            storage_writer=writer,
            no_dist=not sharded,
            process_group=ranks.host if sharded else None,
        )


def _written(folder: Path, number: int) -> dict[str, dict[str, Any]]:
    """The files that a rank has written, with size and digest: DCP names a file by its rank, from 1."""
    paths = sorted(folder.glob(f"shard-{number + 1:05d}-*"))
    assert paths, f"no file of rank {number} in {folder}"
    digests = digests_of(folder, [path.name for path in paths])
    return {path.name: {"bytes": path.stat().st_size, "sha256": digests[path.name]} for path in paths}


def _found(folder: Path, written: Sequence[Mapping[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The files of all ranks, which the first one sees as they were written.

    Raises:
        UserError: it does not: the ranks write to different places.
    """
    for number, files in enumerate(written):
        for name, entry in files.items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != entry["bytes"]:
                raise UserError(
                    f"{folder}: {name}, which rank {number} has written, is not there for rank 0; give an --output "
                    "that all machines share"
                )
    return {name: entry for files in written for name, entry in sorted(files.items())}


def restate(folder: Path, info: CheckpointInfo) -> None:
    """Let a checkpoint say ``info`` of itself from now on; its tensors stay.

    Raises:
        UserError: it is damaged, or the place cannot be written; it is what it was then.
    """
    _, files = read_marker(folder / COMPLETE)
    with writing_to(folder):
        write_marker(folder / COMPLETE, info, files)


def load(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Read tensors of a checkpoint, which :func:`verified` has proved, in place.

    Raises:
        UserError: it lacks one of them, or cannot be read.
    """
    try:
        with _plain_errors():
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    except Exception as error:
        raise UserError(
            f"{folder}: cannot be read ({first_line(error)}); check the disk and its permissions"
        ) from error


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, on the meta device: name, shape and dtype.

    Raises:
        UserError: it cannot be read.
    """
    try:
        metadata = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as error:
        raise UserError(
            f"{folder}: cannot be read ({first_line(error)}); check the disk and its permissions"
        ) from error
    return {name: torch.empty(row.size, dtype=row.properties.dtype, device="meta") for name, row in metadata.items()}


def set_aside_after(run: Path, step: int) -> list[Path]:
    """Rename the checkpoints beyond ``step``, from which the run goes on instead; returns their new names.

    Nothing of them is lost, and no later save will touch them: only `step-<digits>` is a checkpoint.
    """
    moved = []
    for folder in complete_checkpoints(run):
        if step_of(folder) > step:
            aside, number = folder.with_name(f"{folder.name}.aside"), 1
            while aside.exists():
                number += 1
                aside = folder.with_name(f"{folder.name}.aside-{number}")
            with writing_to(folder):
                moved.append(folder.rename(aside))
    return moved


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of the generators a run on ``device`` draws from."""
    state = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["random.cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    """The inverse of :func:`random_state`."""
    torch.set_rng_state(state["random.cpu"])
    if "random.cuda" in state:
        torch.cuda.set_rng_state(state["random.cuda"])


def _ours(run: Path) -> list[Path]:
    """What in ``run/checkpoints`` is ours, oldest first: folders named by :func:`folder_of`. A link to one is read, but
    never deleted."""
    if not (run / "checkpoints").is_dir():
        return []
    named = [path for path in (run / "checkpoints").iterdir() if STEP.fullmatch(path.name)]
    return sorted((path for path in named if path == folder_of(run, step_of(path)) and path.is_dir()), key=step_of)


def _purge(run: Path, keep: int) -> None:
    """Delete what is older than the newest ``keep`` whole checkpoints; by markers and sizes, since to prove tens of GB
    takes a while. One that is damaged counts for none, so that a whole one is never deleted in its favour."""
    whole = 0
    for folder in reversed(complete_checkpoints(run)):
        if whole >= keep:
            if not folder.is_symlink():
                _delete(folder)
            continue
        try:
            _, files = read_marker(folder / COMPLETE)
            whole += all((folder / name).stat().st_size == entry["bytes"] for name, entry in files.items())
        except (UserError, OSError):
            continue


def _delete(folder: Path) -> None:
    """COMPLETE first, so that a crash on the way leaves what is known as remains."""
    try:
        (folder / COMPLETE).unlink()
        shutil.rmtree(folder)
    except OSError as error:  # the checkpoint that it gives way to is saved
        say(f"{folder}: could not be deleted ({error.strerror}); delete it by hand")


def _spread(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The number of the file each tensor goes into: one for each block with its moments, one for the rest, since a
    file is put together in memory."""
    groups = {name: match[0] if (match := re.search(r"blocks\.\d+\.", name)) else "" for name in tensors}
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups.values()), start=1)}
    return {name: numbers[group] for name, group in groups.items()}


@contextmanager
def _plain_errors() -> Iterator[None]:
    """DCP without its warning, at every call, that no process group is there, and with the errors a file system raises
    as they are (DCP wraps them in a BaseException)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        try:
            yield
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise cause from error
