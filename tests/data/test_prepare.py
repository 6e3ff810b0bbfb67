"""The verb `prepare`: what it says of a text, and that a run of the same options finds its tokens."""

from __future__ import annotations

import json
import os
import random

import pytest

from llama_pro_fast import console
from llama_pro_fast.cli import main
from llama_pro_fast.text import preparing


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    draw = random.Random(0)
    rows = [{"text": f"story {i} " + " ".join(f"boat{draw.randrange(97)}" for _ in range(60))} for i in range(80)]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows + rows[:5]))
    (tmp_path / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:40]))
    for file in tmp_path.glob("*.jsonl"):
        os.utime(file, (0, 0))  # of a younger one nothing is remembered
    return ["--model.path", "builtin:prose-3m", "--data.domain", str(path), "--data.held_out", "0.1",
            "--data.general", str(tmp_path / "general.jsonl"), "--train.seq_len", "64"]  # fmt: skip


def test_it_tells_what_there_is_and_makes_it_once(mine, capsys, monkeypatch):
    assert main(["prepare", *mine, "--data.replay", "0.25", "--stats", "--show", "2"]) == 0
    said = capsys.readouterr().out
    for words in (
        "75.0%",
        "25.0%",
        "sequences of 64",
        "5 of 85 documents",
        "40 documents stand in mine and in general",
    ):
        assert words in said
    assert said.count("━━ sequence") == 2
    assert "boat" in said.partition("━━ sequence 1")[2]
    monkeypatch.setattr(preparing, "_made", None)  # nothing is left to make
    assert main(["prepare", *mine]) == 0
    assert "only measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--show", "-1"], "--show: -1"),
        (["--data.domain", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--data.replay", "1"], "--data.replay: 1"),
        (["--train.seq_len", "999999"], "--train.seq_len 999999"),
    ],
)
def test_bad_options_are_one_line(mine, capsys, options, words):
    assert main(["prepare", *mine, *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_log_hears_of_a_wait_once_a_minute(monkeypatch, capsys):
    clock = iter([0, 59, 61, 61, 100, 122, 122])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.waiting("begun") as update:
        for number in range(4):
            update(f"at {number}")
    assert capsys.readouterr().out == "at 1\nat 3\n"
