"""bench/train_resume.py: a trial in its smallest form, and that its comparison sees a single bit."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

# The script itself over a few files of the standard library: tokenising all of it would take most of the time.
DRIVER = """
import sys
from llama_pro_fast.data import stdlib
every_file = stdlib.stdlib_files
stdlib.stdlib_files = lambda kind: every_file(kind)[::8]
import train_resume
whole_recipe = train_resume.recipe

def recipe(*arguments):
    config = whole_recipe(*arguments)
    config.data.held_out = 0.3
    return config

train_resume.recipe = recipe
if __name__ == "__main__":
    sys.exit(train_resume.main())
"""


def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(run_bench, tmp_path):
    script, out = tmp_path / "driver.py", tmp_path / "resume.json"
    script.write_text(DRIVER)
    arguments = ["--device", "cpu", "--steps", "12", "--checkpoint-every", "3", "--out", str(out)]
    finished = run_bench(script, *arguments, TMPDIR=str(tmp_path))
    assert finished.returncode == 0, finished.stdout
    (row,) = json.loads(out.read_text())
    assert row["bit_equal"]
    assert row["exported_tensors"] == 3 + 9 * 6
    assert row["metric_rows"] == 12 + 3 * 2
    assert 6 <= row["resumed_at_step"] < row["killed_after_step"] <= 12
    assert row.keys() >= {"device", "commit", "versions", "command"}
    assert not list(tmp_path.glob("train-resume-*")), "the trial left its folder behind"


@pytest.fixture
def train_resume(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "bench")
    return importlib.import_module("train_resume")


def test_the_comparison_sees_one_bit_of_one_tensor(train_resume, tmp_path):
    weights = {"a": torch.zeros(3), "b": torch.arange(4.0), "c": torch.full((2,), float("nan"))}
    changed = weights | {"a": torch.tensor([0.0, -0.0, 0.0])}
    for name, tensors in {"one": weights, "same": weights, "other": changed, "fewer": {"a": weights["a"]}}.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    assert train_resume.compare_exports(tmp_path / "one", tmp_path / "same") == (3, [])
    count, differences = train_resume.compare_exports(tmp_path / "one", tmp_path / "other")
    assert (count, len(differences)) == (3, 1)
    assert differences[0].startswith("export, a:")
    assert len(train_resume.compare_exports(tmp_path / "fewer", tmp_path / "one")[1]) == 2


def test_the_comparison_sees_a_loss_and_a_missing_step_but_not_a_speed(train_resume, tmp_path):
    def write(name: str, *rows: dict) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    first = {"kind": "train", "step": 1, "loss": 2.0, "tokens_per_second": 10.0}
    second = {"kind": "train", "step": 2, "loss": 1.5, "tokens_per_second": 11.0}
    one = write("one", first, second)
    slower = write("slower", first, second | {"tokens_per_second": 1.0})
    other = write("other", first, second | {"loss": 1.5000000000000002})
    shorter = write("shorter", first)
    assert train_resume.compare_metrics(one, slower) == (2, [])
    for run in (other, shorter):
        (difference,) = train_resume.compare_metrics(one, run)[1]
        assert difference.startswith("metrics, ('train', 2")
