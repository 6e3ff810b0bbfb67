"""The verb `evaluate`: its figures are the meter's, and stock transformers'; what counts, and what is known already."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from llama_pro_fast import evaluate, expand, train
from llama_pro_fast.cli import main
from llama_pro_fast.config import DataConfig, EvalConfig, ExpandConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from llama_pro_fast.evaluation import export_check
from llama_pro_fast.evaluation.texts import standard_error
from llama_pro_fast.hf.config import resolve
from llama_pro_fast.reporting import summary
from llama_pro_fast.resume import load_config
from llama_pro_fast.runs.metrics import read_metrics
from llama_pro_fast.text.documents import is_held_out
from llama_pro_fast.training import evaluating

HELD_OUT, SEQ_LEN, TOKENS = 0.3, 64, 600


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with texts of 30 documents; ``base``, the packaged base in float32, so that an export rounds nothing;
    and ``run``, that base with new blocks after two steps."""
    place = tmp_path_factory.mktemp("evaluate")
    text = "".join(topics.values())
    for name, shift in (("domain", 0), ("general", 20_000), ("unseen", 40_000)):
        rows = (text[at + shift : at + shift + 60 + at % 70] for at in range(0, 12_000, 400))
        (place / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    shutil.copytree(resolve("builtin:prose-3m"), place / "base")
    AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32).save_pretrained(place / "base")
    config = RunConfig(
        model=ModelConfig(path=str(place / "base")),
        expand=ExpandConfig(groups=2),
        data=DataConfig(
            domain=str(place / "domain.jsonl"),
            general=str(place / "general.jsonl"),
            held_out=HELD_OUT,
            cache=str(place / "cache"),
        ),
        optim=OptimConfig(lr=1e-2, warmup_steps=0),
        train=TrainConfig(steps=2, seq_len=SEQ_LEN, batch_size=4, micro_batch_size=2, checkpoint_every=1, device="cpu"),
        eval=EvalConfig(tokens=TOKENS),
        output=str(place / "run"),
    )
    with pytest.MonkeyPatch.context() as patch:  # no curves, and the export is not read back
        for name in ("draw_loss", "write_page"):
            patch.setattr(summary, name, lambda *_, **__: None)
        patch.setattr(export_check, "available_memory", lambda: 0)
        train(config)
    return place


@pytest.fixture
def on(place):
    """``on("unseen")``: the configuration that measures these texts."""

    def config(*names: str, **options) -> RunConfig:
        domain, general = (str(place / f"{name}.jsonl") if name else None for name in (*names, "", "")[:2])
        settings = {"seq_len": 512, "device": "cpu", "threads": 1} | options
        return RunConfig(
            data=DataConfig(domain=domain, general=general, cache=str(place / "cache")), train=TrainConfig(**settings)
        )

    return config


def test_a_run_is_measured_as_its_meter_did_and_as_the_export_of_its_checkpoint(place):
    rows = [row for row in read_metrics(place / "run") if row["kind"] == "eval"]
    same = RunConfig(train=TrainConfig(micro_batch_size=2, device="cpu", threads=1))
    report = evaluate(place / "run" / "export", same)
    assert [(text.role, text.cached) for text in report.texts] == [("domain", False), ("general", False)]
    for text in report.texts:
        first, *_, last = [row for row in rows if row["role"] == text.role]
        found = {"loss": text.loss, "tokens": text.tokens, "bits_per_byte": text.bits_per_byte}
        assert found == pytest.approx({name: last[name] for name in found}, rel=1e-12)
        assert (text.base.loss, text.base.bits_per_byte) == pytest.approx((first["loss"], first["bits_per_byte"]))
        assert text.base.change == pytest.approx(last["loss"] - first["loss"], abs=1e-12)
        assert 0 < text.base.change_se < 1
        assert text.base.kl == pytest.approx(last["kl"] if text.role == "general" else text.base.kl, rel=1e-12)
    before = sorted(place.joinpath("run").rglob("*"))
    final, earlier = (evaluate(place / "run", same, from_step=step, fresh=True) for step in (2, 1))
    assert (final.step, final.texts) == (2, report.texts)
    assert earlier.texts[0].loss != final.texts[0].loss
    assert sorted(place.joinpath("run").rglob("*")) == before, "something was written into the run"


def test_another_base_gives_what_transformers_gives(place, on, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    shutil.copytree(place / "base", tmp_path / "tuned")
    model.save_pretrained(tmp_path / "tuned")
    lines = (place / "unseen.jsonl").read_text().splitlines(keepends=True)[:9]  # in one sequence, so none is cut
    (tmp_path / "few.jsonl").write_text("".join(lines))
    config = replace(on("unseen"), data=DataConfig(general=str(tmp_path / "few.jsonl")))
    (text,) = evaluate(tmp_path / "tuned", config, base=place / "base").texts

    tokenizer = PreTrainedTokenizerFast.from_pretrained(place / "base")
    sums, counts, num_bytes = [], [], 0
    for line in lines:
        ids = torch.tensor([[*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            now, then = (m(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for m in (model, base))
        picked = [-logp.gather(1, ids[0, 1:, None]).sum().item() for logp in (now, then)]
        sums.append([*picked, (then.exp() * (then - now)).sum().item()])
        counts.append(ids.shape[1] - 1)
        num_bytes += len(tokenizer.decode(ids[0, 1:], skip_special_tokens=True).encode())
    loss, base_loss, kl = np.sum(sums, axis=0) / sum(counts)
    assert (text.documents, text.tokens) == (9, sum(counts))
    assert text.of_documents == 9
    assert (text.loss, text.base.loss) == pytest.approx((loss, base_loss), rel=1e-5)
    assert (text.base.change, text.base.kl) == pytest.approx((loss - base_loss, kl), rel=1e-3)
    assert text.bits_per_byte == pytest.approx(loss * sum(counts) / math.log(2) / num_bytes, rel=1e-5)
    # Leave one document out: the jackknife is another estimate of the same error.
    differences, counts = np.array(sums)[:, 0] - np.array(sums)[:, 1], np.array(counts)
    without = (differences.sum() - differences) / (counts.sum() - counts)
    jackknife = math.sqrt(8 / 9 * ((without - without.mean()) ** 2).sum())
    assert text.base.change_se == pytest.approx(jackknife, rel=0.1)


def test_of_equal_documents_the_standard_error_is_that_of_their_mean():
    sums = np.array([1.0, 4.0, 2.0, 9.0])
    assert standard_error(sums, np.full(4, 5)) == pytest.approx(np.std(sums / 5, ddof=1) / 2)
    assert standard_error(sums[:1], np.full(1, 5)) is None


def test_a_model_is_exactly_as_good_as_itself_and_a_new_generation_as_its_base(place, on, tmp_path, capsys):
    (text,) = evaluate(place / "base", on("unseen"), base=place / "base").texts
    assert (text.base.change, text.base.kl, text.base.change_se) == (0, 0, 0)
    expand(place / "run" / "export", tmp_path / "two", after=[1])
    recipe = {"data": {"general": str(place / "unseen.jsonl"), "cache": str(place / "cache")}, "optim": {"lr": 1}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    options = ["--config", str(tmp_path / "recipe.yaml"), "--train.seq_len", "512", "--json", "-"]
    assert main(["evaluate", str(tmp_path / "two"), *options]) == 0
    said = capsys.readouterr()
    (two,) = json.loads(said.out)["texts"]
    assert (two["base"]["change"], two["base"]["kl"]) == (0, 0)
    (one,) = evaluate(place / "run", on("unseen")).texts
    assert two["first_base"]["kl"] == pytest.approx(one.base.kl, rel=1e-4)
    assert two["first_base"]["kl"] > 0
    for words in ("KL(base‖now)", "unseen: predicts exactly as export does", "standard errors"):
        assert words in said.err


def test_what_is_known_is_not_measured_again_until_something_changes(place, on, tmp_path, monkeypatch):
    model, cache = tmp_path / "model", tmp_path / "cache"
    shutil.copytree(place / "run" / "export", model)
    config = replace(on(), data=DataConfig(domain=str(place / "unseen.jsonl"), cache=str(cache)))
    first = evaluate(model, config)
    loads = []
    load = evaluating.load_model
    monkeypatch.setattr(evaluating, "load_model", lambda *args, **how: (loads.append(1), load(*args, **how))[1])
    assert evaluate(model, config).texts == [type(text)(**vars(text) | {"cached": True}) for text in first.texts]
    assert not loads
    for note in (cache / "evaluations").iterdir():
        note.write_bytes(note.read_bytes().replace(b"1", b"2"))
    assert evaluate(model, config).texts == first.texts
    assert len(loads) == 1, "a damaged note was believed"
    with open(model / "model.safetensors", "r+b") as file:  # the last number of the last tensor, which is frozen
        file.seek(-4, 2)
        file.write(np.float32(0.5).tobytes())
    (text,) = evaluate(model, config).texts
    assert len(loads) == 2
    assert text.base is None
    assert "is not base, which the manifest says" in text.note


def test_where_tokens_differ_only_bits_per_byte_are_compared(place, on, tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({byte: 2 + n for n, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    shutil.copytree(place / "base", tmp_path / "bytes")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path / "bytes")
    (alone,) = evaluate(tmp_path / "bytes", on("unseen")).texts
    report = evaluate(place / "base", on("unseen"), base=tmp_path / "bytes")
    (text,) = report.texts
    assert (text.base.change, text.base.kl) == (None, None)
    assert (text.base.loss, text.base.bits_per_byte) == pytest.approx((alone.loss, alone.bits_per_byte))
    assert text.bits_per_byte == evaluate(place / "base", on("unseen")).texts[0].bits_per_byte
    assert "other tokens" in report.notes[0]
    # Cut to some tokens, it is the same stretch of text in both.
    few = replace(on("unseen"), eval=EvalConfig(tokens=100))
    (text,) = evaluate(place / "base", few, base=tmp_path / "bytes").texts
    assert text.tokens < 100
    assert text.documents < text.of_documents == 30
    assert text.base.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=0.2)


def test_out_of_another_vocabulary_losses_are_compared_and_predictions_are_not(place, on, tmp_path):
    shutil.copytree(place / "base", tmp_path / "padded")
    model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    model.resize_token_embeddings(2056, mean_resizing=False)
    model.model.embed_tokens.weight.data[2048:] = 0  # tied: logits of 0
    model.save_pretrained(tmp_path / "padded")
    report = evaluate(place / "base", on("unseen"), base=tmp_path / "padded")
    (text,) = report.texts
    assert text.base.kl is None
    assert -0.1 < text.base.change < 0  # what the eight have of the sum
    assert text.base.loss == pytest.approx(text.loss - text.base.change)
    assert report.notes == ["unseen: no KL, as " + str(tmp_path / "padded") + " knows 2,056 tokens and "
                            + str(place / "base") + " 2,048"]  # fmt: skip


def test_of_a_text_that_a_run_trained_on_only_what_it_held_out_counts(place, on, tmp_path):
    texts = [json.loads(line)["text"] for line in (place / "domain.jsonl").read_text().splitlines()]
    held_out = sum(is_held_out(text, HELD_OUT) for text in texts)
    assert 0 < held_out < 30
    (tmp_path / "link.jsonl").symlink_to(place / "domain.jsonl")
    linked = replace(on(), data=DataConfig(general=str(tmp_path / "link.jsonl")))
    for model in (place / "run", place / "run" / "export"):
        report = evaluate(model, on("domain", "general"))
        assert [text.documents for text in report.texts] == [held_out, 30]  # the general text was only measured
        assert [note.partition(",")[0].endswith("trained on it") for note in report.notes] == [True]
        assert [text.documents for text in evaluate(model, linked).texts] == [held_out]
    assert [text.documents for text in evaluate(place / "base", on("domain")).texts] == [30]


def test_documents_that_end_elsewhere_for_the_other_tokenizer_are_left_out(place, on, tmp_path):
    """Where a row spells the EOS of one of the two, that sees two documents in it; the others are the same text."""
    shutil.copytree(place / "base", tmp_path / "other")
    rows = [json.loads(line)["text"] for line in (place / "unseen.jsonl").read_text().splitlines()]
    words = sorted(PreTrainedTokenizerFast.from_pretrained(place / "base").get_vocab())
    eos = next(word for word in words if word.isalpha() and len(word) > 3 and word not in " ".join(rows))
    PreTrainedTokenizerFast.from_pretrained(place / "base", eos_token=eos).save_pretrained(tmp_path / "other")
    for name, text in (("plain", rows[3]), ("spells", f"{rows[3]} {eos} {rows[4]}")):
        texts = [*rows[:3], text, *rows[4:]]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
        config = replace(on(), data=DataConfig(general=str(tmp_path / f"{name}.jsonl")))
        report = evaluate(place / "base", replace(config, eval=EvalConfig(tokens=300)), base=tmp_path / "other")
        (text,) = report.texts
        assert text.of_documents == (30 if name == "plain" else 29)
        assert text.base.bits_per_byte == pytest.approx(text.bits_per_byte, rel=0.1)  # but for the EOS, the same model
        assert any("spells: left out 1 of its documents" in note for note in report.notes) == (name == "spells")


def test_a_generation_that_was_trained_elsewhere_is_said(place, on, tmp_path):
    expand(place / "run" / "export", tmp_path / "two", after=[1])
    config = load_config(place / "run")
    config = replace(config, model=replace(config.model, path=str(tmp_path / "two")), expand=ExpandConfig())
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_loss", "write_page"):
            patch.setattr(summary, name, lambda *_, **__: None)
        patch.setattr(export_check, "available_memory", lambda: 0)
        train(replace(config, output=str(tmp_path / "second")))
    report = evaluate(tmp_path / "second", on("unseen"))
    assert [note for note in report.notes if str(tmp_path / "two") in note and "not known" in note]
    assert not [note for note in evaluate(place / "run", on("unseen")).notes if "not known" in note]


def test_a_run_that_goes_on_while_it_is_evaluated_is_measured_at_its_newer_checkpoint(place, on, tmp_path, monkeypatch):
    shutil.copytree(place / "run", tmp_path / "run", ignore=shutil.ignore_patterns("export", "report"))
    newer = tmp_path / "run" / "checkpoints" / "step-000002"
    newer.rename(tmp_path / "kept")
    config, real, calls = on("unseen"), evaluating.in_tokens, []

    def in_tokens(*args, **how):
        if not calls:
            (tmp_path / "kept").rename(newer)
            shutil.rmtree(newer.with_name("step-000001"))
        calls.append(1)
        return real(*args, **how)

    monkeypatch.setattr(evaluating, "in_tokens", in_tokens)
    report = evaluate(tmp_path / "run", config)
    assert (report.step, len(calls)) == (2, 2)
    assert report.texts[0].loss == evaluate(place / "run", config).texts[0].loss


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["nowhere"], "model nowhere: no such folder"),
        (["BASE"], "--data.general: say what to measure"),
        (["BASE", "--data.general", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["BASE", "--data.general", "EMPTY"], "no document with text"),
        (["BASE", "--data.general", "TEXT", "--from_step", "3"], "is not the folder of a run"),
        (["RUN", "--from_step", "3"], "no checkpoint of that step; there is 1, 2"),
        (["BASE", "--data.general", "TEXT", "--train.seq_len", "600"], "has 512 positions"),
        (["BASE", "--data.general", "TEXT", "--train.memory", "0.001"], "--train.memory: "),
        (["BASE", "--data.general", "TEXT", "--optim.lr", "1"], "--optim.lr: means nothing here"),
        (["HUGE", "--data.general", "TEXT"], "its loss on unseen is not finite"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line(options, words, place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n')
    if "HUGE" in options:
        shutil.copytree(place / "base", tmp_path / "huge")
        model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
        model.model.norm.weight.data.fill_(3e38)
        model.save_pretrained(tmp_path / "huge")
    places = {
        "BASE": place / "base",
        "RUN": place / "run",
        "HUGE": tmp_path / "huge",
        "EMPTY": tmp_path / "empty.jsonl",
    }
    places["TEXT"] = place / "unseen.jsonl"
    assert main(["evaluate", *(str(places.get(option, option)) for option in options)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
