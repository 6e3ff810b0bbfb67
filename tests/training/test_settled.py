"""What a run settles is a value of its own: the caller's configuration stays, and nothing in it is left open."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import threading

import pytest
import torch
import transformers
import yaml

from llama_pro_fast import freeze_to_new_blocks, plan
from llama_pro_fast.config import MAY_STAY_OPEN, OptimConfig, Settled, options
from llama_pro_fast.errors import UserError
from llama_pro_fast.expand import main as expand_main
from llama_pro_fast.expansion.manifest import what_trains
from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.hf.folder import PretrainedFolder, folder_digest
from llama_pro_fast.model.trained import Trained
from llama_pro_fast.planning import devices
from llama_pro_fast.recipe import OF_PLAN, parse
from llama_pro_fast.resume import load_config
from llama_pro_fast.runs.metrics import read_metrics
from llama_pro_fast.train import main as train_main
from llama_pro_fast.training import model_folder, settle
from llama_pro_fast.training.run import run_training

OPEN = {"device": "auto", "dtype": "auto", "micro_batch_size": None, "checkpoint_every": None, "threads": None}


def digest_of(folder) -> str:
    return folder_digest(PretrainedFolder(folder))


def digest(run) -> str:
    return digest_of(run / "export")


@pytest.mark.slow
def test_the_callers_configuration_stays_and_serves_twice_and_in_a_thread(make_config, tmp_path):
    config = make_config(train=OPEN, optim={"warmup_steps": None}, eval={"every": None})
    before = copy.deepcopy(config)
    for name in ("first", "second", "in a thread"):
        own = dataclasses.replace(config, output=str(tmp_path / name))
        if name == "in a thread":
            worker = threading.Thread(target=run_training, args=(own,))
            worker.start()
            worker.join()
        else:
            assert run_training(own) is not None
        assert own == dataclasses.replace(before, output=own.output)
    assert digest(tmp_path / "first") == digest(tmp_path / "second") == digest(tmp_path / "in a thread")


def test_the_stored_configuration_has_nothing_open(finished):
    stored = load_config(finished)
    assert isinstance(stored, Settled)
    assert {key for key, value, _ in options(stored) if value is None} <= set(MAY_STAY_OPEN)
    # Of one rank nothing is sharded.
    assert [key for key, value, _ in options(stored) if value == "auto"] == ["train.sharding"]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("optim", "lr", None), ("train", "attention", "auto"), ("train", "steps", 0), ("optim", "clip", -1)],
)
def test_a_stored_configuration_that_is_open_or_out_of_bounds_is_refused(finished, tmp_path, section, key, value):
    raw = yaml.safe_load((finished / "config.yaml").read_text())
    raw[section][key] = value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=rf"config.yaml: not readable .*{section}.{key}"):
        load_config(tmp_path)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        OptimConfig(lr=1.0).lr = 2.0


def test_the_process_is_made_deterministic_before_a_backend_is_chosen(make_config, monkeypatch):
    """On a GPU flash attention's backward repeats only under PyTorch's switch, and is refused without it."""
    seen = []

    def chosen(*_):
        seen.append(torch.are_deterministic_algorithms_enabled())
        raise UserError("enough")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "present", lambda index: devices.DEVICES["h100"])
    monkeypatch.setattr(settle, "attention_backend", chosen)
    for name in ("CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
    try:
        with pytest.raises(UserError, match="enough"):
            run_training(make_config(train={"device": "cuda", "deterministic": True}))
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [True]


def test_a_limit_of_memory_is_stored_as_it_was_given(make_config, tmp_path):
    run_training(make_config(train={"memory": 0.004, "steps": 1}))
    assert load_config(tmp_path / "run").train.memory == 0.004


def test_a_short_run_measures_no_more_than_it_trains(make_config, tmp_path):
    run_training(make_config(train={"steps": 8}, eval={"every": None, "tokens": None}))
    steps = {row["step"] for row in read_metrics(tmp_path / "run") if row["kind"] == "eval"}
    texts, tokens = 2, load_config(tmp_path / "run").eval.tokens
    assert tokens >= 32
    assert len(steps) * texts * tokens <= 8 * 4 * 32


# -- what trains ---------------------------------------------------------------------------------------------------


def test_what_trains_is_the_same_before_and_after_the_expansion(base, tmp_path):
    assert expand_main([str(base), str(tmp_path / "expanded"), "--expand.groups", "2"]) == 0
    folder, new = PretrainedFolder(base), ExpansionPlan.from_groups(4, 2)
    expanded = PretrainedFolder(tmp_path / "expanded").raw_config
    after = what_trains(expanded, 6, parameters="new_blocks", name="")
    assert (
        after
        == what_trains(folder.raw_config, folder.config.num_hidden_layers, parameters="new_blocks", plan=new, name="")
        == Trained(6, (2, 5))
    )
    assert (after.strip, after.skip_for_base) == ("..XooX", (2, 5))
    everything = what_trains(expanded, 6, parameters="all", name="")
    assert (everything.strip, everything.skip_for_base) == ("XXXXXX", ())


def test_where_the_base_has_trained_too_nothing_is_skipped_for_it(base, tmp_path):
    assert expand_main([str(base), str(tmp_path / "expanded"), "--expand.groups", "2"]) == 0
    raw = PretrainedFolder(tmp_path / "expanded").raw_config
    raw = raw | {"block_expansion": raw["block_expansion"] | {"base_intact": False}}
    found = what_trains(raw, 6, parameters="new_blocks", name="")
    assert (found.blocks, found.skip_for_base) == ((2, 5), ())


# -- one language --------------------------------------------------------------------------------------------------


def test_plan_and_train_understand_a_line_alike():
    line = ["--config", "llama-3.1-8b", "--expand.groups", "4", "--train.seq_len", "2048"]
    asked = parse([*line, "--gpu", "h100"], verb="plan", own=plan.OWN)
    assert asked.config == parse(line).config
    question = plan.question_of(asked)
    assert question.job.trained.blocks == (8, 17, 26, 35)
    assert (question.device.title, question.job.seq_len) == ("H100 80 GB", 2048)
    assert set(plan.OWN) == set(OF_PLAN)
    with pytest.raises(UserError, match="no option gpu here, only on the command line of `llama-pro-fast plan`"):
        parse([*line, "--gpu", "h100"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train.device", "cuda"], "PyTorch sees no GPU here"),
        (["--train.attention", "magic", "--gpu", "h100"], "--train.attention magic: is not for H100"),
        (["--train.attention", "cpu_flash", "--gpu", "h100"], "--train.attention cpu_flash: is not for H100"),
        (["--train.attention", "flash", "--gpu", "cpu"], "--train.attention: "),
        (["--train.steps", "5", "--train.tokens", "1e6"], "both set the length"),
        (["--train.steps", "3", "--optim.warmup_steps", "9"], "longer than the run"),
    ],
)
def test_plan_refuses_what_train_would(base, options, message):
    if torch.cuda.is_available():
        return
    line = ["--model.path", str(base), "--expand.groups", "2", *options]
    with pytest.raises(UserError, match=message):
        plan.question_of(parse(line, verb="plan", own=plan.OWN))


def test_a_model_with_a_config_yaml_of_its_own_is_no_run(base, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    (folder / "config.yaml").write_text("foo: 1\n")
    assert model_folder.find(str(folder)) == folder
    assert model_folder.config_of(str(folder)) == str(folder)


def test_a_run_that_went_on_is_exported_anew(make_config, stopped_at_2, tmp_path, capsys):
    stopped_at_2(make_config(train={"steps": 4}))
    first = digest_of(model_folder.find(str(tmp_path / "run")))
    assert "exported step 2" in capsys.readouterr().out
    run_training(load_config(tmp_path / "run"), resume=True)
    assert digest_of(model_folder.find(str(tmp_path / "run"))) != first
    assert "exported step" not in capsys.readouterr().out, "a complete run has its export"


@pytest.mark.slow
def test_a_run_is_a_model_to_every_verb(make_config, stopped_at_2, finished, tmp_path, capsys):
    """Its export; where there is none yet, what its last checkpoint would export."""
    run = finished
    assert plan.main(["--model.path", str(run), "--gpu", "h100"]) == 0
    assert "..XooX" in capsys.readouterr().out
    assert expand_main([str(run), str(tmp_path / "twice"), "--expand.after", "5"]) == 0
    assert what_trains(
        PretrainedFolder(tmp_path / "twice").raw_config,
        PretrainedFolder(tmp_path / "twice").config.num_hidden_layers,
        parameters="new_blocks",
        name="",
    ).blocks == (6,)

    stopped_at_2(make_config())
    assert not (tmp_path / "run" / "export").exists()
    assert plan.main(["--model.path", str(tmp_path / "run"), "--gpu", "h100"]) == 0
    assert not (tmp_path / "run" / "export").exists(), "a plan needs no weights"
    config = make_config(model={"path": str(tmp_path / "run")}, expand={"groups": None}, output=str(tmp_path / "on"))
    stopped_at_2(config)
    assert (tmp_path / "run" / "export").is_dir()
    # The first run goes on, and leaves the second's model alone until it is exported anew.
    assert load_config(tmp_path / "on").model.path == str(tmp_path / "run" / "export")
    assert run_training(load_config(tmp_path / "on"), resume=True)["trained_blocks"] == [2, 5]


# -- values of another type, from Python or from a file ------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("optim", "lr", "1e-3", "--optim.lr: '1e-3' is not a number; in YAML"),
        ("optim", "lr", True, "--optim.lr: True is not a number"),
        ("optim", "schedule", "foo", "--optim.schedule: 'foo' is not cosine or wsd"),
        ("train", "steps", 1.5, "--train.steps: 1.5 is not a whole number"),
        ("train", "device", "tpu", "--train.device: 'tpu' is not auto or cpu or cuda"),
        ("train", "dtype", None, "--train.dtype: None is not auto or float32 or bfloat16"),
        ("train", "seed", 10**30, "--train.seed: 1000000000000000000000000000000 is not a number from 0 up to"),
        ("train", "memory", 1e300, r"--train.memory: 1e\+300 is not a number of GiB"),
        ("train", "deterministic", "x", "--train.deterministic: 'x' is not true or false"),
        ("train", "threads", 100_000, "--train.threads: 100000 .* at most 1024"),
        ("data", "domain", [{"path": "a"}], "--data.domain: .* is not a text or a list"),
    ],
)
def test_a_value_of_another_type_is_named(make_config, section, key, value, message):
    config = make_config()
    config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{key: value})})
    with pytest.raises(UserError, match=message):
        run_training(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("micro_batch_size", 3, "does not divide"),
        ("steps", 2, "--train.steps 2: the run has done 6 already"),
        ("parameters", "foo", "'foo' is not new_blocks or all"),
    ],
)
def test_an_edited_configuration_is_refused_on_resume(a_run, cli, key, value, message):
    raw = yaml.safe_load((a_run / "config.yaml").read_text())
    raw["train"][key] = value
    (a_run / "config.yaml").write_text(yaml.safe_dump(raw))
    cli.refused(*cli(train_main, "--output", a_run, "--resume")[::2], message)


def test_a_second_run_in_the_same_process_waits_its_turn(make_config, monkeypatch):
    from llama_pro_fast.training import run as run_module

    def one_more(*_, **__):
        with pytest.raises(UserError, match="another run is going on in this process"):
            run_training(make_config())
        raise UserError("enough")

    monkeypatch.setattr(run_module, "start_device", one_more)
    for _ in range(2):  # and it is free again after one that failed
        with pytest.raises(UserError, match="enough"):
            run_training(make_config())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seq", "64"], "did you mean train.seq_len"),
        (["--lr", "1"], "did you mean optim.lr"),
        (["--tokens", "1"], "did you mean train.tokens"),
        (["--batch", "1"], "did you mean train.batch_size"),
        (["--groups", "1"], "did you mean expand.groups"),
        (["--model", "folder"], "--model is a section; give one of its keys: --model.path"),
    ],
)
def test_an_older_option_is_told_its_name(argv, message):
    with pytest.raises(UserError, match=message):
        parse(argv)


def test_freezing_what_has_no_new_blocks_or_is_no_model_is_refused(base):
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(UserError, match="has no new blocks; expand it first"):
        freeze_to_new_blocks(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UserError, match="Linear: not a transformers language model"):
        freeze_to_new_blocks(torch.nn.Linear(2, 2))
