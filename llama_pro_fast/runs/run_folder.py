"""The folder of a run: who may write it, what may be deleted from it, and what makes it a run.

    runs/NAME/  config.yaml  metrics.jsonl  tensorboard/  checkpoints/  expanded/ or initial/  export/  report/

`config.yaml` makes a folder a run; it is written when everything that can be refused has been. A lock is held from the
first look at the folder to the end of the run, so that two runs never write one folder; it says which process holds it,
and what that is at. Only a run's own names are ever deleted, and only under ``--overwrite``.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llama_pro_fast.cli import PROGRAM
from llama_pro_fast.config import RunConfig, Settled
from llama_pro_fast.errors import UserError
from llama_pro_fast.files import writing_to
from llama_pro_fast.resume import CONFIG_NAME, changes, load_config, save_config
from llama_pro_fast.runs.checkpoint import complete_checkpoints
from llama_pro_fast.runs.marker import START, read_info, step_of

LOCK = ".lock"
SUMMARY = "report/summary.json"  # what makes a run complete: written last, deleted first
FOLDERS = ("report", "tensorboard", "checkpoints", "expanded", "initial", "export", "wandb")
FILES = ("metrics.jsonl", "metrics.new", START, f"{START}.new")
CONTENTS = (*(name + end for name in FOLDERS for end in ("", ".partial", ".old")), *FILES)


class Claim:
    """A held lock on a run's folder: :meth:`enter` notes what the run is at, for whoever looks in from outside.

    Args:
        descriptor: of the lock; None for a process of a run whose lock another one of it holds.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self._phase = ""

    def enter(self, phase: str) -> None:
        """From now on the run is at ``phase``; a full disk does not matter."""
        if phase != self._phase and self._descriptor is not None:
            self._phase = phase
            note = json.dumps({"process": os.getpid(), "phase": phase}).encode()
            with suppress(OSError):
                os.pwrite(self._descriptor, note.ljust(80), 0)


def phase_of(run: Path) -> str | None:
    """What the process that holds a run's lock is at, or was when it ended; None where that is not noted."""
    try:
        return json.loads((run / LOCK).read_bytes())["phase"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def claimed(output: Path, *, resume: bool, overwrite: bool, patience: float = 0.3) -> Iterator[Claim]:
    """Hold a run's folder: with ``resume`` one that holds a run, else a new or empty one, with ``overwrite`` a run too.

    Nothing is deleted yet (see :func:`begin`).

    Args:
        patience: seconds to wait for another process that holds it. A report does for an instant, to see whether a run
            does; and a run that is asked to stop saves first.

    Raises:
        UserError: the folder is not of that kind, another process holds it, or it cannot be written.
    """
    with writing_to(output):
        if output.exists() and not output.is_dir():
            raise UserError(f"--output {output}: is a file; give a folder")
        created = [folder for folder in (output, *output.parents) if not folder.exists()]
        output.mkdir(parents=True, exist_ok=True)
        has_lock = (output / LOCK).exists()
        # Held open as long as the folder is.
        lock = os.open(output / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        _take(lock, output, patience)
        claim = Claim(lock)
        try:
            if resume:
                load_config(output)
            else:
                _check_free(output, overwrite=overwrite)
            claim.enter("starting")
            yield claim
        finally:
            # A run that was refused leaves no trace.
            with suppress(OSError):
                if not has_lock and not is_run(output):
                    (output / LOCK).unlink()
                    for folder in created:  # one in which something else has begun stays
                        folder.rmdir()
    finally:
        os.close(lock)


def _take(lock: int, output: Path, patience: float) -> None:
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                break
            time.sleep(0.1)
    raise UserError(f"--output {output}: another run is writing there; wait for it or stop it")


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return os.path.isfile(folder / CONFIG_NAME)  # False, too, for a name that is too long


def is_complete(run: Path) -> bool:
    """Whether a run has come to its end, and so cannot go on."""
    return (run / SUMMARY).exists()


def nothing_left(run: Path, config: RunConfig) -> bool:
    """Whether a run is complete, and ``config``, what it would be resumed with, asks for nothing more than its last
    checkpoint was written with.

    Raises:
        UserError: it asks for what a run keeps.
    """
    if not is_complete(run):
        return False
    complete = complete_checkpoints(run)
    then = read_info(complete[-1]).config if complete else load_config(run)
    return not changes(then, config, step=0)


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
    """What to type to go on with the run in ``output``; in one of several processes, to go on with as many."""
    count, here = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    words = [PROGRAM, "train"]
    if count != "1":
        words = ["torchrun", *(["--standalone"] if count == here else ["..."]), "--nproc-per-node", here]
        words += ["-m", "llama_pro_fast.train"]
    return shlex.join([*words, "--output", shown(output), "--resume"])


def shown(path: Path) -> str:
    """A path as a person at this prompt would type it."""
    path, here = Path(path).absolute(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def reopen(output: Path) -> None:
    """A run goes on, so it is not complete."""
    with writing_to(output):
        (output / SUMMARY).unlink(missing_ok=True)


def check_room(output: Path, *, checkpoint: int, keep: int, other: int, overwrite: bool, from_step: int | None) -> None:
    """Refuse a run that its disk will not hold to the end, before it has done anything.

    Args:
        checkpoint: bytes of one; one more than ``keep`` of them are there while a new one is written.
        other: bytes of all else that is still to be written.
        overwrite: the run that is there will be deleted; else its checkpoints give way to new ones.
        from_step: but for those beyond this step, which stay.

    Raises:
        UserError: too little is free.
    """
    given_back = [output / name for name in CONTENTS]
    if not overwrite:
        given_back = [f for f in complete_checkpoints(output) if from_step is None or step_of(f) <= from_step]
    files = (path for place in given_back for path in (place, *place.rglob("*")) if path.is_file())
    free = shutil.disk_usage(output).free + sum(path.stat().st_size for path in files)
    needed = (keep + 1) * checkpoint + other
    if needed > free:
        raise UserError(
            f"--output {output}: {free / 1e9:,.3g} GB are free there, and the run needs {needed / 1e9:,.3g} GB, for "
            f"{keep + 1} checkpoints of {checkpoint / 1e9:,.3g} GB and the model; free space, give another place, or "
            "lower --train.keep_checkpoints"
        )


def begin(config: Settled, output: Path, *, overwrite: bool) -> None:
    """Delete the run the user wants gone, and write ``config.yaml``.

    The old one stays to the end, so that a kill on the way leaves a folder that is still a run.
    """
    _check_free(output, overwrite=overwrite)
    with writing_to(output):
        _remove(output, CONTENTS if overwrite else ())
        save_config(config, output / CONFIG_NAME)


def forget(output: Path) -> None:
    """Delete a run that was begun and is refused after all."""
    with writing_to(output):
        _remove(output, (*CONTENTS, CONFIG_NAME))


def _remove(output: Path, names: Iterable[str]) -> None:
    for name in names:
        path = output / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


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
    if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
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
