"""Digests: an unchanged file is not read again, any other is, and the notes can only spare a reading."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from llama_pro_fast import digests
from llama_pro_fast.digests import file_digests
from llama_pro_fast.errors import UserError


def write(path: Path, content: bytes, *, age: float = 60.0) -> Path:
    """A file that was last written ``age`` seconds ago."""
    path.write_bytes(content)
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))
    return path


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Names of the files that have been read."""
    real, names = hashlib.file_digest, []

    def counted(file, algorithm):
        names.append(Path(file.name).name)
        return real(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return names


def test_only_a_file_that_has_changed_is_read_again(tmp_path, cache, reads, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [write(tmp_path / name, name.encode()) for name in ("a", "b")]
    assert file_digests(paths, cache) == [digest(b"a"), digest(b"b")]
    assert reads == ["a", "b"]
    assert file_digests([Path("b"), *paths], cache) == [digest(b"b"), digest(b"a"), digest(b"b")]
    assert reads == ["a", "b"]
    write(paths[1], b"B", age=50)
    assert file_digests(paths, cache) == [digest(b"a"), digest(b"B")]
    assert reads == ["a", "b", "b"]
    assert os.listdir(cache) == ["digests.json"]


@pytest.mark.parametrize("change", ["touched", "longer", "another file"])
def test_what_tells_a_change(tmp_path, cache, reads, change):
    path = write(tmp_path / "a", b"old")
    then = path.stat()
    file_digests([path], cache)
    content = b"old"
    if change == "touched":
        os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns + 1))
    else:
        content = b"longer" if change == "longer" else b"new"
        if change == "another file":
            path.rename(tmp_path / "kept")  # so that its inode is not given again
        path.write_bytes(content)
        os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert file_digests([path], cache) == [digest(content)]
    assert reads == ["a", "a"]


@pytest.mark.parametrize("age", [0.0, -3600.0])
def test_a_file_that_may_still_change_unseen_is_not_noted(tmp_path, cache, reads, age):
    path = write(tmp_path / "a", b"a", age=age)
    for _ in range(2):
        assert file_digests([path], cache) == [digest(b"a")]
    assert reads == ["a", "a"]


DAMAGED = [
    "",
    "{",
    "[]",
    '"a"',
    "\0\0",
    "[" * 100_000,
    "NAME: 3",
    "NAME: [1, 2, 3]",
    'NAME: [1, 2, "3", "x"]',
    "NAME: {}",
]


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_notes_cost_a_reading_and_nothing_else(tmp_path, cache, reads, damage):
    path = write(tmp_path / "a", b"a")
    cache.mkdir()
    damage = f"{{{damage.replace('NAME', json.dumps(str(path)))}}}" if "NAME" in damage else damage
    (cache / "digests.json").write_text(damage)
    for _ in range(2):
        assert file_digests([path], cache) == [digest(b"a")]
    assert reads == ["a"]


def test_notes_that_cannot_be_written_are_done_without(tmp_path, cache, reads, monkeypatch):
    path = write(tmp_path / "a", b"a")
    cache.write_text("a file")
    assert file_digests([path], cache) == [digest(b"a")]
    cache.unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(digests.json, "dump", full)
        assert file_digests([path], cache) == [digest(b"a")]
    assert os.listdir(cache) == []
    assert reads == ["a", "a"]


def test_a_file_that_is_gone_is_named_even_if_it_was_noted(tmp_path, cache):
    path = write(tmp_path / "a.txt", b"a")
    file_digests([path], cache)
    path.unlink()
    with pytest.raises(UserError, match=r"a\.txt: cannot be read \(No such file"):
        file_digests([path], cache)
