"""docs/python.md is true: its code runs, in its order."""

from __future__ import annotations

import json
import re
from pathlib import Path
from pydoc_data.topics import topics

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "python.md"


@pytest.mark.slow
def test_the_code_of_the_python_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = "".join(topics.values())
    for name, shift in (("mine", 0), ("general", 500)):
        rows = (text[at + shift : at + shift + 900] for at in range(0, 100_000, 1000))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(code, names)
    new = {"2", "5", "8"}  # three groups of the packaged base's six blocks
    assert {name.split(".")[2] for name in names["names"]} == new
    assert {name.split(".")[1] for name in names["decoder"].trained_parameters()} == new
    frozen = [p for p in names["model"].parameters() if not p.requires_grad]
    assert frozen
    assert all(p.grad is None for p in frozen)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert names["summary"]["trained_blocks"] == [2, 5, 8]
