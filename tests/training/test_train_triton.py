"""A run through the Triton kernels, in their interpreter, has the losses of a run through plain PyTorch, step by step.

The interpreter is for a whole process, so each run is one of its own, started as a user starts it.
"""

import os
import subprocess
import sys
import time

import pytest
import yaml

from llama_pro_fast.recipe import to_dict
from llama_pro_fast.training.metrics import read_metrics

STEPS = 3
TRAIN = {"steps": STEPS, "seq_len": 24, "batch_size": 2, "micro_batch_size": 1}


@pytest.fixture
def run(make_config, tmp_path):
    """``run(name, TRITON_INTERPRET)`` -> (metrics, the screen), up to the last evaluation: the read-back generates."""

    def start(name, interpret):
        config = make_config(output=str(tmp_path / name), train=TRAIN, eval={"every": STEPS, "tokens": 24})
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump({k: v for k, v in to_dict(config).items() if v is not None}))
        command = [sys.executable, "-m", "llama_pro_fast.train", "--config", str(recipe)]
        environment = {**os.environ, "TRITON_INTERPRET": interpret}
        screen = tmp_path / f"{name}.txt"
        with open(screen, "w") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
            try:
                while len(rows := finished_evaluation(tmp_path / name)) < 2 and process.poll() is None:
                    time.sleep(0.2)
            finally:
                process.kill()
                process.wait()
        assert len(rows) == 2, screen.read_text()
        return list(read_metrics(tmp_path / name)), screen.read_text()

    return start


def finished_evaluation(folder):
    """The rows of the evaluation after the last step that are written."""
    if not (folder / "metrics.jsonl").exists():
        return []
    return [row for row in read_metrics(folder) if row["kind"] == "eval" and row["step"] == STEPS]


def test_losses_through_triton_are_those_through_pytorch(run):
    pytest.importorskip("triton")
    expected, plain_screen = run("pytorch", "0")
    got, screen = run("triton", "1")
    assert "kernels pytorch" in plain_screen
    assert ", interpreted" in screen
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours["kind"] == theirs["kind"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-6)
        if ours["kind"] == "train":
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-5)
    steps = [row["loss"] for row in got if row["kind"] == "train"]
    assert len(steps) == STEPS
    assert steps[-1] < steps[0]
    # The meter of forgetting starts at exactly nothing there, too.
    first = [row for row in got if row["kind"] == "eval" and row["step"] == 0 and row["role"] == "general"]
    assert first
    assert all(row["kl"] == 0 and row["loss"] == row["base_loss"] for row in first)
