"""Whole runs on a tiny base: what is written, what an export is, and that a resumed run is the uninterrupted one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import forked
import pytest
import torch
import yaml
from runs_read import digests, losses
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_pro_fast.config import Source
from llama_pro_fast.data.corpus import Corpus
from llama_pro_fast.expansion.manifest import Manifest
from llama_pro_fast.export import main as export_main
from llama_pro_fast.hf.config import rope_of
from llama_pro_fast.hf.folder import PretrainedFolder, folder_digest
from llama_pro_fast.hf.loading import load_model
from llama_pro_fast.model.batch import PackedBatch
from llama_pro_fast.recipe import parse
from llama_pro_fast.reporting.summary import summarise
from llama_pro_fast.resume import to_dict
from llama_pro_fast.runs.checkpoint import complete_checkpoints, load
from llama_pro_fast.runs.metrics import read_metrics
from llama_pro_fast.text import stdlib
from llama_pro_fast.training.run import run_training


def start(config, folder: Path) -> BaseProcess:
    """The same run as a process of its own, from a recipe; what it prints is in ``folder / "screen.txt"``."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({k: v for k, v in to_dict(config).items() if v is not None}))
    words = ["python", "-m", "llama_pro_fast.train", "--config", str(recipe)]
    return forked.start(forked.typed, words, screen=folder / "screen.txt")


def wait_for_a_checkpoint(run: Path, process: BaseProcess) -> None:
    while not complete_checkpoints(run):
        assert process.is_alive(), (run.parent / "screen.txt").read_text()
        time.sleep(0.01)


def test_a_run_writes_what_the_design_names(finished):
    run = finished
    assert [f.name for f in complete_checkpoints(run)] == ["step-000004", "step-000006"]
    for name in ("config.yaml", "metrics.jsonl", "export/config.json", "expanded/config.json", "report/summary.md"):
        assert (run / name).is_file(), name
    assert list((run / "tensorboard").iterdir())
    assert (run / "report" / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["tokens"] == 6 * 4 * 32
    assert {(row["role"], row["source"]) for row in summary["results"]} == {
        ("domain", "domain"),
        ("general", "general"),
    }
    rows = read_metrics(run)
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if row["kind"] == "eval" and row["role"] == "domain"] == [0, 3, 6]


def test_the_domain_is_learned_and_only_new_blocks_change(finished, base):
    run = finished
    domain = [row["loss"] for row in read_metrics(run) if row["kind"] == "eval" and row["role"] == "domain"]
    assert domain[-1] < domain[0] - 0.1
    before, after = digests(run / "expanded"), digests(run / "export")
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    new = Manifest.from_config(PretrainedFolder(run / "export").raw_config).trained_blocks
    assert new == (2, 5)
    assert changed == {name for name in before if name.startswith(("model.layers.2.", "model.layers.5."))}


def test_the_meter_is_exactly_zero_before_the_first_step_and_then_measures(finished):
    general = [row for row in read_metrics(finished) if row["kind"] == "eval" and row["role"] == "general"]
    assert general[0]["loss"] == general[0]["base_loss"]
    assert general[0]["kl"] == 0.0
    assert general[-1]["kl"] > 0
    assert general[-1]["loss"] != general[-1]["base_loss"]
    assert len({row["base_loss"] for row in general}) == 1, "the base's loss moved"


def test_the_export_is_an_ordinary_checkpoint_with_our_models_greedy_tokens(finished):
    run = finished
    model, info = AutoModelForCausalLM.from_pretrained(run / "export", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    ours = load_model(PretrainedFolder(run / "export"), dtype=torch.float32, attention="cpu_flash")
    prompt = AutoTokenizer.from_pretrained(run / "export")("the block copies")["input_ids"]
    theirs = model.float().generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)
    ids = list(prompt)
    for _ in range(20):
        ids.append(int(ours.logits(PackedBatch.from_documents([ids]))[-1].argmax()))
    assert theirs[0].tolist() == ids


def test_trained_tensors_are_narrowed_once(finished):
    run = finished
    exported = PretrainedFolder(run / "export")
    state = {"model.blocks.2.o_proj.weight": torch.empty(32, 32)}
    load(complete_checkpoints(run)[-1], state)
    master = state["model.blocks.2.o_proj.weight"]
    assert not torch.equal(master, master.bfloat16().float()), "the master is no wider than the export"
    assert torch.equal(exported.tensor("model.layers.2.self_attn.o_proj.weight"), master.bfloat16())


def test_export_by_hand_of_a_crashed_run(make_config, tmp_path, cli):
    process = start(make_config(train={"steps": 5000}), tmp_path)
    wait_for_a_checkpoint(tmp_path / "run", process)
    process.kill()
    process.join()
    code, out, err = cli(export_main, tmp_path / "run", tmp_path / "by-hand")
    assert code == 0, err
    assert "by-hand" in out
    AutoModelForCausalLM.from_pretrained(tmp_path / "by-hand")
    before, after = digests(tmp_path / "run" / "expanded"), digests(tmp_path / "by-hand")
    assert {name.split(".")[2] for name in before if before[name] != after[name]} == {"2", "5"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "dtype", "fp8"),
    [
        (signal.SIGINT, "float32", "none"),
        (signal.SIGKILL, "bfloat16", "none"),
        (signal.SIGKILL, "bfloat16", "backward"),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(number, dtype, fp8, make_config, tmp_path, base):
    """SIGINT saves at the end of the step; after SIGKILL the last complete checkpoint counts. Rows of the log fall
    between checkpoints, and are the same too."""
    length = {"steps": 60, "checkpoint_every": 7, "log_every": 4, "dtype": dtype, "fp8": fp8}
    run_training(make_config(train=length, eval={"every": 10}, output=str(tmp_path / "whole")))

    process = start(make_config(train=length, eval={"every": 10}), tmp_path)
    run = tmp_path / "run"
    wait_for_a_checkpoint(run, process)
    os.kill(process.pid, number)
    process.join()
    output = (tmp_path / "screen.txt").read_text()
    assert process.exitcode == (130 if number == signal.SIGINT else -9), output
    assert not (run / "export").exists()
    if number == signal.SIGINT:
        assert f"llama-pro-fast train --output {run} --resume" in output
    request = parse(["--output", str(run), "--resume"])
    run_training(request.config, resume=request.resume)
    assert losses(run) == losses(tmp_path / "whole")
    assert digests(run / "export") == digests(tmp_path / "whole" / "export")


def test_a_stopped_run_resumes_by_the_same_command_from_anywhere(stopped_at_2, tmp_path, base, texts, monkeypatch):
    """Relative paths, a length in tokens, `auto`, and an option more: `--resume`."""
    monkeypatch.chdir(texts)
    command = ["--model.path", os.path.relpath(base), "--expand.groups", "2", "--data.domain", "domain.jsonl"]
    command += ["--data.general", "general", "--data.held_out", "0.1", "--optim.lr", "1e-2", "--train.tokens", "512"]
    command += [
        "--train.seq_len",
        "32",
        "--train.batch_size",
        "4",
        "--train.device",
        "auto",
        "--output",
        str(tmp_path / "r"),
    ]
    command += ["--data.cache", str(tmp_path / "cache"), "--eval.tokens", "256"]
    stopped_at_2(parse(command).config)
    request = parse([*command, "--resume"])
    monkeypatch.chdir(tmp_path)
    assert run_training(request.config, resume=True)["steps"] == 4


def test_a_moved_run_goes_on_where_it_is_now(make_config, stopped_at_2, tmp_path):
    stopped_at_2(make_config(train={"steps": 4, "checkpoint_every": 100}))
    (tmp_path / "run").rename(tmp_path / "moved")
    run_training(parse(["--output", str(tmp_path / "moved"), "--resume"]).config, resume=True)
    assert (tmp_path / "moved" / "export" / "config.json").exists()
    assert not (tmp_path / "run").exists()


def test_resuming_a_finished_run_changes_nothing(a_run, read_back):
    summary = json.loads((a_run / "report" / "summary.json").read_text())
    before = digests(a_run / "export"), losses(a_run)
    again = run_training(parse(["--output", str(a_run), "--resume"]).config, resume=True)
    # The peak is of the processes that ran, this one the second; and the run is a copy.
    assert again.pop("peak_memory_gib") >= summary.pop("peak_memory_gib")
    assert again.pop("export") == str(a_run / "export") != summary.pop("export")
    assert again == summary
    assert (digests(a_run / "export"), losses(a_run)) == before


@pytest.mark.slow
def test_a_step_is_a_mean_over_its_tokens_however_they_are_spread(make_config, tmp_path):
    """The same 4 sequences, unequal in valid tokens, in micro-batches of 1, 2 or 4: one loss, one gradient."""
    seen = []
    for micro in (1, 2, 4):
        config = make_config(train={"steps": 1, "micro_batch_size": micro}, output=str(tmp_path / str(micro)))
        run_training(config)
        row = next(row for row in read_metrics(tmp_path / str(micro)) if row["kind"] == "train")
        seen.append((row["loss"], row["grad_norm"]))
    assert seen[1] == pytest.approx(seen[0], rel=1e-5)
    assert seen[2] == pytest.approx(seen[0], rel=1e-5)


@pytest.mark.slow
def test_a_sharded_base_is_trained_and_exported_in_its_shards(make_config, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_config().model.path)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    tokenizer.save_pretrained(tmp_path / "sharded")
    run_training(make_config(model={"path": str(tmp_path / "sharded")}, train={"steps": 2}))
    exported = PretrainedFolder(tmp_path / "run" / "export")
    assert len(exported.files) > 1
    assert exported.files == PretrainedFolder(tmp_path / "sharded").files
    _, info = AutoModelForCausalLM.from_pretrained(exported.path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_after_training_everything_the_meter_no_longer_speaks_of_a_base(make_config, finished, tmp_path, capsys):
    first = finished
    everything = {"parameters": "all", "steps": 1}
    run_training(make_config(model={"path": str(first / "export")}, expand={"groups": None}, train=everything))
    config = make_config(
        model={"path": str(tmp_path / "run" / "export")},
        expand={"groups": None},
        train={"steps": 1},
        output=str(tmp_path / "next"),
    )
    run_training(config)
    assert "off: more than the new blocks was trained since" in capsys.readouterr().out
    assert all(row.get("base_loss") is None for row in read_metrics(tmp_path / "next"))


def test_named_blocks_train_and_nothing_else_by_muon_and_resumed(make_config, stopped_at_2, base, tmp_path):
    how = {
        "expand": {"groups": None},
        "train": {"parameters": "blocks", "blocks": "3,0"},
        "optim": {"name": "muon"},
        "data": {"general": None},
    }
    run_training(make_config(output=str(tmp_path / "whole"), **how))
    stopped_at_2(make_config(**how))
    run_training(parse(["--output", str(tmp_path / "run"), "--resume"]).config, resume=True)
    assert digests(tmp_path / "run" / "export") == digests(tmp_path / "whole" / "export")
    before, after = (PretrainedFolder(folder) for folder in (base, tmp_path / "run" / "export"))
    changed = {name.split(".")[2] for name in before.entries if before.digest(name) != after.digest(name)}
    assert changed == {"0", "3"}


def test_a_failed_export_keeps_the_one_before(a_run, cli):
    before = digests(a_run / "export")
    next(complete_checkpoints(a_run)[-1].glob("*.safetensors")).unlink()
    code, _, err = cli(export_main, a_run)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert digests(a_run / "export") == before


@pytest.mark.slow
def test_a_resumed_run_says_when_the_measured_text_has_changed(make_config, stopped_at_2, tmp_path, texts, capsys):
    general = tmp_path / "general.txt"
    general.write_text("\n\n".join(path.read_text() * 40 for path in sorted((texts / "general").iterdir())))
    stopped_at_2(make_config(data={"general": str(general)}, train={"steps": 3}))
    general.write_text(general.read_text().upper())
    summary = run_training(parse(["--output", str(tmp_path / "run"), "--resume"]).config, resume=True)
    assert "another text is measured than before" in capsys.readouterr().out
    # Before and after are of the new text: its base loss is one figure, and not the old text's.
    (result,) = (row for row in summary["results"] if row["role"] == "general")
    assert (result["before"]["step"], result["after"]["step"]) == (2, 3)
    assert result["before"]["base_loss"] == result["after"]["base_loss"]
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "eval" and row["role"] == "general"]
    assert (rows[0]["step"], rows[0]["base_loss"] == result["before"]["base_loss"]) == (0, False)

    # And of the old one again, had that been put back after the new one was measured.
    back = [
        rows[0],
        rows[1],
        rows[0] | {"step": 4, "loss": 1.0},
        {"kind": "train", "tokens_per_second": None, "seconds": 1.0, "peak_memory_gib": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in back))
    (result,) = summarise(tmp_path, {})["results"]
    assert (result["before"]["step"], result["after"]["step"]) == (0, 4)


def test_remains_of_a_save_that_died_are_not_read(a_run):
    expected = digests(a_run / "export")
    last = complete_checkpoints(a_run)[-1]
    (last / "COMPLETE").unlink()
    next(last.glob("*.safetensors")).write_bytes(b"half")
    (a_run / "checkpoints" / "step-000003").mkdir()
    shutil.rmtree(a_run / "export")
    run_training(parse(["--output", str(a_run), "--resume"]).config, resume=True)
    assert digests(a_run / "export") == expected
    assert not (a_run / "checkpoints" / "step-000003").exists()


def test_training_from_scratch_and_on_trained_everything(make_config, base, tmp_path, capsys):
    """`all` mode: random weights for the architecture, every tensor trains, the meter is off and says why."""
    config = make_config(
        model={"init": "random"}, expand={"groups": None}, train={"parameters": "all", "dtype": "bfloat16"}
    )
    summary = run_training(config)
    assert "off: all parameters train" in capsys.readouterr().out
    assert summary["trained_parameters"] == summary["parameters"]
    for name in ("initial", "export"):
        config = PretrainedFolder(tmp_path / "run" / name).raw_config
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    before, after = digests(tmp_path / "run" / "initial"), digests(tmp_path / "run" / "export")
    assert all(before[name] != after[name] for name in before)
    assert all(row.get("kl") is None for row in read_metrics(tmp_path / "run"))


def test_a_model_of_the_users_own_is_exported_with_its_rotation_for_older_readers_too(make_config, base_of, tmp_path):
    linear = {"rope_type": "linear", "factor": 2.0}
    folder = base_of(rope_parameters={**linear, "rope_theta": 500.0})
    everything = {"parameters": "all", "steps": 1}
    run_training(make_config(model={"path": str(folder)}, expand={"groups": None}, train=everything))
    exported = PretrainedFolder(tmp_path / "run" / "export")
    assert "rope_theta" not in PretrainedFolder(folder).raw_config
    assert exported.raw_config["rope_theta"] == 500.0
    assert exported.raw_config["rope_scaling"] == {**linear, "type": "linear"}
    assert rope_of(exported.config) == rope_of(PretrainedFolder(folder).config)


def test_an_expanded_model_trains_without_another_expansion(make_config, finished, tmp_path):
    """The second stage of training starts from an export; its manifest still says which blocks train."""
    first = finished
    run_training(make_config(model={"path": str(first / "export")}, expand={"groups": None}))
    before, after = digests(first / "export"), digests(tmp_path / "run" / "export")
    assert {name.split(".")[2] for name in before if before[name] != after[name]} == {"2", "5"}
    assert folder_digest(PretrainedFolder(first / "export")) != folder_digest(PretrainedFolder(tmp_path / "run/export"))


def test_general_text_with_a_weight_is_replayed(make_config, texts, tokenizer):
    general = [Source(path=str(texts / "general"), weight=0.5)]
    options = {"seq_len": 32, "seed": 0, "batch_size": 4, "default_general": True}
    without = Corpus.prepare(make_config().data, tokenizer, **options).train
    with_it = Corpus.prepare(make_config(data={"general": general}).data, tokenizer, **options).train
    assert with_it.sequences_in_epoch(0) > without.sequences_in_epoch(0)
    tokens = with_it.batch(0, with_it.sequences_in_epoch(0)).input_ids.tolist()
    assert "Letter" in tokenizer.decode(tokens)
    assert "Letter" not in tokenizer.decode(without.batch(0, without.sequences_in_epoch(0)).input_ids.tolist())


@pytest.mark.slow
def test_without_general_text_the_built_in_prose_is_measured_and_named(make_config, tmp_path, capsys, monkeypatch):
    some = stdlib.stdlib_files("prose")[:60]
    monkeypatch.setattr(stdlib, "stdlib_files", {"prose": some}.get)
    run_training(make_config(data={"general": None}, train={"steps": 1}))
    assert "stdlib:prose (built in, no --data.general given)" in capsys.readouterr().out
    assert {row["source"] for row in read_metrics(tmp_path / "run") if row["kind"] == "eval"} == {
        "domain",
        "stdlib:prose",
    }
