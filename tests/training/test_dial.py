"""The dial: an export whose new blocks are scaled is the base at 0, the run at 1, and between them what the run's own
sweep has measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llama_pro_fast.data.corpus import Corpus
from llama_pro_fast.evaluation.dial import SCALES, num_tokens, said
from llama_pro_fast.evaluation.held_out import evaluate
from llama_pro_fast.expansion.lineage import intact_bases
from llama_pro_fast.expansion.manifest import Manifest
from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.expansion.rewrite import write_expanded
from llama_pro_fast.export import main as export_main
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.hf.loading import hf_tensors, load_model
from llama_pro_fast.model.batch import PackedBatch
from llama_pro_fast.resume import load_config
from llama_pro_fast.runs.checkpoint import load, newest, stored_tensors
from llama_pro_fast.training.export import export_run
from llama_pro_fast.training.run import run_training

from .conftest import write_base

ZEROED = ("self_attn.o_proj", "mlp.down_proj")
IDS = list(range(3, 40))


def logits(folder: Path, dtype: torch.dtype) -> list[torch.Tensor]:
    """Of our decoder and of stock transformers."""
    ours = load_model(PretrainedFolder(folder), dtype=dtype, attention="cpu_flash", max_length=64)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for parameter in theirs.parameters():
        parameter.data = parameter.data.clone()  # aligned, whatever the place in the file
    with torch.no_grad():
        return [ours.logits(PackedBatch.from_documents([IDS])), theirs(torch.tensor([IDS])).logits[0]]


def assert_same_function(one: Path, other: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for a, b in zip(logits(one, dtype), logits(other, dtype), strict=True):
            assert torch.equal(a, b), f"{one} and {other} compute different things in {dtype}"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def expand(model: Path, folder: Path, *, after: list[int]) -> Path:
    """Once more, after these of its six blocks."""
    folder.mkdir()
    write_expanded(PretrainedFolder(model), folder, ExpansionPlan.from_after(6, after))
    return folder


def manifest(folder: Path) -> Manifest:
    return Manifest.from_config(json.loads((folder / "config.json").read_text()))


def masters(run: Path) -> dict[str, torch.Tensor]:
    """A run's trained parameters as its last checkpoint has them, under Hugging Face's names."""
    checkpoint, _ = newest(run)
    tensors = {name: torch.empty_like(meta, device="cpu") for name, meta in stored_tensors(checkpoint).items()}
    load(checkpoint, tensors)
    config = PretrainedFolder(run / "export").config
    ours = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    return {hf: part for name, tensor in ours.items() for hf, part in hf_tensors(config, name, tensor)}


def test_at_0_it_is_the_base_and_at_1_the_run(finished, base, tmp_path):
    export_run(finished, tmp_path / "zero", scale=0)
    assert_same_function(tmp_path / "zero", base)
    assert intact_bases(PretrainedFolder(tmp_path / "zero")) == (True,)
    export_run(finished, tmp_path / "one", scale=1)
    assert files(tmp_path / "one") == files(finished / "export")


def test_between_them_the_float32_masters_are_scaled_and_rounded_once(finished, cli, tmp_path):
    code, out, err = cli(export_main, finished, tmp_path / "out", "--scale", "0.3")
    assert code == 0, err
    assert "new blocks times 0.3" in out
    trained = masters(finished)
    whole, scaled = weights(finished / "export"), weights(tmp_path / "out")
    moved = {f"model.layers.{index}.{name}.weight" for index in (2, 5) for name in ZEROED}
    assert {name for name in whole if not torch.equal(whole[name], scaled[name])} == moved
    for name in moved:
        assert torch.equal(scaled[name], (trained[name] * 0.3).bfloat16())
    rounded_twice = sum(not torch.equal(scaled[name], whole[name] * 0.3) for name in moved)
    assert rounded_twice, "rounding before scaling gives the same here: this test shows nothing"
    assert manifest(tmp_path / "out").scale == (0.3,)
    assert manifest(finished / "export").scale == ()


def test_every_generation_has_its_number(finished, base, make_config, tmp_path):
    twice = tmp_path / "run"  # the new blocks are 1 and 4, the older ones 3 and 7
    expanded = expand(finished / "export", tmp_path / "expanded", after=[0, 2])
    run_training(make_config(model={"path": str(expanded)}, expand={"groups": None}, train={"steps": 1}))

    def export(scale) -> Path:
        return export_run(twice, tmp_path / str(scale), scale=scale)[0]

    assert_same_function(export(0), finished / "export")
    assert_same_function(export([0, 0]), base)
    assert files(export([1, 1])) == files(twice / "export")
    assert files(export([1, 0.5])) == files(export(0.5))

    scaled = export([0.5, 1])
    whole, changed = weights(twice / "export"), weights(scaled)
    moved = {name for name in whole if not torch.equal(whole[name], changed[name])}
    assert moved == {f"model.layers.{index}.{name}.weight" for index in (3, 7) for name in ZEROED}
    # Halves of bf16 numbers are bf16 numbers.
    assert all(torch.equal(changed[name], whole[name] / 2) for name in moved)
    # The newest blocks were put into a model that is not in there any more; the first base is.
    assert intact_bases(PretrainedFolder(scaled)) == (True, False)
    assert manifest(scaled).base_intact is False
    assert manifest(scaled).scale == (0.5, 1.0)
    assert manifest(scaled).base_gone(None).startswith("older new blocks were scaled in an export since")


def test_a_scaled_export_is_trained_and_expanded_like_any_other(finished, config_at, cli, tmp_path):
    half, _ = export_run(finished, tmp_path / "half", scale=0.5)
    expanded = expand(half, tmp_path / "expanded", after=[0])
    assert manifest(expanded).scale == (0.5, 1.0)
    assert intact_bases(PretrainedFolder(expanded)) == (True, True)

    again = config_at(tmp_path / "again", model={"path": str(half)}, expand={"groups": None}, train={"steps": 1})
    run_training(again)
    exported = manifest(tmp_path / "again" / "export")
    assert (exported.scale, exported.base_intact) == ((), True), "what has trained since is at 1"

    changed = weights(half)
    changed["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(changed, half / "model.safetensors", {"format": "pt"})
    run_training(config_at(tmp_path / "other", model={"path": str(half)}, expand={"groups": None}, train={"steps": 1}))
    code, _, err = cli(export_main, tmp_path / "other", tmp_path / "out", "--scale", "0.5")
    cli.refused(code, err, "--scale 0.5", "would not be tiny", "without --scale")
    assert export_run(tmp_path / "other", tmp_path / "out", scale=1)


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        ("half", "half is no number"),
        ("-0.5", "--scale -0.5: give 0 (the base) to 1 (what was trained), at most 2"),
        ("2.1", "--scale 2.1"),
        ("nan", "--scale nan"),
        ("0.5,1", "--scale 0.5,1: the model was expanded 1 time; give so many numbers"),
    ],
)
def test_what_is_no_scale_of_the_run_is_refused(scale, words, finished, cli, tmp_path):
    code, _, err = cli(export_main, finished, tmp_path / "out", f"--scale={scale}")
    cli.refused(code, err, words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", [[], ["export"]])
def test_the_runs_own_export_stays_the_run(out, finished, cli):
    before = files(finished / "export")
    code, _, err = cli(export_main, finished, *(finished / name for name in out), "--scale", "0.5")
    cli.refused(code, err, "--scale: give a folder of its own", finished / "export")
    assert files(finished / "export") == before


def test_where_everything_trained_there_is_nothing_to_scale(make_config, cli, tmp_path):
    summary = run_training(make_config(train={"steps": 1, "parameters": "all"}))
    assert summary["dial"] == []
    code, _, err = cli(export_main, tmp_path / "run", tmp_path / "out", "--scale", "0.5")
    cli.refused(
        code, err, "trained other weights than new blocks", "average the weights", tmp_path / "run" / "expanded"
    )


@pytest.mark.usefixtures("read_back")
def test_the_sweep_measures_what_an_export_would_be(make_config, tokenizer, tmp_path):
    base = write_base(tmp_path / "base", tokenizer, torch.float32, attention_bias=True, mlp_bias=True)
    summary = run_training(make_config(model={"path": str(base)}, train={"steps": 2}))
    rows = summary["dial"]
    assert json.loads((tmp_path / "run" / "report" / "summary.json").read_text())["dial"] == rows
    texts = [("domain", "domain"), ("general", "general")]
    assert [(row["scale"], row["role"], row["source"]) for row in rows] == [
        (scale, *text) for scale in SCALES for text in texts
    ]
    config = load_config(tmp_path / "run")
    corpus = Corpus.prepare(config.data, tokenizer, seq_len=32, seed=0, batch_size=4, default_general=True)
    new = {2: (), 5: ()}
    for scale in SCALES[1:-1]:
        folder, _ = export_run(tmp_path / "run", tmp_path / f"{scale}", scale=scale)
        model = load_model(PretrainedFolder(folder), attention=config.train.attention, max_length=32)
        for text in corpus.held_out:
            (row,) = [row for row in rows if (row["scale"], row["role"]) == (scale, text.source.role)]
            found = evaluate(model, text.sample(256).batches(2), skip_for_base=new)
            assert (row["loss"], row["base_loss"], row["tokens"]) == (found.loss, found.base_loss, found.tokens)
            assert row["kl"] == (found.kl if row["role"] == "general" else None)
    # Both ends are the run's own figures.
    for result in summary["results"]:
        first, last = ([row for row in rows if row["role"] == result["role"]][at]["loss"] for at in (0, -1))
        assert (first, last) == (result["before"]["loss"], result["after"]["loss"])


def test_a_short_run_is_not_made_much_longer():
    assert num_tokens(65_536, trained=10**9) == 65_536
    assert num_tokens(16_384, trained=80 * 512 * 8) == 4096  # the quickstart
    assert num_tokens(16_384, trained=768) == 2048
    assert num_tokens(256, trained=768) == 256


def swept(domain: list[float], *general: list[float]) -> list[dict]:
    """Rows in which losses of 4 change by so much at the scales above 0."""
    texts = [("domain", "law", domain), *(("general", f"web {n}", rises) for n, rises in enumerate(general))]
    return [
        {"scale": scale, "role": role, "source": source, "loss": 4 + change, "base_loss": 4.0}
        for role, source, changes in texts
        for scale, change in zip(SCALES, [0.0, *changes], strict=True)
    ]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        # Most of the gain without harm, and what is ahead of that in both.
        (swept([-0.25, -0.375, -0.5, -0.5], [-0.25, -0.25, 0.0, 0.125]),
         "scale 0.75 keeps 100% of the gain, and no general text is predicted worse than by the base: "
         "llama-pro-fast export RUN OUT --scale 0.75"),
        (swept([-0.25, -0.375, -0.4375, -0.5], [-0.25, 0.0625, 0.25, 0.5], [-0.5, -0.5, -0.5, -0.5]),
         "scale 0.25 keeps 50% of the gain, and no general text is predicted worse than by the base; scale 0.5 keeps "
         "75% of the gain and 13% of the forgetting: llama-pro-fast export RUN OUT --scale A"),
        (swept([-0.25, -0.375, -0.4375, -0.5], [0.125, 0.25, 0.5, 1.0]),
         "scale 0.5 keeps 75% of the gain and 25% of the forgetting: llama-pro-fast export RUN OUT --scale 0.5"),
        (swept([-0.25, -0.375, -0.4375, -0.5], [-0.25, -0.25, 0.0, -0.125]),
         "scale 1, the model as trained, has all of the gain, and no general text is predicted worse than by the base"),
        (swept([-0.125, -0.25, -0.375, -0.5], [0.25, 0.5, 0.75, 1.0]), ""),
        (swept([-0.125, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]), ""),
    ],
)  # fmt: skip
def test_what_is_said_of_a_sweep_is_true(rows, words):
    assert said(rows) == words
