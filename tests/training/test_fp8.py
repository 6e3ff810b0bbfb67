"""Runs whose frozen blocks pass the gradient on in eight bits: what stays to the bit, what nearly, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from runs_read import digests, losses

import llama_pro_fast
from llama_pro_fast.errors import UserError
from llama_pro_fast.model import block
from llama_pro_fast.model.block import PROJECTIONS
from llama_pro_fast.plan import main as plan_main
from llama_pro_fast.planning import devices
from llama_pro_fast.runs.metrics import read_metrics
from llama_pro_fast.train import main as train_main
from llama_pro_fast.training import settle
from llama_pro_fast.training.run import run_training

FP8 = {"fp8": "backward"}


@pytest.fixture(scope="module")
def finished_fp8(config_at, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished-fp8") / "run"
    run_training(config_at(run, train=FP8))
    return run


def test_everything_but_the_gradient_is_that_of_a_run_without(finished, finished_fp8):
    """The first step's loss, all that is measured before it, the base beside every evaluation, every frozen byte."""
    plain, ours = losses(finished), losses(finished_fp8)
    assert len(plain) == len(ours)
    before = [row for row in plain if row[:2] == ("eval", 0)]
    assert before
    assert [row for row in ours if row[:2] == ("eval", 0)] == before
    first, other = (next(row for row in rows if row[0] == "train") for rows in (plain, ours))
    assert (first[3], first[3] > 0) == (other[3], True)
    assert first[6] == pytest.approx(other[6], rel=0.05), "the gradient's norm"
    assert first[6] != other[6], "nothing was in eight bits"
    for (kind, step, *_, base, _, _, _), (*_, again, _, _, _) in zip(plain, ours, strict=True):
        assert base == again, (kind, step)
    expanded, ours = digests(finished_fp8 / "expanded"), digests(finished_fp8 / "export")
    plain = digests(finished / "export")
    changed = {name for name in expanded if expanded[name] != ours[name]}
    assert changed == {name for name in expanded if expanded[name] != plain[name]}
    assert {name.split(".")[2] for name in changed} == {"2", "5"}


def test_it_learns_as_much(finished, finished_fp8):
    runs = finished, finished_fp8
    ends = [[row["loss"] for row in read_metrics(run) if row["kind"] == "eval"][-2:] for run in runs]
    assert ends[0] == pytest.approx(ends[1], rel=0.01)


def test_a_model_of_no_such_matrix_is_refused(config_at, base_of, tmp_path, cli):
    base = base_of(hidden_size=24, intermediate_size=40, head_dim=10)
    code, _, err = cli(
        lambda argv: run_training(config_at(tmp_path / "run", model={"path": str(base)}, train=FP8)) and 0
    )
    cli.refused(code, err, "--train.fp8 backward: of this model's matrices none", "give --train.fp8 none")
    assert not (tmp_path / "run").exists()


def test_a_model_loaded_so_holds_transposes_where_a_run_would(finished_fp8):
    blocks = llama_pro_fast.load(finished_fp8 / "expanded", fp8="backward").blocks
    assert [sorted(block.transposed) for block in blocks] == [[], [], [], sorted(PROJECTIONS), sorted(PROJECTIONS), []]
    assert not any(block.transposed for block in llama_pro_fast.load(finished_fp8 / "expanded").blocks)
    with pytest.raises(UserError, match="give 'none' or 'backward'"):
        llama_pro_fast.load(finished_fp8 / "expanded", fp8="Backward")


def on_one_line(said: str) -> str:
    """Of a box, whose long rows are wrapped."""
    return " ".join(said.replace("│", " ").replace("|", " ").split())


def test_it_is_said_where_a_run_says_what_it_is(finished_fp8, config_at, tmp_path, capsys):
    assert json.loads((finished_fp8 / "report" / "summary.json").read_text())["fp8"] == "backward"
    assert "fp8 backward" in (finished_fp8 / "report" / "report.html").read_text()
    run_training(config_at(tmp_path / "run", train=FP8 | {"steps": 1}))
    said = on_one_line(capsys.readouterr().out)
    assert "dX of the 2 frozen blocks with a backward; on a CPU imitated, which gains nothing" in said


def test_a_matrix_that_cannot_be_in_eight_bits_is_named(config_at, base_of, tmp_path, capsys):
    base = base_of(intermediate_size=72)
    run_training(config_at(tmp_path / "run", model={"path": str(base)}, train=FP8 | {"steps": 1}))
    said = on_one_line(capsys.readouterr().out)
    assert "but for down_proj [32, 72], whose sides are no multiples of 16" in said


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_number_on_its_way_through_frozen_blocks_leaves_the_step_out(bad, make_config, monkeypatch):
    """In a gradient that only codes carry on: it reaches the trained block below through a scale."""
    make, calls = block.swiglu_backward_e4m3, []

    def poisoned(dswiglu, gate_up):
        calls.append(1)
        if len(calls) == 9:  # 2 blocks in 2 micro-batches a step: the third step
            dswiglu = dswiglu.clone()
            dswiglu[3, 5] = bad
        return make(dswiglu, gate_up)

    monkeypatch.setattr(block, "swiglu_backward_e4m3", poisoned)
    config = make_config(train=FP8)
    assert run_training(config)["steps"] == 6
    skipped = [row for row in read_metrics(Path(config.output)) if row["kind"] == "skipped"]
    assert [(row["step"], row["loss"] == "nan", row["grad_norm"]) for row in skipped] == [(3, False, "nan")]


def test_it_may_be_changed_on_a_resume_and_that_is_said(stopped_at_2, make_config, tmp_path, cli):
    stopped_at_2(make_config(train=FP8))
    code, out, err = cli(train_main, "--output", tmp_path / "run", "--resume", "--train.fp8", "none")
    assert code == 0, err
    assert "changed: train.fp8 backward -> none; gradients are rounded otherwise" in out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expand": {"groups": None}, "train": FP8 | {"parameters": "all"}}, "no frozen block lies above"),
        ({"expand": {"groups": None, "after": [3]}, "train": FP8}, "no frozen block lies above"),
    ],
)
def test_where_nothing_could_be_in_eight_bits_it_is_refused(changes, said, make_config, cli):
    code, _, err = cli(lambda argv: run_training(make_config(**changes)) and 0)
    cli.refused(code, err, "--train.fp8 backward", said, "give --train.fp8 none")


def test_a_device_that_cannot_is_named_before_any_work(make_config, cli, monkeypatch, tmp_path, base):
    why = "NVIDIA A100 does not multiply eight-bit floats, which Ada, Hopper and later cards do"
    monkeypatch.setattr(settle, "missing_e4m3", lambda device: why)
    code, _, err = cli(lambda argv: run_training(make_config(train=FP8)) and 0)
    cli.refused(code, err, f"--train.fp8 backward: {why}; give --train.fp8 none")
    assert not (tmp_path / "run").exists()
    asked = ["--model.path", base, "--expand.groups", "2", "--train.fp8", "backward"]
    code, _, err = cli(plan_main, *asked, "--gpu", "a100-80")
    cli.refused(code, err, "A100 80 GB does not multiply eight-bit floats")
    code, _, err = cli(plan_main, *asked, "--gpu", "h100", "--train.dtype", "float32")
    cli.refused(code, err, "come out in bfloat16, and --train.dtype is float32")
    assert cli(plan_main, *asked, "--gpu", "h100")[0] == 0


def with_card(monkeypatch, capability, hip=None):
    """As much of PyTorch as is asked about a card."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", hip)


@pytest.mark.parametrize(
    ("capability", "hip", "said"),
    [((8, 0), None, "Card does not multiply eight-bit floats"), ((9, 4), "6.4", "Card is an AMD card")],
)
def test_why_a_card_cannot_is_said(capability, hip, said, monkeypatch):
    with_card(monkeypatch, capability, hip)
    assert said in settle.missing_e4m3(torch.device("cuda"))


def test_a_card_in_the_machine_is_known_by_its_capability(monkeypatch):
    for capability, can in (((8, 6), False), ((8, 9), True), ((12, 0), True)):
        with_card(monkeypatch, capability)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index=0: (1 << 34, 1 << 35))
        assert devices.present().eight_bits is can
