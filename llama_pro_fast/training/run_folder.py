"""The folder of a run: who may write it, what may be deleted from it, and what makes it a run.

    runs/NAME/  config.yaml  metrics.jsonl  tensorboard/  checkpoints/  expanded/ or initial/  export/  report/

`config.yaml` makes a folder a run; it is written when everything that can be refused has been. A lock is held from the
first look at the folder to the end of the run, so that two runs never write one folder. Only a run's own names are ever
deleted, and only under ``--overwrite``.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llama_pro_fast.cli import PROGRAM
from llama_pro_fast.config import Settled
from llama_pro_fast.errors import UserError
from llama_pro_fast.files import writing_to
from llama_pro_fast.resume import CONFIG_NAME, load_config, save_config
from llama_pro_fast.training.checkpoint import complete_checkpoints, read_info

LOCK = ".lock"
SUMMARY = "report/summary.json"  # what makes a run complete: written last, deleted first
FOLDERS = ("report", "tensorboard", "checkpoints", "expanded", "initial", "export", "wandb")
CONTENTS = (*(name + end for name in FOLDERS for end in ("", ".partial", ".old")), "metrics.jsonl", "metrics.new")


@contextmanager
def claimed(output: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Hold a run's folder: with ``resume`` one that holds a run, else a new or empty one, with ``overwrite`` a run too.

    Nothing is deleted yet (see :func:`begin`).

    Raises:
        UserError: the folder is not of that kind, another process holds it, or it cannot be written.
    """
    with writing_to(output):
        if output.exists() and not output.is_dir():
            raise UserError(f"--output {output}: is a file; give a folder")
        created = [folder for folder in (output, *output.parents) if not folder.exists()]
        output.mkdir(parents=True, exist_ok=True)
        lock = open(output / LOCK, "a")  # noqa: SIM115 - held open as long as the folder is
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--output {output}: another run is writing there; wait for it or stop it") from error
        try:
            if resume:
                load_config(output)
            else:
                _check_free(output, overwrite=overwrite)
            yield
        finally:
            # A run that was refused leaves no trace.
            if created and [path.name for path in output.iterdir()] == [LOCK]:
                (output / LOCK).unlink()
                with suppress(OSError):  # a folder in which something else has begun stays
                    for folder in created:
                        folder.rmdir()


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return os.path.isfile(folder / CONFIG_NAME)  # False, too, for a name that is too long


def is_complete(run: Path) -> bool:
    """Whether a run has come to its end, and so cannot go on."""
    return (run / SUMMARY).exists()


def first_free(folder: Path) -> Path:
    """``folder``, or where that holds a complete run ``folder-2``, and so on.

    Raises:
        UserError: on the way there is an interrupted run, which should be resumed, or one that is still going on.
    """
    number, candidate = 1, folder
    while is_run(candidate):
        if not is_complete(candidate):
            with claimed(candidate, resume=True, overwrite=False):
                complete, steps = complete_checkpoints(candidate), load_config(candidate).train.steps
                done = read_info(complete[-1]).progress.step if complete else 0
                raise UserError(
                    f"{candidate}: holds an interrupted run, saved at step {done} of {steps}; go on with  "
                    f"{resume_command(candidate)}  (or delete the folder to start anew)"
                )
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def resume_command(output: Path) -> str:
    """What to type to go on with the run in ``output``."""
    return shlex.join([PROGRAM, "train", "--output", shown(output), "--resume"])


def shown(path: Path) -> str:
    """A path as a person at this prompt would type it."""
    path, here = Path(path).absolute(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def begin(config: Settled, output: Path, *, overwrite: bool) -> None:
    """Delete the run the user wants gone, and write ``config.yaml``.

    The old one stays to the end, so that a kill on the way leaves a folder that is still a run.
    """
    _check_free(output, overwrite=overwrite)
    with writing_to(output):
        for name in CONTENTS if overwrite else ():
            path = output / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        save_config(config, output / CONFIG_NAME)


def check_apart(output: Path, sources: Iterable[str], cache: str | Path) -> None:
    """Refuse a run that would write, or delete, over what it reads, or read what it writes.

    Args:
        sources: files or folders of text.
        cache: the folder of tokens.

    Raises:
        UserError: one of them lies in the run's folder, or the run or the cache in a source.
    """
    check_not_inside("data.cache", cache, output)
    for source in sources:
        check_not_inside("data", source, output)
        if Path(source).is_dir():
            for option, path in (("output", output), ("data.cache", cache)):
                check_not_inside(option, path, Path(source))


def check_not_inside(option: str, path: str | Path, folder: Path) -> None:
    """Refuse a path that lies in ``folder``.

    Raises:
        UserError: it does.
    """
    if Path(path).resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--{option} {path}: lies inside {folder}, which the run reads or writes; put it elsewhere")


def _check_free(output: Path, *, overwrite: bool) -> None:
    found = sorted(path.name for path in output.iterdir() if path.name not in (LOCK, "config.new"))
    if not found:
        return
    if CONFIG_NAME not in found:
        raise UserError(f"--output {output}: holds other files ({found[0]}); give an empty or a new folder")
    try:
        load_config(output)
    except UserError as error:
        raise UserError(
            f"--output {output}: its {CONFIG_NAME} is not of a run; give an empty or a new folder"
        ) from error
    if not overwrite:
        raise UserError(f"--output {output}: holds a run; add --resume to go on with it or --overwrite to delete it")
