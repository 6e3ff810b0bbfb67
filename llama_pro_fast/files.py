"""Writing so that nothing half-written looks complete, and so that what a file system refuses is one clear line."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
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
    path = Path(os.path.realpath(path))  # Path.resolve fails on links in a circle
    partial, old = path.with_name(path.name + ".partial"), path.with_name(path.name + ".old")
    with writing_to(path):
        if path.is_mount() or path == Path.cwd():
            raise UserError(f"{path}: cannot be renamed into place; give a new folder inside it")
        if not replace and path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path}: there is something there already; give another folder or delete it")
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


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file so that nobody ever reads a part of it; after a power cut it may be lost, or damaged."""
    descriptor, temporary = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing_to(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what a file system refuses at ``path`` or below it (rights, space, names) into one line naming the place."""
    try:
        yield
    except OSError as error:
        if error.errno is None or _is_a_bug(error, Path(path)):
            raise
        if (source := _read_elsewhere(error, Path(path))) is not None:
            raise UserError(f"{source}: cannot be read: {why_refused(error)}") from error
        raise UserError(f"{path}: cannot be written: {why_refused(error)}") from error


def why_refused(error: OSError) -> str:
    """What a file system said, and what helps: ``No space left on device; free space or give another place``."""
    if error.errno is None:
        return str(error)
    return f"{os.strerror(error.errno)}; {_REMEDIES.get(error.errno, 'give another place')}"


_SPACE = "free space or give another place"
_RIGHTS = "change its permissions or give a place you may write to"
_IN_THE_WAY = "something is in the way there, move it or give another place"
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: f"{_SPACE}, the disk quota is used up",
    errno.EFBIG: "raise the limit on the size of a file (`ulimit -f unlimited`) or give another place",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "links lead in a circle, give another place",
    errno.EEXIST: _IN_THE_WAY,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EISDIR: _IN_THE_WAY,
    errno.ENOTEMPTY: _IN_THE_WAY,
    errno.ENOENT: "a folder is gone, or none can be made there; give another place",
    errno.EIO: "check the disk or give another place",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
}


def _is_a_bug(error: OSError, place: Path) -> bool:
    """A file that is not where we look for it is our mistake, unless its folder is gone or it is the place itself."""
    if error.errno != errno.ENOENT or not isinstance(error.filename, str | os.PathLike):
        return False
    folder = Path(error.filename).absolute().parent
    return folder.is_dir() and folder != place.absolute().parent


def _read_elsewhere(error: OSError, place: Path) -> str | None:
    """The file that was refused, if it is none at the place: what is written there may be a copy."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or not isinstance(error.filename, str):
        return None
    file, place = Path(error.filename).absolute(), place.absolute()
    return None if place.is_relative_to(file) or file.is_relative_to(place.parent) else error.filename


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse what is there and is neither a file nor a folder: a pipe or a device may give no end of bytes, or none.

    Raises:
        UserError: it is.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(f"{path}: a pipe, a socket or a device; give a file")


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
