"""A run through the Triton kernels, in their interpreter, has the losses of a run through plain PyTorch, step by step.

The interpreter is for a whole process, so that run is one of its own, started as a user starts it.
"""

import os
import subprocess
import sys
import time

import pytest
import yaml

from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.expansion.proof import expand_and_prove
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.resume import to_dict
from llama_pro_fast.runs.metrics import read_metrics
from llama_pro_fast.training.run import run_training

STEPS, SEQ_LEN = 3, 12
TRAIN = {"steps": STEPS, "seq_len": SEQ_LEN, "batch_size": 2, "micro_batch_size": 1}


@pytest.fixture
def config(base_of, make_config, tmp_path):
    """Blocks of every class: below the first new one, new, frozen above it."""
    expand_and_prove(
        PretrainedFolder(base_of(num_hidden_layers=2)), tmp_path / "model", ExpansionPlan.from_groups(2, 2)
    )
    model, evaluation = {"path": str(tmp_path / "model")}, {"every": STEPS, "tokens": SEQ_LEN}
    return lambda output: make_config(output=output, model=model, expand={"groups": None}, train=TRAIN, eval=evaluation)


@pytest.fixture
def interpreted(config, tmp_path):
    """(metrics, the screen) of such a run in Triton's interpreter, up to the last evaluation: the read-back
    generates."""
    run, recipe, screen = tmp_path / "triton", tmp_path / "triton.yaml", tmp_path / "triton.txt"
    recipe.write_text(yaml.safe_dump({k: v for k, v in to_dict(config(run)).items() if v is not None}))
    command = [sys.executable, "-m", "llama_pro_fast.train", "--config", str(recipe)]
    with open(screen, "w") as file:
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            while len(rows := finished_evaluation(run)) < 2 and process.poll() is None:
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
    assert len(rows) == 2, screen.read_text()
    return read_metrics(run), screen.read_text()


def finished_evaluation(folder):
    """The rows of the evaluation after the last step that are written."""
    if not (folder / "metrics.jsonl").exists():
        return []
    return [row for row in read_metrics(folder) if row["kind"] == "eval" and row["step"] == STEPS]


@pytest.mark.slow
def test_losses_through_triton_are_those_through_pytorch(config, interpreted, tmp_path, capsys):
    pytest.importorskip("triton")
    run_training(config(tmp_path / "pytorch"))
    expected, (got, screen) = read_metrics(tmp_path / "pytorch"), interpreted
    expected, got = ([row for row in rows if row["kind"] in ("train", "eval")] for rows in (expected, got))
    assert "kernels pytorch" in capsys.readouterr().out
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
