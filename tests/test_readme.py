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

import pytest

from llama_pro_fast.recipe import parse

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(<!-- network -->\n)?```(sh|python)\n(.*?)```", re.DOTALL)
NEEDS_NETWORK = ("pip install", "lm_eval")
TRAIN = "python -m llama_pro_fast.train "


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


def test_every_command_that_needs_no_network_runs(tmp_path):
    (tmp_path / "bin").mkdir()
    # Not a link: Python finds its virtual environment by the path it is called by.
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    text = "".join(topics.values())
    for name, shift in (("mine", 0), ("general", 500)):
        rows = (text[at + shift : at + shift + 900] for at in range(0, 250_000, 1000))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    python_path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "PATH": path,
        "PYTHONPATH": python_path,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    ran = []
    for language, command, network in commands(README):
        if command.startswith(NEEDS_NETWORK) or command == "pytest":
            assert network, f"{command}: needs the network and is not labelled"
            continue
        if network and command.startswith(TRAIN):  # a model from the hub: its options at least are right
            parse(shlex.split(command)[3:])
            continue
        argv = [sys.executable, "-c", command] if language == "python" else ["bash", "-c", command]
        result = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        ran.append(command)
    assert TRAIN.strip() in ran
    assert len(ran) > 6

    # What the quickstart has shown on the way.
    check = [sys.executable, str(ROOT / ".ci" / "quickstart_check.py"), str(tmp_path / "runs" / "quickstart")]
    subprocess.run(check, check=True)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_the_options_of_every_training_command_in_the_docs_are_right(page):
    for _, command, _ in commands(page.read_text(encoding="utf-8")):
        if command.startswith(TRAIN):
            parse([part for part in shlex.split(command)[3:] if part != "--resume"])


def test_every_local_link_and_picture_is_there():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_figures_of_the_controls_are_those_of_the_result():
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        from quickstart_controls import markdown
    finally:
        sys.path.remove(str(ROOT / "bench"))
    rows = json.loads((ROOT / "bench" / "results" / "quickstart-controls-cpu.json").read_text())
    assert markdown(rows) in README
