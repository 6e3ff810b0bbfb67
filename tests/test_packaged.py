"""What the package brings along, by name: recipes for `--config`, a base for `--model.path`, a run for no options."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

import llama_pro_fast
from llama_pro_fast.config import RunConfig, Settled
from llama_pro_fast.errors import UserError
from llama_pro_fast.hf.config import resolve
from llama_pro_fast.recipe import RECIPES, packaged_recipes, parse
from llama_pro_fast.resume import save_config, to_dict
from llama_pro_fast.train import main as train_main


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """Commands are typed in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def settings(argv: list[str]) -> dict:
    return to_dict(parse(argv).config)


# Recipes


def test_the_recipes_are_those_of_the_folder():
    assert {"llama-2-7b", "llama-3.1-8b", "prose-3m", "quickstart"} <= set(packaged_recipes())


@pytest.mark.parametrize("name", packaged_recipes())
def test_a_recipe_is_read_by_its_name_as_by_its_path(name):
    by_path = settings(["--config", str(RECIPES / f"{name}.yaml")])
    assert settings(["--config", name]) == by_path
    assert settings([f"--config={name}"]) == by_path
    assert by_path["optim"]["lr"] == float(yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["optim"]["lr"])


def test_later_options_win_and_earlier_ones_do_not():
    for argv in (["--config", "quickstart", "--train.steps", "7"], ["--config=quickstart", "--train.steps=7"]):
        assert settings(argv)["train"]["steps"] == 7
    recipe = settings(["--config", "quickstart"])["train"]["steps"]
    assert settings(["--train.steps", "7", "--config", "quickstart"])["train"]["steps"] == recipe != 7


def test_two_recipes_stand_on_each_other(here):
    (here / "mine.yaml").write_text("train:\n  steps: 7\n")
    both = settings(["--config", "quickstart", "--config", "mine.yaml"])
    assert both["train"]["steps"] == 7
    assert both["data"]["domain"] == "stdlib:code"


def test_a_file_of_that_name_wins(here):
    (here / "quickstart").write_text("train:\n  steps: 7\n")
    assert settings(["--config", "quickstart"])["train"]["steps"] == 7
    assert settings(["--config=quickstart"])["data"]["domain"] is None


def test_a_folder_of_that_name_is_no_recipe(here):
    """As in runs/, where the quickstart has left its folder."""
    (here / "quickstart").mkdir()
    assert settings(["--config", "quickstart"])["data"]["domain"] == "stdlib:code"


def test_only_the_value_of_config_is_a_recipes_name():
    found = settings(["--config", "quickstart", "--model.path", "quickstart"])
    assert (found["model"]["path"], found["data"]["domain"]) == ("quickstart", "stdlib:code")


@pytest.mark.parametrize("argv", [["--config", "quickstrat"], ["--config=quickstrat"]])
def test_an_unknown_name_lists_those_there_are(argv):
    with pytest.raises(UserError) as caught:
        parse(argv)
    message = str(caught.value)
    assert "\n" not in message
    assert "quickstrat" in message
    assert all(name in message for name in packaged_recipes()), message


def test_the_help_lists_them(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"({', '.join(packaged_recipes())})" in printed


def test_config_without_a_value_is_said_in_one_line():
    with pytest.raises(UserError) as caught:
        parse(["--config"])
    assert "\n" not in str(caught.value)


# The base


def test_a_builtin_model_is_a_folder_of_the_package():
    folder = resolve("builtin:prose-3m")
    assert (folder / "config.json").is_file()
    assert folder.is_relative_to(Path(llama_pro_fast.__file__).parent)


@pytest.mark.parametrize("name", ["prose-9b", "", ".", "../assets", str(resolve("builtin:prose-3m"))])
def test_an_unknown_builtin_model_lists_those_there_are(name):
    with pytest.raises(UserError) as caught:
        resolve("builtin:" + name)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"model builtin:{name}: not in the package")
    assert "builtin:prose-3m" in message


# No options


@pytest.fixture
def asked(monkeypatch) -> list:
    """What `train` was asked to run; nothing is run."""
    calls = []

    def run(config, *, resume=False, overwrite=False, **_):
        calls.append((config, resume, overwrite))
        return {}

    monkeypatch.setattr(sys.modules["llama_pro_fast.train"], "run_training", run)
    return calls


def test_no_options_are_the_quickstart_recipe_into_a_folder_of_its_own(here, asked, capsys):
    assert train_main([]) == 0
    ((config, resume, overwrite),) = asked
    assert to_dict(config) == settings(["--config", "quickstart", "--output", "runs/quickstart"])
    assert config.output == str(here / "runs" / "quickstart")
    assert not resume
    assert not overwrite
    said = capsys.readouterr().out
    assert "no options: the quickstart, into runs/quickstart" in said
    assert "--help" in said


def settled(config: RunConfig) -> Settled:
    """As a run would have stored it."""
    computation = {"device": "cpu", "dtype": "float32", "attention": "cpu_flash", "recompute": "none", "threads": 1}
    sections = {each.name: getattr(config, each.name) for each in fields(config)} | {
        "optim": replace(config.optim, warmup_steps=5, decay_steps=16),
        "train": replace(config.train, memory=1.0, checkpoint_every=8, **computation),
    }
    return Settled(**sections)


def test_a_second_quickstart_goes_beside_the_first(here, asked):
    train_main([])
    folder = here / "runs" / "quickstart"
    (folder / "report").mkdir(parents=True)
    save_config(settled(asked[0][0]), folder / "config.yaml")
    (folder / "report" / "summary.json").write_text("{}")
    train_main([])
    assert asked[1][0].output == str(here / "runs" / "quickstart-2")


def test_an_interrupted_quickstart_is_not_started_over(here, asked):
    train_main([])
    folder = here / "runs" / "quickstart"
    folder.mkdir(parents=True)
    save_config(settled(asked[0][0]), folder / "config.yaml")
    with pytest.raises(UserError, match=r"go on with  llama-pro-fast train --output runs/quickstart"):
        train_main([])
    assert len(asked) == 1


def test_from_inside_the_folder_of_runs_it_works_too(here, asked, monkeypatch):
    (here / "runs" / "quickstart").mkdir(parents=True)
    monkeypatch.chdir(here / "runs")
    assert train_main([]) == 0
    assert asked[0][0].data.domain == "stdlib:code"


def test_the_verb_without_options_is_the_same(here, asked, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train"])
    assert train_main() == 0
    assert asked[0][0].output == str(here / "runs" / "quickstart")
