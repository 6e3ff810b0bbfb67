"""Folders come into being whole, and what is not ours stays."""

from __future__ import annotations

import errno
import shutil

import pytest

from llama_pro_fast.errors import UserError
from llama_pro_fast.files import MARK, new_folder, writing_to


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with new_folder(tmp_path / "new") as partial:
        (partial / "file").write_text("content")
        assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "file"]


def test_a_failure_leaves_nothing(tmp_path):
    def fail():
        with new_folder(tmp_path / "new") as partial:
            (partial / "file").write_text("content")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_failed_replacement_leaves_the_old(tmp_path):
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "old").touch()
    with pytest.raises(RuntimeError), new_folder(tmp_path / "it", replace=True):
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["it", "old"]
    with new_folder(tmp_path / "it", replace=True) as partial:
        (partial / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["it", "new"]


def test_remains_of_a_crash_are_swept_but_nothing_of_the_users(tmp_path):
    with new_folder(tmp_path / "new") as partial:
        shutil.copytree(partial, tmp_path / "crashed")
    (tmp_path / "crashed").rename(tmp_path / "new.partial")
    (tmp_path / "new").rmdir()
    with new_folder(tmp_path / "new"):
        pass
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "precious").touch()
    with pytest.raises(UserError, match="not ours"), new_folder(tmp_path / "other"):
        pass
    assert (tmp_path / "other.partial" / "precious").exists()


def test_a_kill_between_the_renames_of_a_replacement_loses_nothing(tmp_path):
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "good").touch()
    (tmp_path / "it" / MARK).touch()
    (tmp_path / "it").rename(tmp_path / "it.old")

    def fail():
        with new_folder(tmp_path / "it", replace=True):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "it" / "good").exists()
    assert not (tmp_path / "it.old").exists()


def test_two_writers_of_one_folder(tmp_path):
    def second():
        with new_folder(tmp_path / "it"):
            pass

    with new_folder(tmp_path / "it") as partial:
        (partial / "file").touch()
        with pytest.raises(UserError, match="another process"):
            second()
    assert (tmp_path / "it" / "file").exists()


def test_where_a_folder_cannot_be_renamed_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in (".", "/proc"):
        with pytest.raises(UserError, match="new folder inside"), new_folder(place):
            pass
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with new_folder(tmp_path / "link") as partial:
        (partial / "file").touch()
    assert (tmp_path / "disk" / "file").exists()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "No space left on device; free space"),
        (errno.EDQUOT, "Disk quota exceeded; free space"),
        (errno.EFBIG, "File too large; raise the limit on the size of a file (`ulimit -f unlimited`)"),
        (errno.EACCES, "Permission denied; change its permissions"),
        (errno.EPERM, "Operation not permitted; change its permissions"),
        (errno.EROFS, "Read-only file system; change its permissions or give a place you may write to"),
        (errno.ENAMETOOLONG, "File name too long; give a shorter name"),
        (errno.ENOTDIR, "Not a directory; something is in the way"),
        (errno.EIO, "Input/output error; check the disk"),
    ],
)
def test_what_a_file_system_refuses_is_one_line_with_what_helps(tmp_path, code, words):
    with pytest.raises(UserError) as caught, writing_to(tmp_path):
        raise OSError(code, "refused", str(tmp_path / "file"))
    assert str(caught.value).startswith(f"{tmp_path}: cannot be written: {words}")


def test_a_file_that_is_copied_is_named_if_it_is_the_trouble(tmp_path):
    with pytest.raises(UserError, match=r"^/elsewhere/file: cannot be read: Permission denied"), writing_to(tmp_path):
        raise PermissionError(errno.EACCES, "refused", "/elsewhere/file")
    with pytest.raises(UserError, match=f"^{tmp_path}: cannot be written: No space"), writing_to(tmp_path):
        raise OSError(errno.ENOSPC, "full", "/elsewhere/file", None, str(tmp_path / "file"))


def test_a_folder_that_is_gone_is_one_line_and_a_file_we_forgot_is_a_bug(tmp_path):
    with pytest.raises(FileNotFoundError), writing_to(tmp_path):
        (tmp_path / "a file we forgot to write").read_text()
    with pytest.raises(UserError, match="a folder is gone"), writing_to(tmp_path / "run"):
        (tmp_path / "run" / "file").write_text("")
    with pytest.raises(UserError, match="none can be made there"), new_folder("/proc/x"):
        pass
