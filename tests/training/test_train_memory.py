"""A run settles micro-batch and recomputation before it loads anything, says why, and keeps them for good."""

from __future__ import annotations

import json
import math
import os

import pytest

from llama_pro_fast.errors import UserError
from llama_pro_fast.expand import main as expand_main
from llama_pro_fast.expansion.manifest import what_trains
from llama_pro_fast.hf.config import read_config
from llama_pro_fast.hf.folder import PretrainedFolder, folder_digest
from llama_pro_fast.hf.known_shapes import SHAPES
from llama_pro_fast.hf.loading import expected_tensors, load_model
from llama_pro_fast.hf.safetensors import write_header
from llama_pro_fast.planning import devices
from llama_pro_fast.planning.explain import why
from llama_pro_fast.planning.job import recompute_text
from llama_pro_fast.ranks import ALONE
from llama_pro_fast.recipe import parse
from llama_pro_fast.resume import load_config
from llama_pro_fast.training import loop, model_folder, settle
from llama_pro_fast.training.run import run_training

GIB = 2**30


@pytest.fixture
def ask(make_config, base_of, tmp_path):
    """Settle the memory of a run on a deep expanded model as `run` does, without running it.

    Returns ``(recompute as it is stored, reason, planned peak in bytes)``.
    """
    expand_main(
        [str(base_of(num_hidden_layers=8, intermediate_size=160)), str(tmp_path / "expanded"), "--expand.groups", "2"]
    )
    folder = PretrainedFolder(tmp_path / "expanded")

    def settled(usable: float | None = None, **changes):
        settings = {"micro_batch_size": None, "attention": "cpu_flash", "dtype": "float32"} | changes
        config = make_config(train=settings | ({} if usable is None else {"memory": usable / GIB}))
        trained = what_trains(folder.raw_config, folder.config.num_hidden_layers, parameters="new_blocks", name="")
        question = settle.question_of(config, folder, trained, None, settle.device_of(config, ALONE), document=20)
        found = settle.choose(question)
        return recompute_text(found.recompute, trained.first), why(question, found), found.peak

    return settled


def test_what_was_chosen_stands_in_the_resolved_config(make_config, tmp_path, capsys):
    run_training(make_config(train={"micro_batch_size": None}))
    said, chosen = capsys.readouterr().out, load_config(tmp_path / "run").train
    assert (chosen.micro_batch_size, chosen.recompute, chosen.attention, chosen.threads) == (4, "none", "cpu_flash", 1)
    assert 0 < chosen.memory < 10_000
    assert "memory: 4 sequences at a time, the whole batch; nothing recomputed: everything fits" in said
    summary = json.loads((tmp_path / "run" / "report" / "summary.json").read_text())
    assert summary["micro_batch_size"] == 4
    assert summary["recompute"] == "none"
    assert 0 < summary["planned_memory_gib"] < 0.01
    assert f"planned {summary['planned_memory_gib']:.2f} GiB for its tensors" in said


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputing_changes_nothing_of_a_run(make_config, tmp_path, dtype):
    """Nor does a mixture: weights byte for byte, and every loss; in bf16 too, where `block` keeps no copies."""
    seen = []
    for name in ("none", "block", "..ma.b"):
        run_training(make_config(train={"recompute": name, "dtype": dtype}, output=str(tmp_path / name)))
        rows = [json.loads(row) for row in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses = [(row["kind"], row["step"], row["loss"]) for row in rows if row["kind"] != "save"]
        seen.append((folder_digest(PretrainedFolder(tmp_path / name / "export")), losses))
        assert load_config(tmp_path / name).train.recompute == name
    assert seen[0] == seen[1] == seen[2]


def test_the_policies_reach_the_blocks(make_config, monkeypatch):
    found = []

    def watched(*args, **kwargs):
        model = load_model(*args, **kwargs)
        found.append("".join(block.recompute.value[0] for block in model.blocks))
        return model

    monkeypatch.setattr(loop, "load_model", watched)
    run_training(make_config(train={"recompute": "..ma.b", "steps": 1}))
    assert found == ["nnmanb"]


def test_short_of_memory_it_recomputes_only_what_it_must(ask):
    plenty, reason, needed = ask(micro_batch_size=4)
    assert plenty == "none"
    assert reason == "4 sequences at a time as asked; nothing recomputed: everything fits"
    short, reason, less = ask(needed - 1, micro_batch_size=4)
    assert set(short) & set("mab")
    assert "." in short[4:], "the lowest blocks give enough"
    assert reason.startswith(f"4 sequences at a time as asked; {short} recomputed, ")
    assert less < needed


def test_an_own_choice_that_does_not_fit_is_told_what_would(ask):
    _, _, needed = ask(micro_batch_size=4, recompute="none")
    with pytest.raises(UserError, match=r"micro-batch 4 and the recomputation asked for needs .* What would fit: mic"):
        ask(needed - 1, micro_batch_size=4, recompute="none")


def test_a_run_that_is_too_large_ends_before_anything_is_loaded(refused, tmp_path, monkeypatch):
    """Llama-3.1-8B in float32 beside this machine's memory: 16 GB of holes in a file, of which not one is read."""
    folder = tmp_path / "large"
    folder.mkdir()
    shape = SHAPES["meta-llama/Llama-3.1-8B"] | {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(shape))
    _, config = read_config(folder / "config.json")
    rows = [(name, "BF16", shape, 2 * math.prod(shape)) for name, shape in expected_tensors(config).items()]
    with open(folder / "model.safetensors", "wb") as file:
        write_header(file, rows)
        os.truncate(file.fileno(), file.tell() + sum(row[-1] for row in rows))

    def no(*args, **kwargs):
        raise AssertionError("something was loaded")

    for name in ("expand_and_prove", "make_tokenizer", "make"):
        monkeypatch.setattr(model_folder, name, no)
    monkeypatch.setattr(PretrainedFolder, "read_bytes", no)
    monkeypatch.setattr(devices, "available_memory", lambda: 24 * GIB)
    said = refused(
        "--train.memory: needs ", " are usable on CPU", "What would fit: ", model__path=folder, expand__groups=8
    )
    assert "one H100 80 GB" not in said or "one A100 80 GB" in said
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_its_choice_whatever_memory_there_is(make_config, stopped_at_2, tmp_path, monkeypatch):
    stopped_at_2(make_config(train={"micro_batch_size": None, "recompute": "all_but_attention"}))
    before = load_config(tmp_path / "run").train
    monkeypatch.setattr(devices, "available_memory", lambda: 1)
    monkeypatch.setattr(settle, "best_fit", lambda *args, **kwargs: pytest.fail("a resumed run was planned again"))
    run_training(parse(["--output", str(tmp_path / "run"), "--resume"]).config, resume=True)
    assert load_config(tmp_path / "run").train == before
    assert (tmp_path / "run" / "export" / "config.json").exists()


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"train__memory": 0}, ["--train.memory"]),
        ({"train__memory": "much"}, ["--train.memory"]),
        ({"train__recompute": "everything"}, ["--train.recompute everything", "all_but_attention", "6 blocks"]),
        ({"train__recompute": "..mx.b"}, ["--train.recompute ..mx.b"]),
        ({"train__memory": 1e-6}, ["--train.memory: needs ", "usable on CPU"]),
    ],
)
def test_bad_values_are_refused_in_a_line(refused, options, fragments):
    refused(*fragments, **options)


def test_an_expanded_model_is_planned_by_its_manifest(ask):
    """The blocks below its lowest new one have no backward, so their letters mean nothing."""
    recompute, reason, _ = ask(recompute="block")
    assert recompute == "block"
    assert reason.endswith("more work")
