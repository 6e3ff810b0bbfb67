"""bench/train_resume.py: a trial in its smallest form, and that its comparison sees a single bit."""

from __future__ import annotations

import json

import torch
import train_resume
from safetensors.torch import save_file
from transformers import LlamaConfig

# The script itself over a few files of the standard library: tokenising all of it would take most of the time.
DRIVER = """
import sys
from dataclasses import replace
from llama_pro_fast.text import stdlib
every_file = stdlib.stdlib_files
stdlib.stdlib_files = lambda kind: every_file(kind)[::40]
import train_resume
whole_recipe = train_resume.recipe

def recipe(*arguments):
    config = whole_recipe(*arguments)
    return replace(config, data=replace(config.data, held_out=0.3))

train_resume.recipe = recipe
if __name__ == "__main__":
    sys.exit(train_resume.main())
"""


def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(run_bench, tmp_path):
    script, out = tmp_path / "driver.py", tmp_path / "resume.json"
    script.write_text(DRIVER)
    arguments = ["--device", "cpu", "--steps", "8", "--checkpoint-every", "2", "--out", str(out)]
    finished = run_bench(script, *arguments, TMPDIR=str(tmp_path))
    assert finished.returncode == 0, finished.stdout
    (row,) = json.loads(out.read_text())
    assert row["bit_equal"]
    assert row["exported_tensors"] == 3 + 9 * 6
    assert row["metric_rows"] == 8 + 3 * 2
    assert 4 <= row["resumed_at_step"] < row["killed_after_step"] <= 8
    assert row.keys() >= {"device", "commit", "versions", "command"}


def test_the_comparison_sees_one_bit_of_one_tensor_and_a_loss_but_not_a_speed(tmp_path):
    zeros = {"a": torch.zeros(3), "b": torch.full((2,), float("nan"))}
    exports = {
        "one": zeros,
        "same": zeros,
        "other": zeros | {"a": torch.tensor([0.0, -0.0, 0.0])},
        "fewer": {"b": zeros["b"]},
    }
    found = {}
    for name, tensors in exports.items():
        LlamaConfig(num_hidden_layers=1, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / name)
        save_file(tensors, tmp_path / name / "model.safetensors")
        loss = {"kind": "train", "step": 1, "loss": 2.0 + (name == "other") * 1e-15, "tokens_per_second": len(name)}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(loss) + "\n")
        found[name] = train_resume.tensors(tmp_path / name), train_resume.metrics(tmp_path / name)
    for part in (0, 1):
        assert not train_resume.differences(found["one"][part], found["same"][part])
        assert len(train_resume.differences(found["one"][part], found["other"][part])) == 1
    assert len(train_resume.differences(found["fewer"][0], found["one"][0])) == 1
