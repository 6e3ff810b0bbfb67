"""The README is true: its commands run in its order, and its figures are those of the results they come from."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import forked
import pytest

from llama_pro_fast.recipe import parse

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(<!-- network -->\n)?```(sh|python)\n(.*?)```", re.DOTALL)
NEEDS_NETWORK = ("pip install", "lm_eval")
TRAIN = re.compile(r"(?:python -m llama_pro_fast\.|llama-pro-fast )train\b *")
SHORTER = " --train.steps 2"
"""Of two options the later one counts: a run of twenty steps shows no more than one of two."""
QUICKSTART = "train without options: takes minutes, so .ci/run runs it, from the wheel"


def commands(text: str) -> list[tuple[str, str, bool]]:
    """(language, command, labelled as needing the network) of each shell command and each Python block."""
    found = []
    for label, language, block in BLOCK.findall(text):
        if language == "python":
            found.append((language, block, bool(label)))
            continue
        lines = block.replace("\\\n", " ").splitlines()
        parts = [part.strip() for line in lines for part in line.partition(" #")[0].split("&&")]
        found += [(language, part, bool(label)) for part in parts if part]
    return found


def options(command: str) -> list[str] | None:
    """Of ``train``, as typed; None of another command."""
    found = TRAIN.match(command)
    return shlex.split(command[found.end() :]) if found else None


@pytest.fixture
def run(tmp_path):
    """``run(language, command)`` in a folder with two texts: (exit code, what it printed)."""
    text = "".join(topics.values())
    for name, shift in (("mine", 0), ("general", 500)):
        rows = (text[at + shift : at + shift + 900] for at in range(0, 250_000, 1000))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))

    (tmp_path / "bin").mkdir()
    # Not a link: Python finds its virtual environment by the path it is called by.
    python = f"#!/bin/sh\nexec {shlex.quote(sys.executable)} "
    verb = "-c 'import sys; from llama_pro_fast.cli import main; sys.exit(main())' "
    for name, program in (("python", python), ("llama-pro-fast", python + verb)):
        (tmp_path / "bin" / name).write_text(program + '"$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(paths),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }

    def typed(language: str, command: str) -> tuple[int, str]:
        words = ["python", "-c", command] if language == "python" else shlex.split(command)
        ours = words[:1] == ["llama-pro-fast"] or words[:2] in (["python", "-m"], ["python", "-c"])
        if not ours or (language == "sh" and set(command) & set("|&;<>$*`")):
            shell = subprocess.run(
                ["bash", "-c", command],
                cwd=tmp_path,
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            return shell.returncode, shell.stdout
        screen = tmp_path / "screen.txt"
        screen.unlink(missing_ok=True)
        process = forked.start(forked.typed, words, tmp_path, environment, screen=screen)
        process.join()
        return process.exitcode, screen.read_text()

    return typed


@pytest.mark.slow
def test_every_command_that_needs_no_network_runs(run):
    ran, found = [], commands(README)
    for language, command, network in found:
        if command.startswith(NEEDS_NETWORK) or command == "pytest":
            assert network, f"{command}: needs the network and is not labelled"
            continue
        train = options(command)
        if train == []:
            ran.append(QUICKSTART)
        elif network and train:  # a model from the hub: its options at least are right
            parse(train)
        else:
            code, said = run(language, command + (SHORTER if train and "--train.steps" in train else ""))
            assert code == 0, f"{command}\n{said[-6000:]}"
            ran.append(command)
    assert QUICKSTART in ran
    assert len(ran) > 6


def test_the_quickstart_is_run_before_a_change_lands():
    assert "bench/quickstart.py" in (ROOT / ".ci" / "run").read_text()
    quickstart = (ROOT / "bench" / "quickstart.py").read_text()
    assert '[sys.executable, "-m", "llama_pro_fast.train"]' in quickstart
    assert "quickstart_check.py" in quickstart


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_the_options_of_every_training_command_in_the_docs_are_right(page):
    for _, command, _ in commands(page.read_text(encoding="utf-8")):
        train = options(command)
        if train:
            parse(train[: train.index("--resume")] if "--resume" in train else train)  # there is no run to resume


def test_every_local_link_and_picture_is_there():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
