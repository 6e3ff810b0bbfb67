"""Reading an export back: it is what was trained, transformers continues as we do, and what was compared is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_pro_fast.errors import UserError
from llama_pro_fast.evaluation import export_check
from llama_pro_fast.evaluation.export_check import TIE, ExportCheck, compare_greedy, greedy, stock_greedy
from llama_pro_fast.expansion.manifest import Manifest
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.hf.loading import load_model
from llama_pro_fast.model.decoder import Decoder
from llama_pro_fast.resume import load_config
from llama_pro_fast.runs.run_folder import first_free
from llama_pro_fast.text.documents import is_held_out
from llama_pro_fast.text.sources import iterate_documents, resolve_sources
from llama_pro_fast.training import finish as finish_module
from llama_pro_fast.training.run import run_training

from .conftest import write_base

NEW = 8


@pytest.fixture
def export(finished) -> Path:
    return finished / "export"


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(2, 300, (length,), generator=generator).tolist() for length in (12, 5, 9)]


def ours(folder: Path, dtype=torch.float32) -> Decoder:
    return load_model(PretrainedFolder(folder), dtype=dtype, attention="cpu_flash", max_length=64)


def stock(folder: Path, prompts, dtype=torch.float32) -> list[list[int]]:
    return stock_greedy(folder, prompts, NEW, dtype, torch.device("cpu"))


def compared(export: Path, prompts, *, dtype=torch.float32, read_by_stock: Path | None = None, **more) -> ExportCheck:
    theirs = stock(read_by_stock or export, prompts, dtype)
    return compare_greedy(export, ours(export, dtype), prompts, theirs, dtype=dtype, **more)


def new_blocks(folder: Path) -> tuple[int, ...]:
    return Manifest.from_config(PretrainedFolder(folder).raw_config).trained_blocks


def generated(folder: Path, prompts, new_tokens: int = NEW) -> list[list[int]]:
    """transformers' own greedy generation."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for prompt in prompts:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
        found.append(ids[0, len(prompt) :].tolist())
    return found


# Our continuations and transformers'


def test_a_real_export_passes_with_every_token(export, prompts):
    found = compared(export, prompts)
    assert found.equal == found.compared == len(prompts) * NEW
    assert found.now == stock(export, prompts) == generated(export, prompts)
    assert found.base is None, "nothing was said of new blocks"


def test_without_its_new_blocks_it_goes_on_as_the_base_checkpoint(export, base, prompts):
    found = compared(export, prompts, new_blocks=new_blocks(export))
    assert found.base == generated(base, prompts)
    assert found.base != found.now, "the run changed no continuation: this test shows nothing"


def test_a_bf16_export_passes(export, prompts):
    found = compared(export, prompts, dtype=torch.bfloat16)
    assert found.compared >= len(prompts)
    assert found.equal >= found.compared - len(prompts), "a continuation ends at a tie, so there is one each at most"


def test_prompts_of_unequal_length_do_not_see_each_other(export, prompts):
    model = ours(export)
    together, logits = greedy(model, prompts, NEW)
    assert together == [greedy(model, [prompt], NEW)[0][0] for prompt in prompts]
    assert [[int(row.argmax()) for row in rows] for rows in logits] == together
    assert [len(rows) for rows in logits] == [NEW] * len(prompts)


def test_generation_settings_of_the_export_have_no_say(export, prompts, copy_of):
    folder = copy_of(export)
    settings = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0, "eos_token_id": list(range(320))}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert stock(folder, prompts) == stock(export, prompts)


def test_weights_that_transformers_reads_otherwise_are_refused(export, base, prompts):
    """It reads the base here, as if the trained blocks had not arrived."""
    with pytest.raises(UserError) as caught:
        compared(export, prompts, read_by_stock=base)
    message = str(caught.value)
    assert "\n" not in message
    for words in (str(export), "stock transformers goes on otherwise", "do not use this export"):
        assert words in message, message


@pytest.fixture
def tie(export, prompts, monkeypatch):
    """Transformers takes another token than we at one place, whose logit is ``apart`` of the largest below ours."""

    def make(place: int, apart: float, dtype: torch.dtype) -> ExportCheck:
        model, theirs = ours(export, dtype), greedy(ours(export, dtype), prompts, NEW)[0]

        def close(*arguments, **options):
            continuations, logits = greedy(*arguments, **options)
            row, best = logits[0][place], continuations[0][place]
            row[(best + 1) % len(row)] = row[best] - apart * row.abs().max()
            return continuations, logits

        theirs[0][place:] = [(token + 1) % 320 for token in theirs[0][place:]]
        monkeypatch.setattr(export_check, "greedy", close)
        return compare_greedy(export, model, prompts, theirs, dtype=dtype)

    return make


@pytest.mark.parametrize("dtype", TIE)
def test_a_tie_that_rounding_decides_is_no_difference_and_ends_that_continuation(prompts, tie, dtype):
    found = tie(2, 0.5 * TIE[dtype], dtype)
    others = (len(prompts) - 1) * NEW
    assert (found.equal, found.compared) == (2 + others, 3 + others)


@pytest.mark.parametrize("dtype", TIE)
def test_a_gap_beyond_rounding_is_one(tie, dtype):
    with pytest.raises(UserError, match="goes on otherwise"):
        tie(2, 2 * TIE[dtype], dtype)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_logit_that_is_not_finite_is_no_tie(tie, value):
    with pytest.raises(UserError, match="goes on otherwise"):
        tie(2, float(value), torch.float32)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_logit_that_is_not_finite_is_no_agreement(export, prompts, monkeypatch, value):
    """A NaN is the largest to both sides, so their tokens agree."""

    def broken(*arguments, **options):
        continuations, logits = greedy(*arguments, **options)
        logits[0][2][5] = float(value)
        return continuations, logits

    theirs = stock(export, prompts)
    monkeypatch.setattr(export_check, "greedy", broken)
    with pytest.raises(UserError, match="do not use this export"):
        compare_greedy(export, ours(export), prompts, theirs, dtype=torch.float32)


def test_the_tolerance_is_far_below_what_separates_candidates(export, prompts):
    """A tie must stay an exception: were the bound as wide as usual gaps, the check could not fail."""
    rows = [row for rows in greedy(ours(export), prompts, NEW)[1] for row in rows]
    gaps = [float((best := row.topk(2).values)[0] - best[1]) / float(row.abs().max()) for row in rows]
    assert sorted(gaps)[len(gaps) // 2] > 100 * TIE[torch.float32]


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_a_tensor_that_transformers_misses_or_does_not_know_is_named(export, prompts, copy_of, change):
    folder = copy_of(export)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    moved = tensors.pop(name) if change == "missing" else tensors[name].clone()
    if change == "unexpected":
        tensors[name := "model.layers.2.mlp.side_proj.weight"] = moved
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=name):
        stock(folder, prompts)


# What a run says of it


@pytest.mark.usefixtures("read_back")
def test_a_run_reads_its_export_back_and_shows_a_held_out_document(make_config):
    config = make_config()
    summary = run_training(config)
    found, sample = summary["export_check"], summary["sample"]
    assert found["equal"] == found["compared"] == 3 * 16
    after = next(row["after"]["loss"] for row in summary["results"] if row["role"] == "domain")
    assert found["loss"] == pytest.approx(after, abs=export_check.ROUNDED[torch.bfloat16])
    assert found["said"] == f"read back: loss {found['loss']:.4f}; in stock transformers 48 of 48 greedy tokens equal"

    source = resolve_sources(config.data)[0]
    held_out = [d.text for d in iterate_documents(source) if is_held_out(d.split_key, config.data.held_out)]
    assert any(text.startswith(sample["prompt"]) for text in held_out)
    tokenizer = AutoTokenizer.from_pretrained(summary["export"])
    ids = tokenizer(sample["prompt"])["input_ids"]
    assert len(ids) == 16
    for name, folder in (("base", config.model.path), ("now", summary["export"])):
        (expected,) = generated(folder, [ids], 16)
        assert sample[name] == tokenizer.decode(expected, skip_special_tokens=True), name


@pytest.mark.usefixtures("read_back")
def test_a_float32_base_trained_in_bf16_is_read_back_though_norms_are_rounded(make_config, tokenizer, tmp_path):
    """They are float32 where they train, and bf16 in a model that is only read; in float32 that would be an error."""
    config = make_config(
        model={"path": str(write_base(tmp_path / "base", tokenizer, torch.float32))},
        train={"dtype": "bfloat16"},
        optim={"lr": 0.1},
    )
    found = run_training(config)
    after = next(row["after"]["loss"] for row in found["results"] if row["role"] == "domain")
    assert abs(found["export_check"]["loss"] - after) > export_check.ROUNDED[torch.float32]


@pytest.fixture
def exporting(monkeypatch):
    """Do something to the export before it is read back."""

    def to(change) -> None:
        export_run = finish_module.export_run

        def changed(run: Path, *arguments):
            folder, step = export_run(run, *arguments)
            change(run, folder)
            return folder, step

        monkeypatch.setattr(finish_module, "export_run", changed)

    return to


@pytest.mark.usefixtures("read_back")
def test_an_export_that_is_not_what_was_trained_is_refused(make_config, exporting, cli, tmp_path):
    """Weights from before the first step load everywhere and continue everywhere alike; their loss tells."""
    exporting(lambda run, folder: shutil.copy(run / "expanded" / "model.safetensors", folder))
    code, _, err = cli(lambda argv: run_training(make_config()) and 0)
    cli.refused(code, err, tmp_path / "run" / "export", "loss of", "do not use this export")


@pytest.mark.slow
@pytest.mark.usefixtures("read_back")
def test_an_export_that_transformers_reads_otherwise_ends_the_run_as_an_error(make_config, cli, monkeypatch, tmp_path):
    monkeypatch.setattr(export_check, "stock_greedy", lambda folder, prompts, new, *_: [[0] * new for _ in prompts])
    code, _, err = cli(lambda argv: run_training(make_config()) and 0)
    cli.refused(code, err, tmp_path / "run" / "export", "do not use this export")
    # What the run measured stands all the same.
    summary = json.loads((tmp_path / "run" / "report" / "summary.json").read_text())
    assert summary["export_check"]["said"].startswith("failed: ")
    assert "do not use this export" in (tmp_path / "run" / "report" / "summary.md").read_text()
    assert summary["sample"] is None
    assert len(summary["results"]) == 2


def test_where_memory_is_short_it_is_said_and_nothing_is_loaded(make_config, monkeypatch, capsys):
    monkeypatch.setattr(export_check, "available_memory", lambda: 1000)
    monkeypatch.setattr(export_check, "stock_greedy", lambda *_: pytest.fail("loaded"))
    summary = run_training(make_config(train={"steps": 1}))
    assert (summary["export_check"]["equal"], summary["export_check"]["compared"]) == (0, 0)
    assert summary["sample"] is None
    said = summary["export_check"]["said"]
    assert said.startswith("not read back: 0.0 GB of weights, 0.0 GB of memory free")
    assert said in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("read_back")
def test_where_memory_is_just_enough_it_is_read(make_config, export, monkeypatch, tmp_path):
    """The bound is on the weights in the dtype of the run, with a fifth to spare."""
    parameters = sum(tensor.numel() for tensor in load_file(export / "model.safetensors").values())
    for free, read in ((1.19, False), (1.21, True)):
        monkeypatch.setattr(export_check, "available_memory", lambda free=free: int(free * 4 * parameters))
        config = make_config(train={"steps": 1}, output=str(tmp_path / f"run-{free}"))
        assert (run_training(config)["export_check"]["compared"] > 0) == read


def test_a_card_that_is_full_after_all_is_no_failure_of_the_run(make_config, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(finish_module, "read_export_back", full)
    said = run_training(make_config(train={"steps": 1}))["export_check"]["said"]
    assert said == "not read back: no memory left on the device"


@pytest.mark.slow
@pytest.mark.usefixtures("read_back")
def test_a_run_killed_while_its_export_is_read_back_is_resumed_into_that(make_config, monkeypatch, tmp_path):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finish_module, "read_export_back", killed)
        with pytest.raises(KeyboardInterrupt):
            run_training(make_config(train={"steps": 1}))
    assert "not read back yet" in (tmp_path / "run" / "report" / "summary.md").read_text()
    with pytest.raises(UserError, match="interrupted run, saved at step 1 of 1"):
        first_free(tmp_path / "run")
    summary = run_training(load_config(tmp_path / "run"), resume=True)
    assert summary["export_check"]["compared"] > 0
    assert first_free(tmp_path / "run") == tmp_path / "run-2"


@pytest.mark.slow
@pytest.mark.usefixtures("read_back")
def test_short_documents_are_gone_on_from_too(make_config, tmp_path):
    rows = [f'{{"text": "text {number}"}}\n' for number in range(200)]
    (tmp_path / "short.jsonl").write_text("".join(rows))
    summary = run_training(make_config(data={"domain": str(tmp_path / "short.jsonl")}, train={"steps": 1}))
    assert summary["export_check"]["compared"] > 0
    assert summary["sample"]["prompt"]


@pytest.mark.slow
@pytest.mark.usefixtures("read_back")
def test_reading_back_leaves_the_export_as_it_is(make_config, exporting, tmp_path):
    before = {}

    def note(run: Path, folder: Path) -> None:
        before.update({path.name: path.read_bytes() for path in folder.iterdir()})

    exporting(note)
    run_training(make_config(train={"steps": 1}))
    assert {path.name: path.read_bytes() for path in (tmp_path / "run" / "export").iterdir()} == before
