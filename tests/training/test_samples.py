"""`base:samples`: what the base writes is drawn from its own distribution, once, and is a source like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from llama_pro_fast import evaluate
from llama_pro_fast.cli import main
from llama_pro_fast.config import DataConfig, RunConfig, Source
from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.expansion.rewrite import write_expanded
from llama_pro_fast.hf.config import resolve
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.hf.stock import stock_model
from llama_pro_fast.recipe import parse
from llama_pro_fast.training import samples
from llama_pro_fast.training.run import run_training
from llama_pro_fast.training.samples import marks, sample, with_samples
from llama_pro_fast.training.settle import check_text

PROSE = resolve("builtin:prose-3m")


@pytest.fixture(autouse=True)
def _few_and_short(monkeypatch) -> None:
    monkeypatch.setattr(samples, "DOCUMENTS", 10)
    monkeypatch.setattr(samples, "TOKENS", 12)
    monkeypatch.setitem(samples.BATCH, "cpu", 4)


@pytest.fixture
def written(make_config, tmp_path):
    """``written(folder, cache)``: the file of what the base in a folder writes into a cache of that name."""

    def write(folder: Path, cache: str = "cache", **changes) -> Path:
        data = {"general": "base:samples", "cache": str(tmp_path / cache)}
        config = make_config(model={"path": str(folder)}, data=data, expand={"groups": None}, **changes)
        model = PretrainedFolder(folder)
        how = {"device": torch.device("cpu"), "dtype": torch.float32, "tell": lambda text: None}
        (source,) = with_samples(config, model, model.tokenizer(), **how).general
        assert source.name == "base-samples"
        return Path(source.path)

    return write


@pytest.fixture(scope="module")
def prose():
    return stock_model(PROSE, torch.float32), *marks(AutoTokenizer.from_pretrained(PROSE), PretrainedFolder(PROSE))


def test_the_same_base_writes_the_same_text_and_writes_it_once(written, monkeypatch):
    path, again = written(PROSE), written(PROSE, "another")
    rows = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert len(rows) == len(set(rows)) == 10
    assert sum(len(row.split()) for row in rows) > 25  # words, and no lone marks
    assert again.read_bytes() == path.read_bytes()
    monkeypatch.setattr(samples, "stock_model", None)
    assert written(PROSE) == path


def test_what_was_written_when_it_was_interrupted_is_kept(written, base, monkeypatch):
    def interrupted(model, numbers, **how):
        if numbers[0] == 4:
            raise KeyboardInterrupt
        return sample(model, numbers, **how)

    with monkeypatch.context() as patch:
        patch.setattr(samples, "sample", interrupted)
        with pytest.raises(KeyboardInterrupt):
            written(base)
    whole = written(base, "whole")
    (partial,) = whole.parents[2].glob("cache/samples/*")
    assert (partial.suffix, partial.read_bytes().count(b"\n")) == (".partial", 4)
    with open(partial, "a") as file:
        file.write('{"text": "half of a li')
    asked = []
    monkeypatch.setattr(
        samples, "sample", lambda model, numbers, **how: asked.append(numbers) or sample(model, numbers, **how)
    )
    path = written(base)
    assert path.read_bytes() == whole.read_bytes()
    assert asked == [range(4, 8), range(8, 10)]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_tokens_are_drawn_from_the_models_distribution_whatever_is_beside_them(prose):
    model, start, ends = prose
    how = {"start": start, "ends": ends}
    with torch.no_grad():
        expected = 2000 * model(torch.tensor([start])).logits[0, -1].double().softmax(-1)
    drawn = [row[0] if row else ends[0] for row in sample(model, range(2000), **how, limit=1)]
    counts = torch.bincount(torch.tensor(drawn), minlength=len(expected)).double()
    often = expected >= 5
    pairs = torch.stack([torch.cat([x[often], x[~often].sum()[None]]) for x in (counts, expected)])
    freedom, statistic = pairs.shape[1] - 1, float(((pairs[0] - pairs[1]) ** 2 / pairs[1]).sum())
    assert freedom > 30
    assert statistic < freedom + 3 * (2 * freedom) ** 0.5  # mean and standard deviation of chi-square
    assert sample(model, [5], **how, limit=8) == [sample(model, range(8), **how, limit=8)[5]]


@pytest.fixture
def expanded(base_of, tmp_path) -> tuple[Path, Path]:
    """A base some of whose blocks have a window, and its expansion with new blocks that are copies no more."""
    layers = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    base = base_of(family="qwen2", use_sliding_window=True, sliding_window=4, layer_types=layers)
    folder = tmp_path / "expanded"
    folder.mkdir()
    manifest = write_expanded(PretrainedFolder(base), folder, ExpansionPlan.from_after(4, [0, 2]))
    change(folder, lambda name: name.split(".")[2] in map(str, manifest.trained_blocks) and "down_proj" in name)
    return base, folder


def change(folder: Path, which) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: torch.ones_like(value) for name, value in tensors.items() if "layers" in name and which(name)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_base_in_an_expanded_model_writes_what_it_wrote_alone(expanded, written):
    base, folder = expanded
    path, inside = written(base, "a", train={"parameters": "all"}), written(folder, "b")
    assert inside.name == path.name
    assert inside.read_bytes() == path.read_bytes()
    whole = written(folder, "b", train={"parameters": "all"})  # where everything trains that is what is kept
    assert whole.read_bytes() != path.read_bytes()


def test_a_base_that_is_not_in_the_model_any_more_writes_nothing(expanded, written):
    change(expanded[1], lambda name: ".3." in name)
    with pytest.raises(UserError, match=r"base:samples: nobody to write them: .* give a file"):
        written(expanded[1])


def test_without_a_token_that_begins_a_document_there_is_nothing_to_start_from(base, tokenizer):
    assert marks(tokenizer, PretrainedFolder(base)) == ([*tokenizer("The end.")["input_ids"], 1], [1])
    nameless = AutoTokenizer.from_pretrained(base, bos_token=None, eos_token=None)
    with pytest.raises(UserError, match="names neither BOS nor EOS"):
        marks(nameless, PretrainedFolder(base))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"domain": "base:samples"}}, "data.domain base:samples: the base knows"),
        ({"data": {"general": [Source(path="a.txt", documents=5)]}}, "a.txt: documents 5: only base:samples"),
        ({"data": {"general": [Source(path="base:samples", split_by="book")]}}, "leave `split_by:` out"),
        ({"data": {"general": [Source(path="base:samples", documents=0)]}}, "documents: 0 is not a number above 0"),
        ({"data": {"general": [Source(path="base:samples")] * 2}}, "stands there more than once"),
        (
            {"model": {"init": "random"}, "train": {"parameters": "all"}, "expand": {"groups": None}},
            "random weights have nothing to keep",
        ),
    ],
)
def test_what_cannot_be_written_is_refused(make_config, sections, words):
    config = make_config(**{"data": {"general": "base:samples"}} | sections)
    with pytest.raises(UserError, match=words):
        check_text(config)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"domain": "nowhere.jsonl"}}, "nowhere.jsonl: no such file"),
        ({"data": {"general": [Source(path="base:samples"), Source(path="nowhere.jsonl")]}}, "nowhere.jsonl: no such"),
        ({"data": {"general": [Source(path="base:samples", weight=0.0)], "replay": 0.2}}, "has weight 0"),
        ({"train": {"kl_weight": 1.0}}, "no general text is trained on; add --data.replay 0.2$"),
    ],
)
def test_what_is_refused_is_refused_before_the_base_writes(make_config, base, monkeypatch, sections, words):
    monkeypatch.setattr(samples, "stock_model", None)
    data = {"general": "base:samples"} | sections.get("data", {})
    with pytest.raises(UserError, match=words):
        run_training(make_config(**sections | {"data": data}))


def test_a_base_whose_predictions_are_no_numbers_writes_nothing(base_of, written):
    folder = base_of()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="predictions are not finite"):
        written(folder)


def test_a_run_replays_them_and_finds_or_writes_them_again_when_it_goes_on(
    make_config, stopped_at_2, base, texts, tmp_path, monkeypatch, capsys
):
    data = {"general": "base:samples", "replay": 0.25, "held_out": 0.3, "cache": str(tmp_path / "cache")}
    options = {"model.path": base, "data.domain": texts / "domain.jsonl", "train.seq_len": 32} | {
        f"data.{key}": value for key, value in data.items()
    }
    assert main(["prepare", *(f"--{key}={value}" for key, value in options.items())]) == 0
    assert "the base wrote 10 documents" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(samples, "stock_model", None)
        few = {"data": data, "train": {"steps": 3}, "eval": {"every": 3, "tokens": 64}}
        whole = run_training(make_config(**few, output=tmp_path / "whole"))
        stopped_at_2(make_config(**few))
    (path,) = (tmp_path / "cache" / "samples").iterdir()
    path.unlink()
    summary = run_training(parse(["--output", str(tmp_path / "run"), "--resume"]).config, resume=True)
    assert path.exists()
    assert summary["results"] == whole["results"]
    assert {row["source"] for row in summary["results"]} == {"domain", "base-samples"}
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["general"] == "base:samples"


def test_a_finished_run_is_evaluated_on_what_its_base_wrote(make_config, texts, tmp_path, monkeypatch):
    """Also where everything trained, and the export is no longer the model that wrote; and a text that the run trained
    on is held back though no other general text is left."""
    data = {"general": "base:samples", "replay": 0.25, "held_out": 0.3, "cache": str(tmp_path / "cache")}
    how = {"expand": {"groups": None}, "train": {"parameters": "all", "steps": 2}, "eval": {"every": 2, "tokens": 64}}
    summary = run_training(make_config(data=data, **how))
    monkeypatch.setattr(samples, "stock_model", None)  # nothing is written any more
    found = {text.source: text.loss for text in evaluate(tmp_path / "run").texts}
    # The export's weights are rounded.
    assert found == pytest.approx({row["source"]: row["after"]["loss"] for row in summary["results"]}, rel=1e-3)
    given = DataConfig(domain=str(texts / "domain.jsonl"), cache=data["cache"])
    notes = evaluate(tmp_path / "run", RunConfig(data=given)).notes
    assert any("trained on it, so only the 0.3 it held out" in note for note in notes)
