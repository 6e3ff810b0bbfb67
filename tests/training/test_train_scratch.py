"""A base from nothing but a config.json and text: weights and tokenizer are the run's own, and a resume finds both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_pro_fast.hf.folder import PretrainedFolder, folder_digest
from llama_pro_fast.recipe import parse
from llama_pro_fast.runs.metrics import read_metrics
from llama_pro_fast.text.sources import resolve_sources
from llama_pro_fast.text.tokenizer import train_tokenizer
from llama_pro_fast.training import model_folder
from llama_pro_fast.training.run import run_training


@pytest.fixture
def architecture(base, tmp_path) -> Path:
    """A folder with a config.json and nothing else."""
    folder = tmp_path / "architecture"
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    return folder


@pytest.fixture
def scratch(architecture, make_config):
    def make(model: dict | None = None, **changes):
        changes["train"] = {"parameters": "all", "steps": 4, "checkpoint_every": 100} | changes.get("train", {})
        settings = {"path": str(architecture), "init": "random", "tokenizer": "train"} | (model or {})
        return make_config(model=settings, expand={"groups": None}, **changes)

    return make


def as_json(folder: Path) -> dict:
    return json.loads(AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str())


def resumed(run: Path) -> dict:
    return run_training(parse(["--output", str(run), "--resume"]).config, resume=True)


@pytest.mark.usefixtures("read_back")
def test_the_export_carries_the_tokenizer_of_the_training_text(scratch, tmp_path):
    config = scratch()
    summary = run_training(config)
    sources = resolve_sources(config.data, default_general=False)
    expected = train_tokenizer(sources, vocab_size=320, held_out=0.1, bos=0, eos=1)
    assert as_json(tmp_path / "run" / "export") == json.loads(expected.backend_tokenizer.to_str())
    prompt = AutoTokenizer.from_pretrained(tmp_path / "run" / "export")("the block copies", return_tensors="pt")
    assert prompt["input_ids"][0, 0] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    assert model(**prompt).logits.isfinite().all()
    assert summary["export_check"]["compared"] > 0


@pytest.mark.usefixtures("read_back")
def test_there_is_no_base_to_compare_with(scratch):
    summary = run_training(scratch())
    assert summary["trained_parameters"] == summary["parameters"]
    assert summary["trained_blocks"] == [0, 1, 2, 3]
    assert summary["sample"]["base"] is None
    assert summary["sample"]["now"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", None])
def test_weights_are_stored_in_the_configs_dtype(scratch, architecture, tmp_path, dtype):
    path = architecture / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": dtype}))
    run_training(scratch(train={"steps": 1}))
    expected = {"BF16"} if dtype == "bfloat16" else {"F32"}
    for name in ("initial", "export"):
        assert {entry.dtype for entry in PretrainedFolder(tmp_path / "run" / name).entries.values()} == expected


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_its_tokenizer(scratch, stopped_at_2, tmp_path):
    whole = run_training(scratch(output=str(tmp_path / "whole")))
    stopped_at_2(scratch())
    assert resumed(tmp_path / "run")["results"] == whole["results"]
    assert as_json(tmp_path / "run" / "export") == as_json(tmp_path / "whole" / "export")
    exports = [PretrainedFolder(tmp_path / name / "export") for name in ("run", "whole")]
    assert folder_digest(exports[0]) == folder_digest(exports[1])


@pytest.mark.slow
def test_a_run_that_died_before_its_model_was_there_makes_the_same_tokenizer(scratch, tmp_path, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model_folder, "make", killed)
        with pytest.raises(KeyboardInterrupt):
            run_training(scratch())
    assert not (tmp_path / "run" / "initial").exists()
    resumed(tmp_path / "run")
    run_training(scratch(output=str(tmp_path / "whole")))
    assert as_json(tmp_path / "run" / "export") == as_json(tmp_path / "whole" / "export")


def test_a_resumed_run_needs_the_architectures_folder_no_more(scratch, stopped_at_2, architecture, tmp_path):
    stopped_at_2(scratch())
    shutil.rmtree(architecture)
    assert resumed(tmp_path / "run")["steps"] == 4


@pytest.mark.slow
def test_the_tokenizer_in_the_models_folder_is_not_used(scratch, base, tmp_path):
    run_training(scratch(train={"steps": 1}, output=str(tmp_path / "alone")))
    run_training(scratch(model={"path": str(base)}, train={"steps": 1}))
    assert as_json(base) != as_json(tmp_path / "alone" / "export")
    assert as_json(tmp_path / "run" / "export") == as_json(tmp_path / "alone" / "export")
    assert read_metrics(tmp_path / "run")[0]["loss"] == read_metrics(tmp_path / "alone")[0]["loss"]


def test_no_file_of_another_tokenizer_is_left_in_the_export(scratch, architecture, tmp_path):
    """Some readers take tokenizer.model, or vocab.json and merges.txt, before tokenizer.json."""
    for name in ("tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json", "LICENSE"):
        (architecture / name).write_text("{}")
    run_training(scratch(train={"steps": 1}))
    same = {path.name for path in (tmp_path / "run" / "export").iterdir() if path.read_bytes() == b"{}"}
    assert same == {"LICENSE"}


def test_with_the_models_tokenizer_its_files_are_the_models(scratch, base, tmp_path):
    run_training(scratch(model={"path": str(base), "tokenizer": "pretrained"}, train={"steps": 1}))
    assert as_json(tmp_path / "run" / "export") == as_json(base)
