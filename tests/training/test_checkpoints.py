"""What a checkpoint proves, what is done about one that is damaged, and what in a run's folder is ours."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import forked
import pytest
import torch
import yaml
from runs_read import digests
from torch.distributed import checkpoint as dcp

from llama_pro_fast.errors import UserError
from llama_pro_fast.export import main as export_main
from llama_pro_fast.recipe import parse
from llama_pro_fast.resume import load_config, to_dict
from llama_pro_fast.runs import checkpoint, marker, run_folder
from llama_pro_fast.runs.checkpoint import complete_checkpoints, newest, save, verified
from llama_pro_fast.runs.marker import CheckpointInfo, Progress
from llama_pro_fast.train import main as train_main
from llama_pro_fast.training.run import run_training


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


# -- damage --------------------------------------------------------------------------------------------------------


def test_every_bit_of_every_file_is_watched(a_run):
    """Bits drawn from all over each file of a checkpoint, its marker too: each flip is found, and the file named."""
    folder = complete_checkpoints(a_run)[-1]
    generator = torch.Generator().manual_seed(0)
    files = sorted(path for path in folder.iterdir())
    assert [path.name for path in files] == [
        "COMPLETE",
        *(f"shard-00001-model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)),
    ]
    for path in files:
        for bit in torch.randint(8 * path.stat().st_size, (40,), generator=generator).tolist():
            flip(path, bit)
            with pytest.raises(UserError, match=rf"damaged: .*{path.name}|{path.name} .*"):
                verified(folder)
            flip(path, bit)
    verified(folder)


def emptied(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(bytes(shard.stat().st_size))


def cut(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def lost(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def of_another_step(folder: Path) -> None:
    name = next(folder.glob("*.safetensors")).name
    shutil.copy(folder.with_name("step-000004") / name, folder / name)


def with_the_marker_of_another(folder: Path) -> None:
    shutil.copy(folder.with_name("step-000004") / "COMPLETE", folder / "COMPLETE")


def with_one_file_more(folder: Path) -> None:
    shutil.copy(next(folder.glob("*.safetensors")), folder / "shard-00009.safetensors")


def without_words(folder: Path) -> None:
    (folder / "COMPLETE").write_bytes(b"\xff" * 40)


def nested(folder: Path) -> None:
    (folder / "COMPLETE").write_text("[" * 100_000)


def a_pipe(folder: Path) -> None:
    (folder / "COMPLETE").unlink()
    os.mkfifo(folder / "COMPLETE")


def forged(folder: Path) -> None:
    """Made by somebody who can count a digest, of another form."""
    content = json.loads((folder / "COMPLETE").read_text())
    content["log"]["unlogged"] = ["x"]
    content["digest"] = marker._own_digest({key: value for key, value in content.items() if key != "digest"})
    (folder / "COMPLETE").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "damage",
    [
        a_pipe,
        forged,
        emptied,
        cut,
        lost,
        of_another_step,
        with_the_marker_of_another,
        with_one_file_more,
        without_words,
        nested,
    ],
)
def test_a_damaged_checkpoint_is_named_with_the_whole_one_before_it(damage, a_run, tmp_path, cli):
    folder = complete_checkpoints(a_run)[-1]
    damage(folder)
    code, _, err = cli(export_main, a_run, tmp_path / "out")
    cli.refused(code, err, folder, "step-000004 before it is whole", "--from_step 4")
    assert not (tmp_path / "out").exists()
    if damage is emptied:  # once, as it takes a while: what the message says works
        expected, metrics = digests(a_run / "export"), (a_run / "metrics.jsonl").read_bytes()
        code, _, err = cli(train_main, "--output", a_run, "--resume")
        cli.refused(code, err, folder, "--from_step 4")
        assert cli(train_main, "--output", a_run, "--resume", "--from_step", "4")[0] == 0
        assert digests(a_run / "export") == expected
        assert (a_run / "checkpoints" / "step-000006.aside").is_dir(), "the damaged one was deleted"
        train = [row for row in map(json.loads, metrics.splitlines()) if row["kind"] == "train"]
        again = [json.loads(line) for line in (a_run / "metrics.jsonl").read_bytes().splitlines()]
        assert [row["loss"] for row in again if row["kind"] == "train"] == [row["loss"] for row in train]
    assert cli(export_main, a_run, tmp_path / "out", "--from_step", "4")[0] == 0


def test_with_no_whole_one_left_that_is_said(a_run, cli):
    for folder in complete_checkpoints(a_run):
        lost(folder)
    code, _, err = cli(train_main, "--output", a_run, "--resume")
    cli.refused(code, err, "step-000006", "no whole one before it")


def test_a_step_that_is_not_there_is_said_with_those_that_are(a_run, tmp_path, cli):
    code, _, err = cli(export_main, a_run, tmp_path / "out", "--from_step", "5")
    cli.refused(code, err, "--from_step 5", "there is 4, 6")


def test_an_older_step_does_not_take_the_place_of_the_runs_own_export(a_run, tmp_path, cli):
    before = digests(a_run / "export")
    code, _, err = cli(export_main, a_run, "--from_step", "4")
    cli.refused(code, err, "--from_step 4: give a folder of its own")
    assert cli(export_main, a_run, "--from_step", "6")[0] == 0
    assert digests(a_run / "export") == before


class RunsWhenRead:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_nothing_in_a_runs_folder_runs_code(a_run, tmp_path, cli, monkeypatch):
    """A pickle under every name that a reader of checkpoints or of models might unpickle."""
    monkeypatch.chdir(tmp_path)
    folder = complete_checkpoints(a_run)[-1]
    for place in (folder, a_run, a_run / "expanded", a_run / "checkpoints"):
        for name in (".metadata", "__0_0.distcp", "data.pkl", "pytorch_model.bin", "rng_state.pth"):
            (place / name).write_bytes(pickle.dumps(RunsWhenRead()))
    assert cli(export_main, a_run, tmp_path / "out")[0] == 0
    shutil.copy(folder / ".metadata", folder / "COMPLETE")
    code, _, err = cli(export_main, a_run, tmp_path / "second")
    cli.refused(code, err, "COMPLETE")
    assert not Path("ran").exists()


def test_a_checkpoint_of_an_older_version_is_refused_before_anything_of_it_is_read(a_run, cli):
    folder = complete_checkpoints(a_run)[-1]
    (folder / "COMPLETE").write_text(json.dumps({"progress": {"step": 6}, "model": "expanded"}))
    code, _, err = cli(train_main, "--output", a_run, "--resume")
    cli.refused(code, err, "older version", "pickles")


# -- what is ours --------------------------------------------------------------------------------------------------


def test_what_is_not_named_as_a_checkpoint_is_left_alone(make_config, a_run, cli):
    """Backups, archives, notes, links: at a resume, at saves that sweep and purge, and at an export."""
    place = a_run / "checkpoints"
    shutil.copytree(place / "step-000006", place / "step-000006-keep")
    shutil.copytree(place / "step-000006", place / "step-6")
    (place / "step-000006.tar.gz").write_bytes(b"archive")
    (place / "step-notes").mkdir()
    (place / "step-notes" / "notes.txt").write_text("mine")
    (place / "step-000099").write_text("a file")
    (place / "step-000007").symlink_to(place / "step-notes")  # what it leads to is no checkpoint
    (place / "step-００００１２").mkdir()  # digits, but not ASCII's
    kept = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.parent.name != "step-000006"}
    kept = {path: time for path, time in kept.items() if "step-000004" not in str(path) and path.name != "step-000006"}
    assert cli(train_main, "--output", a_run, "--resume", "--train.steps", "12")[0] == 0
    assert [folder.name for folder in complete_checkpoints(a_run)] == ["step-000010", "step-000012"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert cli(export_main, a_run)[0] == 0


def a_state(run: Path) -> tuple[dict[str, torch.Tensor], CheckpointInfo]:
    """What a save takes, read from the run's last checkpoint."""
    folder, info = newest(run)
    tensors = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in checkpoint.stored_tensors(folder).items()}
    checkpoint.load(folder, tensors)
    return tensors, info


def at(info: CheckpointInfo, step: int) -> CheckpointInfo:
    from dataclasses import replace

    return replace(info, progress=Progress(step, step * 4, step * 128))


def test_a_save_sweeps_what_is_half_written_and_keeps_as_many_whole_ones_as_asked(a_run):
    tensors, info = a_state(a_run)
    place = a_run / "checkpoints"
    (place / "step-000003").mkdir()
    (place / "step-000003" / "shard-00001-model-00001-of-00003.safetensors").write_bytes(b"half")
    cut(place / "step-000006")  # by its size no longer whole
    save(a_run, tensors, at(info, 7), keep=2)
    assert sorted(f.name for f in place.iterdir()) == ["step-000004", "step-000006", "step-000007"], "a whole one went"
    save(a_run, tensors, at(info, 8), keep=2)
    assert sorted(f.name for f in place.iterdir()) == ["step-000007", "step-000008"]


@pytest.mark.parametrize("written", ["write", "marker"])
def test_a_save_that_fails_leaves_no_half_and_the_ones_before_whole(written, a_run, monkeypatch):
    tensors, info = a_state(a_run)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if written == "write":
        monkeypatch.setattr(dcp.HuggingFaceStorageWriter, "write_data", full)
    else:
        monkeypatch.setattr(marker, "_marker_text", full)
    with pytest.raises(UserError, match=r"step-000007: .*No space left"):
        save(a_run, tensors, at(info, 7), keep=2)
    assert [f.name for f in sorted((a_run / "checkpoints").iterdir())] == ["step-000004", "step-000006"]
    newest(a_run)


@pytest.mark.slow
def test_a_disk_that_fills_up_in_a_save_is_one_line_and_costs_nothing(config_at, base, tmp_path):
    """A real limit of the kernel's, which the model's own file would pass and that of its embeddings, with their
    moments in float32, does not. With room again the run goes on."""
    limit = (base / "model.safetensors").stat().st_size + 20_000
    recipe, screen = tmp_path / "recipe.yaml", tmp_path / "screen.txt"
    everything = {"expand": {"groups": None}, "train": {"parameters": "all", "checkpoint_every": 3}}
    config = config_at(tmp_path / "run", **everything)
    recipe.write_text(yaml.safe_dump({k: v for k, v in to_dict(config).items() if v is not None}))
    words = ["python", "-m", "llama_pro_fast.train", "--config", str(recipe), "--resume", "auto"]
    process = forked.start(forked.limited, words, limit, screen=screen)
    process.join()
    assert process.exitcode == 2, screen.read_text()
    assert "Traceback" not in screen.read_text()
    *_, last = screen.read_text().splitlines()
    assert last.startswith("llama-pro-fast: error: ")
    assert "step-000003: " in last
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    process = forked.start(forked.typed, words, screen=screen)
    process.join()
    assert process.exitcode == 0
    assert complete_checkpoints(tmp_path / "run")[-1].name == "step-000006"


def test_a_save_into_a_folder_that_is_gone_is_refused(a_run):
    tensors, info = a_state(a_run)
    shutil.rmtree(a_run)
    with pytest.raises(UserError, match="the run's folder is gone"):
        save(a_run, tensors, at(info, 7), keep=2)
    assert not a_run.exists()


def test_every_block_has_a_file_of_its_own(a_run):
    """A file is put together in memory: with one for all, a save of a large model would double what it needs."""
    entries = {
        path.name: set(checkpoint.stored_tensors(path.parent))
        for path in complete_checkpoints(a_run)[-1].glob("*model*")
    }
    assert len(entries) == 3
    sizes = sorted(path.stat().st_size for path in complete_checkpoints(a_run)[-1].glob("*.safetensors"))
    assert sizes[1] == pytest.approx(sizes[2], rel=0.1), "the two blocks that train"


# -- room, and time ------------------------------------------------------------------------------------------------


def test_a_disk_that_will_not_hold_the_run_is_said_before_its_first_step(make_config, monkeypatch, tmp_path):
    usage = shutil.disk_usage("/")
    needed = []
    monkeypatch.setattr(
        run_folder.shutil, "disk_usage", lambda path: needed.append(path) or usage._replace(free=900_000)
    )
    with pytest.raises(UserError, match=r"0.0009 GB are free .* needs 0.00\d+ GB, for 3 checkpoints"):
        run_training(make_config())
    assert needed
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_due_by_minutes_too(make_config, tmp_path):
    config = make_config(
        train={"checkpoint_every": None, "checkpoint_minutes": 1e-6, "keep_checkpoints": 99, "steps": 3}
    )
    run_training(config)
    assert [f.name for f in complete_checkpoints(tmp_path / "run")] == [f"step-00000{n}" for n in (1, 2, 3)]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    saves = [row for row in rows if row["kind"] == "save"]
    assert [row["step"] for row in saves] == [1, 2, 3]
    size = sum(path.stat().st_size for path in complete_checkpoints(tmp_path / "run")[0].glob("*.safetensors"))
    assert saves[0]["bytes"] == size
    assert all(row["seconds"] > 0 for row in saves)


def test_by_default_a_short_run_saves_at_its_end_only(make_config, tmp_path):
    run_training(make_config(train={"checkpoint_every": None, "steps": 3}))
    assert [f.name for f in complete_checkpoints(tmp_path / "run")] == ["step-000003"]
    assert load_config(tmp_path / "run").train.checkpoint_minutes == 30


def test_from_step_is_of_resume_only(tmp_path):
    with pytest.raises(UserError, match=r"--from_step: .* give --resume too"):
        parse(["--output", str(tmp_path), "--from_step", "4"])
