"""Writing so that nothing half-written looks complete, and so that what a file system refuses is one clear line."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from llama_pro_fast.errors import UserError

MARK = ".half-written"


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Write a folder under the name ``NAME.partial``; it gets its own only when the body has succeeded.

    Args:
        replace: a folder of that name may be there; it is deleted once the new one is in its place.

    Raises:
        UserError: there is something at ``path`` already, the place cannot be written or is full, or ``NAME.partial``
            is there and not ours to delete.
    """
    path = Path(path).resolve()
    if path.is_mount() or path == Path.cwd():
        raise UserError(f"{path}: cannot be renamed into place; give a new folder inside it")
    if not replace and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: there is something there already; give another folder or delete it")
    partial, old = path.with_name(path.name + ".partial"), path.with_name(path.name + ".old")
    with writing_to(path):
        if _is_ours(old) and not path.exists():
            old.rename(path)  # a crash between the two renames below
        for remains in (partial, old):
            _remove_remains(remains)
        partial.mkdir(parents=True)
        mark = open(partial / MARK, "w")  # noqa: SIM115 - its lock lives as long as the writing
    with mark:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            with writing_to(path):
                yield partial
                # A rename may reach the disk before the files' bytes do, and a power cut would then leave empty shards.
                for file in partial.rglob("*"):
                    if file.is_file():
                        sync(file)
                if path.exists():
                    (path / MARK).touch()
                    path.rename(old)
                partial.rename(path)
                (path / MARK).unlink()
                sync(path.parent)
                _remove(old)
        except BaseException:
            _remove(partial)
            if old.exists() and not path.exists():
                old.rename(path)
                (path / MARK).unlink()
            raise


def _is_ours(folder: Path) -> bool:
    return folder.is_dir() and ((folder / MARK).exists() or not any(folder.iterdir()))


def _remove_remains(folder: Path) -> None:
    if not folder.exists():
        return
    if not _is_ours(folder):
        raise UserError(f"{folder}: is in the way and not ours to delete; move it")
    if (folder / MARK).exists():
        with open(folder / MARK) as mark:
            try:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{folder}: another process is writing there; wait for it") from error
    _remove(folder)


def _remove(folder: Path) -> None:
    """Delete a folder, its mark last: a kill on the way leaves remains that are known as such."""
    if not folder.exists():
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()
    (folder / MARK).unlink(missing_ok=True)
    folder.rmdir()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing_to(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what a file system refuses (rights, space) into one line naming the place."""
    try:
        yield
    except OSError as error:
        # A file that is not where we look for it is our mistake, not the file system's.
        if error.errno in (None, errno.ENOENT):
            raise
        raise UserError(
            f"{path}: cannot be written: {os.strerror(error.errno)}; free space or give another place"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
