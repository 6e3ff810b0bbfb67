"""Refusals around a run's folder: nothing is lost, nothing half-written looks complete; and what stops a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llama_pro_fast.export import main as export_main
from llama_pro_fast.runs import run_folder
from llama_pro_fast.train import main as train_main
from llama_pro_fast.training.run import run_training


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- the output ----------------------------------------------------------------------------------------------------


def test_no_output(refused):
    refused("--output", output=None)


def test_output_is_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", output=tmp_path / "file")


def test_output_below_a_file(refused, tmp_path):
    """Root may write anywhere, so an unwritable place is one that cannot be."""
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "cannot be written", output=tmp_path / "file" / "run")


def test_output_holds_other_files(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    refused(tmp_path / "run", "other files")
    assert (tmp_path / "run" / "thesis.tex").exists()


def test_output_holds_another_run(cli, base, texts, a_run):
    argv = ["--model.path", base, "--data.domain", texts / "domain.jsonl", "--optim.lr", "0.1", "--expand.groups", "2"]
    before = sorted(path.stat().st_mtime_ns for path in a_run.rglob("*"))
    code, _, err = cli(train_main, *argv, "--output", a_run)
    cli.refused(code, err, a_run, "--resume", "--overwrite")
    assert before == sorted(path.stat().st_mtime_ns for path in a_run.rglob("*"))


def test_overwrite_spares_a_folder_that_is_no_run(refused, cli, tmp_path, base, texts):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_bytes("site_name: Bücher\n".encode("latin-1"))
    argv = ["--model.path", base, "--data.domain", texts / "domain.jsonl", "--optim.lr", "0.1", "--expand.groups", "2"]
    code, _, err = cli(train_main, *argv, "--output", tmp_path / "run", "--overwrite")
    cli.refused(code, err, tmp_path / "run", "not of a run")
    assert (tmp_path / "run" / "config.yaml").exists()


def test_overwrite_spares_its_own_inputs(cli, texts, a_run):
    inside = a_run / "export"
    argv = ["--model.path", inside, "--data.domain", texts / "domain.jsonl", "--optim.lr", "0.1"]
    code, _, err = cli(train_main, *argv, "--output", a_run, "--overwrite")
    cli.refused(code, err, inside, "lies inside")
    assert (inside / "config.json").exists()


def test_overwrite_deletes_nothing_when_the_weights_are_wrong(cli, copy_of, base, texts, a_run):
    folder = copy_of(base)
    edit(folder / "config.json", intermediate_size=96)
    argv = [
        "--model.path",
        folder,
        "--data.domain",
        texts / "domain.jsonl",
        "--optim.lr",
        "0.1",
        "--expand.groups",
        "2",
    ]
    code, _, err = cli(train_main, *argv, "--output", a_run, "--overwrite")
    cli.refused(code, err, "different models")
    assert (a_run / "export" / "config.json").exists()


@pytest.mark.slow
def test_a_kill_while_overwriting_leaves_a_run(make_config, monkeypatch, a_run):
    config = make_config(train={"steps": 1})
    rmtree = shutil.rmtree

    def killed(path, *arguments, **options):
        rmtree(path, *arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run_training(config, overwrite=True)
    run_training(config, overwrite=True)
    assert (a_run / "export" / "config.json").exists()


def test_output_inside_a_source(refused, texts, tmp_path):
    shutil.copytree(texts, tmp_path / "texts")
    refused("lies inside", data__domain=tmp_path / "texts", output=tmp_path / "texts" / "run")


@pytest.mark.parametrize("key", ["model__path", "data__domain", "output"])
def test_an_empty_path_is_not_the_current_folder(refused, key):
    refused(f"--{key.replace('__', '.')}", **{key: ""})


def test_two_runs_do_not_write_one_folder(make_config, tmp_path, cli):
    config = make_config(train={"steps": 1})
    with run_folder.claimed(tmp_path / "run", resume=False, overwrite=False):
        code, _, err = cli(lambda argv: run_training(config) and 0)
    cli.refused(code, err, tmp_path / "run", "another run")


def test_output_is_a_link_to_an_empty_folder(make_config, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    run_training(make_config(train={"steps": 1}))
    assert (tmp_path / "disk" / "export" / "config.json").exists()


def test_overwrite_deletes_nothing_when_the_new_run_is_refused(cli, tmp_path, base, a_run):
    argv = ["--model.path", base, "--data.domain", tmp_path / "none.jsonl", "--optim.lr", "0.1", "--expand.groups", "2"]
    code, _, err = cli(train_main, *argv, "--output", a_run, "--overwrite")
    cli.refused(code, err, "none.jsonl")
    assert (a_run / "export" / "config.json").exists()


def test_overwrite_starts_anew(make_config, a_run):
    (a_run / "metrics.jsonl").write_text("old")
    run_training(make_config(train={"steps": 1}), overwrite=True)
    assert "old" not in (a_run / "metrics.jsonl").read_text()


# -- resuming ------------------------------------------------------------------------------------------------------


def test_resume_without_a_run(cli, tmp_path):
    code, _, err = cli(train_main, "--output", tmp_path / "none", "--resume")
    cli.refused(code, err, tmp_path / "none", "no run there")


def test_resume_on_another_base(cli, a_run):
    with open(a_run / "expanded" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    code, _, err = cli(train_main, "--output", a_run, "--resume")
    cli.refused(code, err, "expanded", "the weights were", "put it back")


def test_resume_on_changed_text(make_config, tmp_path, cli, texts):
    shutil.copy(texts / "domain.jsonl", tmp_path / "mine.jsonl")
    run_training(make_config(data={"domain": str(tmp_path / "mine.jsonl")}, train={"steps": 1}))
    with open(tmp_path / "mine.jsonl", "a") as file:
        file.write('{"text": "one more document"}\n')
    code, _, err = cli(train_main, "--output", tmp_path / "run", "--resume")
    cli.refused(code, err, "text has changed")


# -- the disk, and NaN ---------------------------------------------------------------------------------------------


def test_no_space_for_the_expansion(refused, monkeypatch, tmp_path):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused("1e-06 GB are free", "3 checkpoints", "keep_checkpoints")
    assert not (tmp_path / "run" / "expanded").exists()


# -- export --------------------------------------------------------------------------------------------------------


def test_export_of_what_is_no_run(cli, tmp_path):
    code, _, err = cli(export_main, tmp_path)
    cli.refused(code, err, tmp_path, "no run there")


def test_export_on_another_base(cli, tmp_path, a_run):
    with open(a_run / "expanded" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    code, _, err = cli(export_main, a_run, tmp_path / "out")
    cli.refused(code, err, "expanded", "the weights were", "put it back")
    assert not (tmp_path / "out").exists()


def test_export_before_the_first_checkpoint(cli, tmp_path, a_run):
    shutil.rmtree(a_run / "checkpoints")
    code, _, err = cli(export_main, a_run, tmp_path / "out")
    cli.refused(code, err, "no complete checkpoint")


def test_export_onto_something(cli, tmp_path, a_run):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    code, _, err = cli(export_main, a_run, tmp_path / "out")
    cli.refused(code, err, tmp_path / "out", "something there")
    assert (tmp_path / "out" / "precious").exists()
