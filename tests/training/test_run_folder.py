"""Where the next quickstart goes: past complete runs, never past one that could be resumed or is going on."""

from __future__ import annotations

import multiprocessing
import shlex
import shutil
from pathlib import Path

import forked
import pytest
import yaml

from llama_pro_fast.errors import UserError
from llama_pro_fast.recipe import parse
from llama_pro_fast.resume import load_config
from llama_pro_fast.runs.run_folder import claimed, first_free, resume_command, shown
from llama_pro_fast.training.run import run_training


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder in which commands are typed."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def put(here, finished):
    """Copy the finished run here under a name; the test may take away what makes it complete."""

    def copy(name: str, *, without: tuple[str, ...] = ()) -> Path:
        folder = Path(shutil.copytree(finished, here / name))
        for part in without:
            shutil.rmtree(folder / part)
        return folder

    return copy


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        first_free(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_nobody_has_used_is_free(here):
    assert first_free(Path("runs", "quickstart")) == Path("runs", "quickstart")
    assert not list(here.iterdir()), "looking for a folder made one"


@pytest.mark.parametrize("beside", [None, "mine/b/other"])
def test_a_refused_run_takes_back_the_folders_it_made(here, beside):
    (here / "mine").mkdir()

    def be_refused() -> None:
        with claimed(Path("mine", "b", "c"), resume=False, overwrite=False):
            if beside:
                (here / beside).mkdir()
            raise UserError("no rate")

    with pytest.raises(UserError, match="no rate"):
        be_refused()
    left = [str(path.relative_to(here)) for path in sorted(here.rglob("*"))]
    assert left == (["mine", "mine/b", "mine/b/other"] if beside else ["mine"])


def test_what_is_no_run_is_left_to_the_check_of_the_output(here):
    (here / "run").mkdir()
    assert first_free(Path("run")) == Path("run")


def test_complete_runs_are_passed_by(put):
    put("run")
    assert first_free(Path("run")) == Path("run-2")
    put("run-2")
    assert first_free(Path("run")) == Path("run-3")


def test_a_gap_is_taken(put):
    put("run")
    put("run-3")
    assert first_free(Path("run")) == Path("run-2")


def test_an_interrupted_run_is_to_be_resumed_by_the_command_that_is_said(here, make_config, stopped_at_2):
    stopped_at_2(make_config(train={"steps": 4, "checkpoint_every": 100}, output=str(here / "my run")))
    message = refusal(Path("my run"))
    assert "saved at step 2 of 4" in message
    command = "llama-pro-fast train --output 'my run' --resume"
    assert f"go on with  {command}  (" in message
    request = parse(shlex.split(command)[2:])
    assert run_training(request.config, resume=request.resume)["steps"] == 4
    assert first_free(Path("my run")) == Path("my run-2")


def test_a_run_without_a_checkpoint_is_interrupted_too(put):
    put("run", without=("checkpoints", "export", "report"))
    message = refusal(Path("run"))
    assert "saved at step 0 of 6" in message
    assert resume_command(Path("run")) in message


def test_a_run_is_complete_when_its_summary_is_written_and_not_before(put):
    folder = put("run", without=("report",))
    assert "saved at step 6 of 6" in refusal(Path("run"))
    (folder / "report").mkdir()
    (folder / "report" / "summary.json.new").write_text("{}")
    refusal(Path("run"))


def test_an_interrupted_run_behind_a_complete_one_is_found(put):
    put("run")
    put("run-2", without=("report",))
    assert refusal(Path("run")).startswith("run-2: holds an interrupted run")


def test_asking_changes_nothing_and_lets_go_of_the_folder(put):
    folder = put("run", without=("report",))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    refusal(Path("run"))
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before
    with claimed(folder, resume=True, overwrite=False):
        pass


@pytest.mark.slow
def test_a_run_that_another_process_is_writing_is_not_called_interrupted(put, tmp_path):
    folder = put("run", without=("report",))
    ours, theirs = multiprocessing.Pipe()
    other = forked.start(forked.hold, str(folder), theirs, screen=tmp_path / "screen.txt")
    assert ours.recv() == "held"
    message = refusal(Path("run"))
    ours.send("stop")
    other.join()
    assert "another run is writing there" in message
    assert "--resume" not in message
    assert "--resume" in refusal(Path("run")), "the other process is gone: now it is interrupted"


SECTIONS = ("model", "expand", "data", "optim", "train", "eval")
WRONG = [yaml.safe_dump(dict.fromkeys(SECTIONS, section) | {"output": "run"}) for section in ("text", {"stepz": 3}, [])]
"""Nothing is deleted, and nothing resumed, for a file that only looks like a configuration."""


@pytest.mark.parametrize("content", ["train: [\n", "output: run\n", *WRONG])
def test_a_damaged_config_is_said(put, content):
    folder = put("run", without=("report",))
    (folder / "config.yaml").write_text(content)
    assert "config.yaml" in refusal(Path("run"))


def test_a_run_from_before_an_option_has_its_default(put):
    folder = put("run")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("  tokenizer: pretrained\n", ""))
    assert (folder / "config.yaml").read_text() != text
    assert load_config(folder).model.tokenizer == "pretrained"


def test_paths_are_shown_as_they_would_be_typed(here, tmp_path):
    assert shown(Path("runs/a")) == "runs/a"
    assert shown(here / "runs" / "a") == "runs/a"
    assert shown(tmp_path / "elsewhere") == str(tmp_path / "elsewhere")
    assert shlex.split(resume_command(here / "it's here"))[-2:] == ["it's here", "--resume"]
