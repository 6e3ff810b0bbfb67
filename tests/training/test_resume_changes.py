"""What may have another value when a run goes on, what may not, and what is kept of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from stopping import stop_in_step

from llama_pro_fast import resume
from llama_pro_fast.config import RunConfig, options
from llama_pro_fast.export import main as export_main
from llama_pro_fast.recipe import parse
from llama_pro_fast.resume import MAY_CHANGE, load_config
from llama_pro_fast.runs import checkpoint
from llama_pro_fast.runs.checkpoint import complete_checkpoints
from llama_pro_fast.runs.marker import read_info
from llama_pro_fast.runs.metrics import read_metrics
from llama_pro_fast.train import main as train_main
from llama_pro_fast.training import loop
from llama_pro_fast.training.run import run_training
from llama_pro_fast.training.schedule import learning_rate
from llama_pro_fast.training.signals import Stopped


def rows(run: Path, kind: str) -> list[dict]:
    return [row for row in read_metrics(run) if row["kind"] == kind]


def edit(run: Path, section: str, **values) -> None:
    raw = yaml.safe_load((run / "config.yaml").read_text())
    raw[section] |= values
    (run / "config.yaml").write_text(yaml.safe_dump(raw))


@pytest.fixture(scope="module")
def stopped_once(config_at, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(3, patch)
        with pytest.raises(Stopped):
            run_training(config_at(run, train={"steps": 4, "checkpoint_every": None}))
    return run


@pytest.fixture
def stopped(stopped_once, tmp_path) -> Path:
    """A run of 4 steps, saved at its second, that the test may go on with."""
    return Path(shutil.copytree(stopped_once, tmp_path / "stopped"))


def test_a_rate_changed_on_the_command_line_is_said_stored_and_used(stopped, cli):
    code, out, err = cli(train_main, "--output", stopped, "--resume", "--optim.lr", "0.005")
    assert code == 0, err
    assert "changed: optim.lr 0.01 -> 0.005; from here on it is another run" in out
    config = load_config(stopped)
    assert [(c.step, c.key, c.before, c.after) for c in config.history] == [(2, "optim.lr", 0.01, 0.005)]
    assert [(row["step"], row["key"], row["after"]) for row in rows(stopped, "change")] == [(2, "optim.lr", 0.005)]
    assert [row["lr"] for row in rows(stopped, "train")][2:] == [learning_rate(config.optim, n, 4) for n in (2, 3)]
    assert read_info(complete_checkpoints(stopped)[-1]).config == config


def test_one_changed_in_config_yaml_is_found_by_what_the_checkpoint_was_written_with(stopped, cli):
    edit(stopped, "optim", lr=0.002)
    code, out, _ = cli(train_main, "--output", stopped, "--resume")
    assert code == 0
    assert "changed: optim.lr 0.01 -> 0.002" in out
    assert [change.after for change in load_config(stopped).history] == [0.002]


def test_a_change_that_came_to_nothing_is_not_kept(stopped, cli, monkeypatch):
    """Changed, crashed before anything was saved, and changed to something else: the run's history has the latter."""
    edit(stopped, "optim", lr=0.002)
    with monkeypatch.context() as patch:
        patch.setattr("llama_pro_fast.training.run.train", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli(train_main, "--output", stopped, "--resume")
    assert cli(train_main, "--output", stopped, "--resume", "--optim.lr", "0.003")[0] == 0
    assert [(change.before, change.after) for change in load_config(stopped).history] == [(0.01, 0.003)]
    assert [row["after"] for row in rows(stopped, "change")] == [0.003]


SAME = {
    "train.recompute": "block",
    "train.log_every": 2,
    "train.checkpoint_minutes": 7.0,
    "train.checkpoint_every": 3,
    "train.keep_checkpoints": 5,
    "train.max_bad_steps": 3,
    "eval.every": 1,
    "eval.tokens": 128,
    "stop.kl_above": 50.0,
    "stop.general_rise": 50.0,
}


def test_what_is_said_to_change_nothing_changes_no_loss(stopped, cli, make_config, tmp_path):
    run_training(make_config(train={"steps": 4, "checkpoint_every": None}, output=str(tmp_path / "whole")))
    argv = [part for key, value in SAME.items() for part in (f"--{key}", str(value))]
    code, out, err = cli(train_main, "--output", stopped, "--resume", *argv)
    assert code == 0, err
    changed = {change.key for change in load_config(stopped).history}
    assert changed >= SAME.keys()
    assert all("stays the same bit for bit" in MAY_CHANGE[key] for key in changed)
    exports = [(run / "export" / "model.safetensors").read_bytes() for run in (stopped, tmp_path / "whole")]
    assert exports[0] == exports[1]
    assert out.count("changed: ") == len(changed)


def test_another_memory_is_planned_for_anew(stopped, cli):
    assert load_config(stopped).train.micro_batch_size == 2
    code, out, _ = cli(train_main, "--output", stopped, "--resume", "--train.memory", "2")
    assert code == 0
    assert load_config(stopped).train.micro_batch_size == 4
    assert "changed: train.memory" in out
    assert "changed: train.micro_batch_size 2 -> 4; from here on it is equal within rounding" in out


def test_other_micro_batches_and_threads_are_equal_within_rounding(stopped, cli):
    code, out, err = cli(
        train_main, "--output", stopped, "--resume", "--train.micro_batch_size", "4", "--train.attention", "reference"
    )
    assert code == 0, err
    assert out.count("no longer bit for bit") == 2
    assert load_config(stopped).train.micro_batch_size == 4


def test_every_key_is_of_one_kind():
    """A new key of the recipe must be thought of: it may change, is checked by what it names, or is kept."""
    for key, _, _ in options(RunConfig()):
        kept = resume._KEPT.keys() & {key, key.partition(".")[0]}
        assert (key in MAY_CHANGE or key in resume._CHECKED_OTHERWISE) or kept, key
    assert set(MAY_CHANGE) <= {key for key, _, _ in options(RunConfig())}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.seed", 3),
        ("train.seq_len", 16),
        ("train.batch_size", 8),
        ("train.parameters", "all"),
        ("train.dtype", "bfloat16"),
        ("optim.beta2", 0.9),
        ("optim.weight_decay", 0.0),
        ("optim.schedule", "wsd"),
        ("optim.warmup_steps", 2),
        ("data.held_out", 0.2),
        ("expand.groups", 4),
        ("model.init", "random"),
    ],
)
def test_what_a_run_keeps_is_refused_with_the_reason_wherever_it_is_changed(key, value, stopped, cli):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file() and path.name != ".lock"}
    code, _, err = cli(train_main, "--output", stopped, "--resume", f"--{key}", value)
    cli.refused(code, err, key, str(value), "on the command line", "which keeps it", "put ")
    assert {path: path.read_bytes() for path in before} == before
    section, _, name = key.partition(".")
    edit(stopped, section, **{name: value})
    code, _, err = cli(train_main, "--output", stopped, "--resume")
    cli.refused(code, err, key, str(value), "config.yaml", "which keeps it")


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("optim", {"lr": None}, "optim.lr is not settled"),
        ("optim", {"lr": "abc"}, "'abc' is not a number"),
        ("optim", {"lr": -1}, "not a number above 0"),
        ("optim", {"clip": 0}, "not a number above 0"),
        ("train", {"batch_size": 0}, "not a number above 0"),
        ("train", {"batch_size": -4}, "not a number above 0"),
        ("train", {"steps": 1}, "the run has done 2 already"),
    ],
)
def test_an_edited_config_is_checked_as_a_recipe_is(section, values, said, stopped, cli):
    edit(stopped, section, **values)
    code, _, err = cli(train_main, "--output", stopped, "--resume")
    cli.refused(code, err, said)


def test_a_finished_run_is_prolonged_by_steps_or_by_tokens(a_run, cli, finished):
    assert cli(train_main, "--output", a_run, "--resume", "--train.steps", "8")[0] == 0
    assert json.loads((a_run / "report" / "summary.json").read_text())["steps"] == 8
    assert cli(train_main, "--output", a_run, "--resume", "--train.tokens", "1280")[0] == 0
    assert json.loads((a_run / "report" / "summary.json").read_text())["steps"] == 10
    config = load_config(a_run)
    assert [(c.step, c.key, c.after) for c in config.history] == [
        (6, "train.steps", 8),
        (8, "train.steps", 10),
        (8, "train.tokens", 1280),
    ]
    before = [row["loss"] for row in rows(finished, "train")]
    assert [row["loss"] for row in rows(a_run, "train")][:6] == before


def test_what_hangs_on_a_key_edited_by_hand_follows_it(a_run, stopped, cli):
    """As on the command line: another length in tokens is another number of steps, another memory another plan."""
    edit(a_run, "train", tokens=1024.0)
    assert cli(train_main, "--output", a_run, "--resume", "auto")[0] == 0
    assert load_config(a_run).train.steps == 8
    edit(stopped, "train", memory=2.0)
    assert cli(train_main, "--output", stopped, "--resume")[0] == 0
    assert load_config(stopped).train.micro_batch_size == 4


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("history", [{"step": "x", "key": "optim.lr", "before": 1, "after": 2}], "history"),
        ("history", [{"step": 1}], "history"),
        ("history", [5], "history"),
        ("train", {"stepz": 3}, "no key stepz"),
        ("optim", {"lr": 10**400}, "optim.lr"),
        ("data", {"domain": [{"path": "x", "weight": "abc"}]}, "weight"),
        ("data", {"domain": [{"path": 5}]}, "path"),
    ],
)
def test_an_odd_config_is_one_line(section, values, said, stopped, cli):
    raw = yaml.safe_load((stopped / "config.yaml").read_text())
    raw[section] = raw[section] | values if isinstance(values, dict) else values
    (stopped / "config.yaml").write_text(yaml.safe_dump(raw))
    code, _, err = cli(train_main, "--output", stopped, "--resume")
    cli.refused(code, err, "config.yaml", said)


# -- before the first checkpoint, and without one ------------------------------------------------------------------


@pytest.fixture
def begun(make_config, tmp_path) -> Path:
    """A run that was stopped before it had anything to save."""
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(1, patch)
        with pytest.raises(Stopped):
            run_training(make_config(train={"steps": 4, "checkpoint_every": None}))
    return tmp_path / "run"


def test_before_its_first_checkpoint_a_run_knows_what_it_was_begun_with(begun, cli):
    config, weights = begun / "expanded" / "config.json", begun / "expanded" / "model.safetensors"
    whole = config.read_text(), weights.read_bytes()
    raw = json.loads(whole[0])
    config.write_text(json.dumps(raw | {"rope_parameters": raw["rope_parameters"] | {"rope_theta": 500.0}}))
    code, _, err = cli(train_main, "--output", begun, "--resume")
    cli.refused(code, err, "is not the model", "rope_theta")
    config.write_text(whole[0])
    weights.write_bytes(whole[1][:-1] + bytes([whole[1][-1] ^ 1]))
    code, _, err = cli(train_main, "--output", begun, "--resume")
    cli.refused(code, err, "is not the model", "weights")
    weights.write_bytes(whole[1])
    edit(begun, "expand", groups=4)
    code, _, err = cli(train_main, "--output", begun, "--resume")
    cli.refused(code, err, "expand.groups")
    edit(begun, "expand", groups=2)
    code, out, _ = cli(train_main, "--output", begun, "--resume", "--optim.lr", "0.004")
    assert (code, "no checkpoint yet: starting from the first step" in out) == (0, True)
    assert [(change.step, change.after) for change in load_config(begun).history] == [(0, 0.004)]


def test_checkpoints_that_are_gone_are_missed(a_run, stopped, cli, tmp_path):
    """Nothing is started anew over a run that has saved; links to its checkpoints do."""
    (stopped / "checkpoints").rename(tmp_path / "elsewhere")
    before = (stopped / "metrics.jsonl").read_bytes()
    code, _, err = cli(train_main, "--output", stopped, "--resume", "auto")
    cli.refused(code, err, "has saved step 2", "put them back")
    assert (stopped / "metrics.jsonl").read_bytes() == before
    (stopped / "checkpoints").mkdir()
    (stopped / "checkpoints" / "step-000002").symlink_to(tmp_path / "elsewhere" / "step-000002")
    edit(stopped, "train", keep_checkpoints=1)
    assert cli(train_main, "--output", stopped, "--resume")[0] == 0
    assert (tmp_path / "elsewhere" / "step-000002" / "COMPLETE").exists(), "what a link leads to was deleted"


# -- the last step -------------------------------------------------------------------------------------------------


def test_a_run_cut_to_end_between_evaluations_is_measured_there(a_run, cli, read_back):
    arguments = ["--output", a_run, "--resume", "--from_step", "4", "--train.steps", "4"]
    code, _, err = cli(train_main, *arguments)
    assert code == 0, err
    assert [row["step"] for row in rows(a_run, "eval") if row["role"] == "domain"] == [0, 3, 4]


@pytest.mark.parametrize("content", [None, b"\xff\n" * 5])
def test_without_its_metrics_a_run_still_comes_to_its_end(content, a_run, cli, read_back):
    (a_run / "report" / "summary.json").unlink()
    (a_run / "metrics.jsonl").unlink()
    if content:
        (a_run / "metrics.jsonl").write_bytes(content)
    code, _, err = cli(train_main, "--output", a_run, "--resume")
    assert code == 0, err
    summary = json.loads((a_run / "report" / "summary.json").read_text())
    assert [row["before"] for row in summary["results"]] == [None, None]
    assert summary["export_check"]["equal"] > 0


def test_both_lengths_at_once_are_refused(a_run, cli):
    code, _, err = cli(train_main, "--output", a_run, "--resume", "--train.steps", "8", "--train.tokens", "1280")
    cli.refused(code, err, "both set the length")


def test_a_run_of_a_gpu_goes_on_without_one(stopped, cli, monkeypatch):
    """The stored device is not here: one line names the way on, which works; what was chosen for it is chosen anew."""
    gpu = {"device": "cuda", "attention": "flash", "memory": 70.0, "threads": 16}
    edit(stopped, "train", **gpu)
    (folder,) = complete_checkpoints(stopped)
    checkpoint.restate(folder, dataclasses.replace(read_info(folder), config=load_config(stopped)))
    code, _, err = cli(train_main, "--output", stopped, "--resume")
    cli.refused(code, err, "PyTorch sees no GPU here", "--train.device cpu")
    code, _, err = cli(train_main, "--output", stopped, "--resume", "--train.device", "cpu")
    assert code == 0, err
    assert load_config(stopped).train.attention == "cpu_flash"
    assert load_config(stopped).train.memory != 70.0


def test_a_run_of_a_cpu_goes_on_on_a_gpu(stopped, cli, monkeypatch):
    """Of another device the generators' state is not in the checkpoint: it is drawn from as it is."""
    both = checkpoint.random_state
    monkeypatch.setattr(checkpoint, "random_state", lambda device: both(device) | {"random.cuda": torch.zeros(16)})
    monkeypatch.setattr(checkpoint, "set_random_state", lambda state: seen.append(sorted(state)))
    seen = []
    assert cli(train_main, "--output", stopped, "--resume")[0] == 0
    assert seen == [["random.cpu"]]


def test_what_is_optional_can_be_taken_away_again(stopped, cli):
    edit(stopped, "train", checkpoint_every=3)
    code, out, _ = cli(train_main, "--output", stopped, "--resume", "--train.checkpoint_every", "null")
    assert code == 0
    assert load_config(stopped).train.checkpoint_every is None
    assert "changed: train.checkpoint_every" not in out, "the checkpoint was written without one"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.threads", 0),
        ("train.micro_batch_size", 0),
        ("train.micro_batch_size", 3),
        ("eval.every", 0),
        ("optim.lr", -1.0),
    ],
)
def test_a_value_on_the_command_line_is_checked_too(key, value, stopped, cli):
    code, _, err = cli(train_main, "--output", stopped, "--resume", f"--{key}", value)
    cli.refused(code, err, f"--{key}: {value} ")


def test_an_edited_config_of_a_finished_run_is_seen_by_auto(a_run, cli):
    edit(a_run, "train", steps=7)
    code, out, _ = cli(train_main, "--output", a_run, "--resume", "auto")
    assert (code, "resumed at step 6 of 7" in out) == (0, True)


def test_a_change_is_one_row_however_often_the_run_is_resumed_there(stopped, cli, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", lambda *_: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                cli(train_main, "--output", stopped, "--resume", "--optim.lr", "0.004")
    assert cli(train_main, "--output", stopped, "--resume")[0] == 0
    assert [(row["step"], row["after"]) for row in rows(stopped, "change")] == [(2, 0.004)]


def test_a_model_that_moved_is_told_by_its_digest_to_the_end(make_config, finished, tmp_path, cli):
    """The folder that trains is the user's own: resumed after it was moved, and exported, also by hand."""
    shutil.copytree(finished / "export", tmp_path / "mine")
    config = make_config(model={"path": str(tmp_path / "mine")}, expand={"groups": None}, train={"steps": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_pro_fast.training.run.finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_training(config)
    (tmp_path / "mine").rename(tmp_path / "moved")
    code, _, err = cli(train_main, "--output", tmp_path / "run", "--resume")
    cli.refused(code, err, tmp_path / "mine")
    assert cli(train_main, "--output", tmp_path / "run", "--resume", "--model.path", tmp_path / "moved")[0] == 0
    assert cli(export_main, tmp_path / "run", tmp_path / "out")[0] == 0


def test_an_attention_backend_that_is_not_here_is_replaced_when_told_so(stopped, cli):
    edit(stopped, "train", attention="flash_4")
    code, _, err = cli(train_main, "--output", stopped, "--resume")
    cli.refused(code, err, "--train.attention")
    assert cli(train_main, "--output", stopped, "--resume", "--train.attention", "cpu_flash")[0] == 0


def test_text_that_moved_is_the_same_text(make_config, stopped_at_2, texts, tmp_path, cli):
    """Paths are compared by what lies there."""
    shutil.copy(texts / "domain.jsonl", tmp_path / "here.jsonl")
    stopped_at_2(make_config(data={"domain": str(tmp_path / "here.jsonl")}, train={"steps": 4}))
    (tmp_path / "there").mkdir()
    (tmp_path / "here.jsonl").rename(tmp_path / "there" / "here.jsonl")
    code, _, err = cli(train_main, "--output", tmp_path / "run", "--resume")
    assert (code, "here.jsonl: no such file" in err) == (2, True)
    moved = ["--data.domain", tmp_path / "there" / "here.jsonl"]
    assert cli(train_main, "--output", tmp_path / "run", "--resume", *moved)[0] == 0


def test_a_requeued_command_line_with_all_its_options_changes_nothing(stopped, cli, base, texts):
    stored = load_config(stopped)
    argv = ["--model.path", base, "--expand.groups", "2", "--data.domain", texts / "domain.jsonl", "--optim.lr", "0.01"]
    argv += ["--train.device", "auto", "--train.steps", "4", "--output", stopped, "--resume", "auto"]
    request = parse([str(part) for part in argv])
    assert request.resume
    found = {key: value for key, value, _ in options(request.config)} | {"history": []}
    assert found == {key: value for key, value, _ in options(stored)} | {"output": str(stopped)}
