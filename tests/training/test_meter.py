"""The forgetting meter: what it is held against is what it says, and what it does when asked to stop or on a NaN."""

from __future__ import annotations

import json
import math
import struct
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llama_pro_fast.data.corpus import Corpus
from llama_pro_fast.errors import UserError
from llama_pro_fast.evaluation.held_out import Evaluation
from llama_pro_fast.expand import main as expand_main
from llama_pro_fast.expansion.lineage import intact_bases
from llama_pro_fast.expansion.manifest import Manifest, what_trains
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.hf.loading import load_model
from llama_pro_fast.model.trained import Trained
from llama_pro_fast.runs.metrics import read_metrics
from llama_pro_fast.train import main as train_main
from llama_pro_fast.training import meter as meter_module
from llama_pro_fast.training.meter import Meter
from llama_pro_fast.training.run import run_training


def general(run: Path) -> list[dict]:
    return [row for row in read_metrics(run) if row["kind"] == "eval" and row["role"] == "general"]


@pytest.fixture
def train_further(make_config, tmp_path):
    """Train an expanded folder for so many steps, into ``tmp_path / "run"``."""

    def train(folder: Path, steps: int = 1, **changes) -> Path:
        run_training(
            make_config(
                model={"path": str(folder)},
                expand={"groups": None},
                train={"steps": steps, "checkpoint_every": steps},
                eval={"every": 1},
                **changes,
            )
        )
        return tmp_path / "run"

    return train


# -- against which base -------------------------------------------------------------------------------------------


def test_with_two_generations_both_bases_are_measured(finished, train_further, tmp_path, capsys):
    assert expand_main([str(finished / "export"), str(tmp_path / "two"), "--expand.after", "0,3"]) == 0
    run = train_further(tmp_path / "two", steps=2)
    first, *later = general(run)
    # Nothing has been forgotten of the last base; and of the first, what the first generation's run forgot.
    assert (first["loss"], first["kl"]) == (first["base_loss"], 0.0)
    assert first["first_base_loss"] == general(finished)[0]["base_loss"]
    assert first["first_kl"] > 0
    for row in later:
        assert (row["base_loss"], row["first_base_loss"]) == (first["base_loss"], first["first_base_loss"])
        assert row["kl"] > 0
        assert row["loss"] != row["base_loss"]
    out = capsys.readouterr().out
    assert "against the last base and the first" in out
    assert "  now-base +0.0000  KL 0.0000  now-first base " in out
    assert all("first_kl" not in row or row["first_kl"] is None for row in general(finished))
    assert intact_bases(PretrainedFolder(run / "export")) == (True, True)


@pytest.mark.parametrize("kind", ["tuned elsewhere", "index edited"])
def test_what_is_not_the_base_is_said_and_not_measured(kind, finished, copy_of, train_further, tmp_path, capsys):
    folder = copy_of(finished / "export", "mine")
    if kind == "tuned elsewhere":
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    else:
        config = json.loads((folder / "config.json").read_text())
        config["block_expansion"]["new_blocks"][0]["index"] = 1
        (folder / "config.json").write_text(json.dumps(config))
    run = train_further(folder)
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith(str(folder))]
    assert "is not tiny, which the manifest says" in line
    blocks = "2, 5" if kind == "tuned elsewhere" else "1, 5"
    assert f"the forgetting meter is off, and blocks {blocks} train" in line
    assert "off: without its new blocks" in said
    assert all(row["base_loss"] is None and row["kl"] is None for row in general(run))
    exported = Manifest.from_config(PretrainedFolder(run / "export").raw_config)
    assert exported.base_intact is False
    assert ", ".join(map(str, exported.trained_blocks)) == blocks


def test_digests_go_before_what_the_manifest_says_of_the_base(finished, copy_of, train_further):
    """Written by hand, or the tensors were put back: what counts is what is there."""
    folder = copy_of(finished / "export", "mine")
    config = json.loads((folder / "config.json").read_text())
    config["block_expansion"]["base_intact"] = False
    (folder / "config.json").write_text(json.dumps(config))
    run = train_further(folder)
    assert general(run)[0]["base_loss"] == general(finished)[0]["base_loss"]
    assert Manifest.from_config(PretrainedFolder(run / "export").raw_config).base_intact is True


@pytest.mark.parametrize(
    ("intact", "last", "first"),
    [(None, (1, 4), (1, 3, 4, 7)), ((True, True), (1, 4), (1, 3, 4, 7)), ((False, True), (1, 4), ()),
     ((True, False), (), (1, 3, 4, 7)), ((False, False), (), ())],
)  # fmt: skip
def test_each_base_is_skipped_for_where_it_is_intact(intact, last, first):
    row = {"zeroed": [], "copy_of": 0}
    generations = [{"name": name, "digest": "", "num_hidden_layers": n} for name, n in (("a", 4), ("b", 6))]
    new_blocks = [{"index": i, "generation": g, **row} for i, g in ((1, 2), (3, 1), (4, 2), (7, 1))]
    manifest = {"format_version": 1, "base": generations[0], "generations": generations, "new_blocks": new_blocks}
    raw = {"num_hidden_layers": 8, "block_expansion": manifest}
    trained = what_trains(raw, 8, parameters="new_blocks", name="", intact=intact)
    assert trained.blocks == (1, 4)
    assert (trained.skip_for_base, trained.skip_for_first_base) == (last, first)
    assert ("is not b" in trained.base_gone) == (not last)
    assert ("is not a" in trained.first_base_gone) == (not first)


# -- while it measures --------------------------------------------------------------------------------------------


class Rows(list):
    """In place of the run's metrics."""

    def write(self, kind, step, **values):
        self.append({"kind": kind, "step": step, **values})


@pytest.fixture
def meter(finished, make_config, tokenizer):
    """Of a small model, 256 tokens a source in batches of 64."""
    config = make_config()
    trained = Trained(6, (2, 5))
    model = load_model(PretrainedFolder(finished / "export"), trained=trained, max_length=32, attention="reference")
    corpus = Corpus.prepare(config.data, tokenizer, seq_len=32, seed=0, batch_size=4, default_general=True)
    return Meter(model, corpus, config, Rows(), trained)


def test_it_can_be_stopped_before_any_batch_and_keeps_what_it_has(meter):
    calls = []
    meter.measure(3, between=lambda: calls.append(1))
    whole, per_source = list(meter.metrics), len(calls) // 2
    assert per_source > 1
    assert [row["role"] for row in whole] == ["domain", "general"]
    assert list(meter.last) == [(row["role"], row["source"]) for row in whole]
    assert [found.loss for found in meter.last.values()] == [row["loss"] for row in whole]

    class Stopped(Exception):
        pass

    for at in (1, per_source, per_source + 1, 2 * per_source):
        meter.metrics.clear()
        left = [at]

        def between(left=left):
            left[0] -= 1
            if not left[0]:
                raise Stopped

        with pytest.raises(Stopped):
            meter.measure(3, between=between)
        assert meter.metrics == whole[: (at - 1) // per_source]


def test_only_the_rows_that_all_counts_from_say_first(meter):
    meter.measure(0, first=True)
    meter.measure(3)
    assert [row.get("first") for row in meter.metrics] == [True, True, None, None]


def test_a_wait_shows_how_far_it_is(meter, monkeypatch):
    shown = []

    @contextmanager
    def waiting(text):
        yield shown.append

    monkeypatch.setattr(meter_module, "waiting", waiting)
    meter.measure(0)
    assert shown[:2] == ["evaluating domain: 0 of 4 batches", "evaluating domain: 1 of 4 batches"]
    assert shown[-1] == "evaluating general: 3 of 4 batches"


@pytest.mark.parametrize("figures", [{"loss": math.nan}, {"loss": 1.0, "first_base_loss": 2.0, "first_kl": math.inf}])
def test_a_loss_that_is_not_finite_names_who_is_at_fault(figures, meter, monkeypatch):
    monkeypatch.setattr(meter_module, "evaluate", lambda *_, **__: Evaluation(tokens=5, **figures))

    def message(*arguments, **options) -> str:
        with pytest.raises(UserError) as caught:
            meter.measure(*arguments, **options)
        assert "\n" not in str(caught.value)
        assert meter.metrics == []
        return str(caught.value)

    start = message(0, first=True)
    assert all(word in start for word in ("domain", meter.config.model.path, "another text", "weights"))
    assert "--resume" not in start
    later = message(7)
    assert "diverged" in later
    assert "--resume --optim.lr 0.0001" in later  # half of what it was
    assert "changed" not in later
    assert "changed" in message(7, first=True)


def test_a_nan_in_the_model_is_not_blamed_on_the_rate(finished, copy_of, cli, make_config, texts):
    folder = PretrainedFolder(copy_of(finished / "export", "mine"))
    entry = folder.entries["model.norm.weight"]
    with open(folder.path / entry.file, "r+b") as file:
        file.seek(entry.offset)
        file.write(struct.pack("<H", 0x7FC0))  # NaN in bfloat16
    config = make_config()
    code, _, err = cli(
        train_main,
        *("--model.path", folder.path, "--data.domain", texts / "domain.jsonl", "--data.general", texts / "general"),
        *("--data.held_out", 0.1, "--optim.lr", 1e-3, "--train.steps", 1, "--train.seq_len", 32, "--output"),
        *(config.output, "--train.batch_size", 2, "--eval.tokens", 64, "--train.device", "cpu"),
        *("--data.cache", config.data.cache),
    )
    cli.refused(code, err, str(folder.path), "model.norm.weight has 1 values that are not finite")
