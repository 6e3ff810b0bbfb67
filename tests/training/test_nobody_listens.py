"""A run needs nobody to listen: whatever becomes of its stdout and stderr, it comes to its end, with its exit code."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import streams

from llama_pro_fast.config import options
from llama_pro_fast.console import say, unheard
from llama_pro_fast.runs.metrics import read_metrics


def words(config) -> list[str]:
    """``train`` and its options for a configuration."""
    given = [(key, value) for key, value, each in options(config) if value not in (None, "auto", each.default)]
    return ["train", *(word for key, value in given for word in (f"--{key}", str(value)))]


@pytest.mark.parametrize("how", ["reader gone", "terminal gone", "missing"])
def test_a_run_whose_output_is_gone_is_like_any_other(make_config, tmp_path, how):
    process = forked.start(
        streams.typed_with, how, words(make_config(train={"steps": 3})), screen=tmp_path / "screen.txt"
    )
    process.join()
    screen = (tmp_path / "screen.txt").read_text()
    assert (process.exitcode, screen) == (0, "")
    rows = (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines()
    assert [json.loads(row)["step"] for row in rows if b'"train"' in row] == [1, 2, 3]
    assert json.loads((tmp_path / "run" / "report" / "summary.json").read_text())["steps"] == 3


@pytest.mark.parametrize("how", ["reader gone", "terminal gone", "missing"])
def test_an_error_that_nobody_hears_of_keeps_its_exit_code(tmp_path, how):
    argv = ["train", "--output", str(tmp_path / "run"), "--resume"]
    process = forked.start(streams.typed_with, how, argv, screen=tmp_path / "screen.txt")
    process.join()
    assert (process.exitcode, (tmp_path / "screen.txt").read_text()) == (2, "")


PLAN = "plan --config llama-2-7b --gpu h100"


def shell(line: str) -> subprocess.CompletedProcess:
    command = line.replace("LPF", shlex.join([sys.executable, "-m", "llama_pro_fast.cli"]))
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirections", "code", "said"),
    [
        ("| true; exit ${PIPESTATUS[0]}", 141, ""),
        ("> /dev/full", 2, "llama-pro-fast: error: stdout cannot be written: No space left on device; free space"),
        (">&- 2>&- <&-", 0, ""),
    ],
)
def test_what_is_only_words_says_where_they_could_not_go(redirections, code, said):
    done = shell(f"LPF {PLAN} {redirections}")
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(said)
    assert len(done.stderr.splitlines()) == (1 if said else 0)


@pytest.mark.slow
@pytest.mark.parametrize("redirections", ["2>&1 | true; exit ${PIPESTATUS[0]}", ">&- 2>&- <&-"])
def test_a_run_from_a_shell_with_nobody_there(make_config, tmp_path, redirections):
    done = shell(f"LPF {shlex.join(words(make_config()))} {redirections}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "run") if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_a_log_whose_disk_was_full_for_a_while_goes_on(monkeypatch):
    class Disk(io.StringIO):
        full = False

        def write(self, text: str) -> int:
            if self.full:
                raise OSError(28, "No space left on device")
            return super().write(text)

    disk = Disk()
    monkeypatch.setattr(sys, "stdout", disk)
    with unheard():
        say("one")
        disk.full = True
        say("two")
        disk.full = False
        say("three")
    assert disk.getvalue() == "one\nthree\n"
    assert sys.stdout is disk


def test_what_a_stream_cannot_spell_is_replaced(monkeypatch):
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, "ascii"))
    with unheard():
        say("12 – 13 tok/s")
    assert content.getvalue() == b"12 ? 13 tok/s\n"


def test_a_closed_stream_and_none_are_no_trouble(monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    monkeypatch.setattr(sys, "stderr", None)
    with unheard():
        say("nobody hears this")
        print("nor this", file=sys.stderr, flush=True)
        assert not sys.stderr.isatty()
    assert (sys.stdout, sys.stderr) == (closed, None)


def test_a_bug_outside_stays_a_bug(tmp_path):
    from llama_pro_fast.cli import run_entry_point

    def bug(argv: list[str] | None) -> int:
        Path(tmp_path / "not written").read_text()
        return 0

    with pytest.raises(FileNotFoundError):
        run_entry_point(bug)
