"""The card after a run and the summary behind it: every figure is there, every command is one that can be typed."""

from __future__ import annotations

import ast
import copy
import errno
import itertools
import json
import math
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from llama_pro_fast import console, plan
from llama_pro_fast.errors import UserError
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.recipe import parse
from llama_pro_fast.reporting.summary import write_report
from llama_pro_fast.training.cards import show_end
from llama_pro_fast.training.run import run_training


@pytest.fixture
def summary(finished) -> dict:
    return json.loads((finished / "report" / "summary.json").read_text())


@pytest.fixture
def card(capsys, monkeypatch):
    """What the card of a summary prints on a terminal of that width."""

    def printed(summary: dict, run: Path = Path("runs/mine"), width: int = 200) -> str:
        monkeypatch.setattr(console, "console", Console(width=width, highlight=False))
        show_end(summary, run, run / "export")
        return capsys.readouterr().out

    return printed


def command(words: str, text: str) -> list[str]:
    """The command under the comment with these words, as a shell reads it, up to the next comment."""
    lines = text.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith("#") and words in line]
    rest = list(itertools.takewhile(lambda line: not line.startswith("#"), lines[at + 1 :]))
    assert max(map(len, rest)) <= 120, "wider than many terminals: it would break in the middle of a word"
    return shlex.split("\n".join(rest).replace("\\\n", " "))


def test_the_summary_says_what_trained_and_on_what(summary, finished):
    entries = PretrainedFolder(finished / "export").entries
    sizes = {name: math.prod(entry.shape) for name, entry in entries.items()}
    assert summary["trained_blocks"] == [2, 5]
    assert summary["parameters"] == sum(sizes.values())
    trained = ("model.layers.2.", "model.layers.5.")
    assert summary["trained_parameters"] == sum(size for name, size in sizes.items() if name.startswith(trained))
    assert (summary["device"], summary["threads"], summary["dtype"]) == ("cpu", 1, "float32")


def test_every_held_out_text_stands_beside_counting_and_gzip(summary):
    for row in summary["results"]:
        assert 0 < row["unigram_loss"] < 20
        assert 0 < row["unigram_bits_per_byte"] < 8
        assert 0 < row["gzip_bits_per_byte"] < 8


def test_the_summary_is_the_last_file_of_a_run(make_config, monkeypatch, tmp_path):
    """It makes a run complete, so a run that dies in its report has none."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llama_pro_fast.reporting.summary.draw_loss", full)
    with pytest.raises(UserError, match="No space left"):
        run_training(make_config(train={"steps": 1}))
    assert not (tmp_path / "run" / "report" / "summary.json").exists()


@pytest.mark.parametrize("width", [80, 200])
def test_the_card_shows_the_figures_in_full(summary, card, width):
    """80 columns is what a terminal has until it is widened, and a pipe always."""
    summary = copy.deepcopy(summary)
    for row, name in zip(summary["results"], ("stdlib:code", "stdlib:prose"), strict=True):
        row["source"] = name
    text = card(summary, width=width)
    for row in summary["results"]:
        assert row["source"] in text
        for loss in (row["before"]["loss"], row["after"]["loss"]):
            assert f"{loss:.4f}" in text
        assert f"{row['after']['loss'] - row['before']['loss']:+.4f}" in text
        for bits in (row["before"]["bits_per_byte"], row["after"]["bits_per_byte"]):
            assert f"{bits:.3f}" in text
        for key in ("unigram_bits_per_byte", "gzip_bits_per_byte"):
            assert f"{row[key]:.3f}" in text
    whole = " ".join(text.replace("│", " ").split())  # a long value goes on in the next line of its cell
    for row in summary["dial"]:
        change = row["loss"] - row["base_loss"]
        assert (f"{change:+.4f}" if row["scale"] else f"{row['base_loss']:.4f}") in text
    check = summary["export_check"]["said"]
    for words in (
        "blocks 2, 5",
        check,
        summary["dial_said"],
        "runs/mine/export",
        "runs/mine/report/",
        "runs/mine: done",
    ):
        assert words in whole, words


def test_what_is_not_known_is_a_dash(summary, card):
    summary = copy.deepcopy(summary)
    summary["median_tokens_per_second"] = summary["sample"] = None
    for row in summary["results"]:
        row["before"]["bits_per_byte"] = row["after"]["bits_per_byte"] = None
        del row["unigram_bits_per_byte"], row["gzip_bits_per_byte"]
    text = card(summary)
    assert "– tokens/s" in text
    assert "prompt" not in text
    (line,) = [line for line in text.splitlines() if " domain " in line and "–" in line]
    assert line.count("–") == 4


def test_what_a_damaged_row_held_is_a_dash(summary, card, finished, tmp_path):
    """The evaluation that the run started from is lost: its figures are unknown, and so is the change."""
    for row in summary["results"]:
        row["before"] = None
    text = card(summary)
    for row in summary["results"]:
        named = [line for line in text.splitlines() if f" {row['source']} " in line and f" {row['role']} " in line]
        nats, bits, *_ = named
        assert nats.count("–") == 2
        assert bits.count("–") == 1
        assert f"{row['after']['loss']:.4f}" in nats
    for name in ("metrics.jsonl", "config.yaml"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    write_report(tmp_path, summary)
    assert f"| – | {row['after']['loss']:.4f} | – |" in (tmp_path / "report" / "summary.md").read_text()


def test_a_source_and_a_folder_may_have_brackets_in_their_names(summary, card):
    summary = copy.deepcopy(summary)
    summary["results"][0]["source"] = "law[1] [/en]"
    text = card(summary, Path("runs/try[2] [/b]"))
    assert "law[1] [/en]" in text
    assert "runs/try[2] [/b]: done" in text


def test_the_commands_of_the_card_can_be_typed(summary, card, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = card(summary, tmp_path / "runs" / "it's mine")
    run = "runs/it's mine"

    argv = command("your model", text)
    assert argv[:2] == ["llama-pro-fast", "train"]
    config = parse(argv[2:]).config
    assert (config.model.path, config.data.domain, config.expand.groups) == ("MODEL", "mine.jsonl", 8)
    assert config.optim.lr

    argv = command("will it fit", text)
    assert argv[:2] == ["llama-pro-fast", "plan"]
    asked = parse(argv[2:], verb="plan", own=plan.OWN)
    assert (asked.config.model.path, asked.config.expand.groups, asked.own["gpu"]) == ("MODEL", 8, "h100")

    python, c, code = command("generate", text)
    assert (python, c) == ("python", "-c")
    assert f"{run}/export" in [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]

    assert f"pretrained={run}/export" in command("evaluate", text)
    assert command("curves", text) == ["tensorboard", "--logdir", f"{run}/tensorboard"]
    assert command("Ctrl-C", text)[2:] == ["--output", run, "--resume"]


def test_the_sample_in_the_report_is_a_block_of_its_own(finished, summary, tmp_path):
    """The prose it may have learned is Markdown: headings, tables and fences are to be seen, not to be taken so."""
    for name in ("metrics.jsonl", "config.yaml"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    sample = {"prompt": "# a heading", "base": None, "now": "so:\n```\n| a | b |\n\n- an item"}
    write_report(tmp_path, summary | {"sample": sample})
    lines = (tmp_path / "report" / "summary.md").read_text().splitlines()
    for text in (sample["prompt"], sample["now"]):
        wanted = [f"    {line}" for line in text.splitlines()]
        (at,) = [n for n in range(len(lines)) if lines[n : n + len(wanted)] == wanted]
        assert lines[at - 1] == lines[at + len(wanted)] == ""


def test_the_report_names_what_the_model_is_held_against(finished, summary):
    text = (finished / "report" / "summary.md").read_text()
    for row in summary["results"]:
        for key in ("unigram_bits_per_byte", "gzip_bits_per_byte"):
            assert f"{row[key]:.4f}" in text, f"{key} of {row['source']} is not in summary.md"
