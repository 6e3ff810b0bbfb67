"""A tensor's bytes are hashed once, as long as its file does not change."""

from __future__ import annotations

import os
import time

import pytest

from llama_pro_fast.digests import tensor_digest


@pytest.fixture
def asked(tmp_path):
    """Ask for the digest of a file's content; returns it and whether the file was read."""

    def ask(name="weights", tensor="w"):
        file, read = tmp_path / name, []

        def content():
            read.append(1)
            yield memoryview(file.read_bytes())

        return tensor_digest(file, tensor, content), bool(read)

    return ask


def write(path, content: bytes, seconds_ago: float) -> None:
    path.write_bytes(content)
    then = time.time() - seconds_ago
    os.utime(path, (then, then))


def test_an_unchanged_file_is_read_once(asked, tmp_path):
    write(tmp_path / "weights", b"one", 60)
    first, read = asked()
    assert read
    assert asked() == (first, False)
    assert asked("weights", "another tensor") == (first, True)


@pytest.mark.parametrize(("content", "ago"), [(b"two", 30), (b"longer", 60)], ids=["a new time", "another size"])
def test_a_changed_file_is_read_again(asked, tmp_path, content, ago):
    write(tmp_path / "weights", b"one", 60)
    before, _ = asked()
    write(tmp_path / "weights", content, ago)
    after, read = asked()
    assert read
    assert after != before


def test_a_young_file_is_not_remembered(asked, tmp_path):
    """It might be written once more within the tick of the clock that its time is."""
    (tmp_path / "weights").write_bytes(b"one")
    asked()
    assert asked()[1]
