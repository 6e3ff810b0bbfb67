"""A step that is not finite is left out, said with its documents, and counted; too many in a row end the run."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal

import pytest
import torch
from stopping import stop_in_step

from llama_pro_fast.data.corpus import Corpus
from llama_pro_fast.errors import UserError
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.model.decoder import Decoder
from llama_pro_fast.recipe import parse
from llama_pro_fast.resume import load_config
from llama_pro_fast.runs import checkpoint
from llama_pro_fast.runs.checkpoint import complete_checkpoints
from llama_pro_fast.runs.marker import read_info
from llama_pro_fast.runs.metrics import read_metrics
from llama_pro_fast.train import main as train_main
from llama_pro_fast.training.optimizer import Optimizer
from llama_pro_fast.training.run import run_training
from llama_pro_fast.training.signals import Stopped


def rows(run, kind):
    return [row for row in read_metrics(run) if row["kind"] == kind]


@pytest.fixture
def bad_document(monkeypatch, make_config, texts, tokenizer) -> str:
    """A document of the 6th step whose loss is NaN, wherever it stands."""
    corpus, first = corpus_of(make_config(), tokenizer), 5 * make_config().train.batch_size
    lines = (texts / "domain.jsonl").read_text().splitlines()
    within = corpus.train.batch(first, 2).input_ids
    for _, number in corpus.train.documents(first, 2):
        text = json.loads(lines[corpus.held_out[0].store.place(number)[1] - 1])["text"]
        ids = torch.tensor(tokenizer(text)["input_ids"][:6])
        if (within.unfold(0, len(ids), 1) == ids).all(1).any():
            break
    loss = Decoder.loss

    def poisoned(self, batch, scale):
        inside = (batch.input_ids.unfold(0, len(ids), 1) == ids).all(1).any()
        return loss(self, batch, scale * (torch.nan if inside else 1.0))

    monkeypatch.setattr(Decoder, "loss", poisoned)
    return text


def test_one_bad_document_does_not_end_a_run_and_is_named(make_config, bad_document, tmp_path, capsys):
    """Its step is left out, the run goes to its end by itself."""
    config = make_config(train={"steps": 30, "log_every": 4, "checkpoint_every": None}, eval={"every": 30})
    assert run_training(config)["steps"] == 30
    run, said = tmp_path / "run", capsys.readouterr().out
    skipped = rows(run, "skipped")
    assert 1 <= len(skipped) <= 4
    for row in skipped:
        assert (row["loss"], row["grad_norm"]) == ("nan", "nan")
        assert any(f'"{bad_document[:20]}' in text for text in row["documents"]), row
        assert f"step {row['step']}: left out, no weight was touched: loss nan" in said
    assert any(text.startswith("domain.jsonl line ") for text in skipped[0]["documents"])
    assert sum(row["skipped"] for row in rows(run, "train")) == len(skipped)
    assert all(row["loss"] is not None for row in rows(run, "train")), "a row's loss is of the steps that count"
    # AdamW has not counted them.
    folder = complete_checkpoints(run)[-1]
    (name,) = [name for name in checkpoint.stored_tensors(folder) if name.endswith("blocks.2.o_proj.weight.step")]
    count = {name: torch.zeros(())}
    checkpoint.load(folder, count)
    assert count[name] == 30 - len(skipped)


def test_it_is_the_same_after_a_resume(make_config, bad_document, tmp_path):
    """Stopped just behind the bad step, between two rows of the log."""
    settings = {"train": {"steps": 16, "log_every": 7, "checkpoint_every": None}, "eval": {"every": 40}}
    run_training(make_config(**settings, output=str(tmp_path / "whole")))
    bad = rows(tmp_path / "whole", "skipped")[0]["step"]
    with pytest.MonkeyPatch.context() as patch:
        calls, loss = [], Decoder.loss

        def counted(self, batch, scale):
            calls.append(1)
            if len(calls) == 2 * bad + 1:  # in the step behind it
                os.kill(os.getpid(), signal.SIGTERM)
            return loss(self, batch, scale)

        patch.setattr(Decoder, "loss", counted)
        with pytest.raises(Stopped):
            run_training(make_config(**settings))
    state = read_info(complete_checkpoints(tmp_path / "run")[-1])
    assert (state.progress.step, state.log.bad_in_a_row, state.log.skipped) == (bad, 1, 1)
    run_training(parse(["--output", str(tmp_path / "run"), "--resume"]).config, resume=True)
    keep = ("step", "loss", "skipped", "grad_norm", "documents", "source_tokens")
    for kind in ("train", "skipped"):
        whole, resumed = (
            [[row.get(key) for key in keep] for row in rows(tmp_path / name, kind)] for name in ("whole", "run")
        )
        assert resumed == whole
    assert (tmp_path / "run/export/model.safetensors").read_bytes() == (
        tmp_path / "whole/export/model.safetensors"
    ).read_bytes()


def always_bad(patch, after: int, until: float = math.inf) -> None:
    loss, calls = Decoder.loss, []

    def poisoned(self, batch, scale):
        calls.append(1)
        return loss(self, batch, scale * (torch.inf if after < len(calls) <= until else 1.0))

    patch.setattr(Decoder, "loss", poisoned)


def test_too_many_in_a_row_end_the_run_and_no_checkpoint_is_given_up_for_them(make_config, tmp_path, cli):
    """Two good steps of two micro-batches, then none: the two good checkpoints stay, whatever the interval says."""
    config = make_config(train={"steps": 8, "checkpoint_every": 1, "max_bad_steps": 4, "log_every": 100})
    with pytest.MonkeyPatch.context() as patch:
        always_bad(patch, after=4)
        with pytest.raises(UserError, match="step 6: 4 steps in a row were left out") as caught:
            run_training(config)
    run = tmp_path / "run"
    assert [folder.name for folder in complete_checkpoints(run)] == ["step-000001", "step-000002"]
    # The weights of step 2 may be what is bad: the one before is advised for a rate that is too high.
    assert f"--output {run} --resume --from_step 1 --optim.lr 0.0001" in str(caught.value)
    with pytest.MonkeyPatch.context() as patch:
        always_bad(patch, after=0)
        with pytest.raises(UserError, match="step 6: 4 steps in a row"):
            run_training(parse(["--output", str(run), "--resume"]).config, resume=True)
    # The text is broken, and the way past it that was said works: with five bad steps the run comes to its end.
    said = str(caught.value).split("go past it: ")[1].split(";")[0]
    with pytest.MonkeyPatch.context() as patch:
        always_bad(patch, after=0, until=10)
        assert cli(train_main, *shlex.split(said)[2:])[0] == 0
    assert [row["step"] for row in rows(run, "skipped")] == [3, 4, 5, 6, 7]


def test_a_stop_among_bad_steps_gives_up_no_checkpoint_either(make_config, tmp_path):
    config = make_config(train={"steps": 8, "checkpoint_every": 2, "keep_checkpoints": 1, "max_bad_steps": 9})
    with pytest.MonkeyPatch.context() as patch:
        always_bad(patch, after=4)
        stop_in_step(5, patch)
        with pytest.raises(Stopped):
            run_training(config)
    assert [folder.name for folder in complete_checkpoints(tmp_path / "run")] == ["step-000002", "step-000004"]


def test_a_bad_steps_documents_are_all_in_its_row(make_config, tmp_path, capsys):
    """A finite loss and a gradient that is not: any of them may be it."""
    config = make_config(train={"steps": 1, "batch_size": 32, "micro_batch_size": 8})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "step", poison_a_gradient(Optimizer.step))
        run_training(config)
    (row,) = rows(tmp_path / "run", "skipped")
    assert (row["loss"] != "nan", row["grad_norm"]) == (True, "nan")
    train = corpus_of(load_config(tmp_path / "run"), PretrainedFolder(tmp_path / "run/expanded").tokenizer()).train
    assert len(row["documents"]) == len(train.documents(0, 32)) > 10
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "left out, no weight" in line]
    assert line.count("domain.jsonl line ") == 3


def poison_a_gradient(step):
    def poisoned(self, index, loss):
        next(iter(self.parameters.values())).grad.view(-1)[0] = torch.nan
        return step(self, index, loss)

    return poisoned


def corpus_of(config, tokenizer) -> Corpus:
    train = config.train
    options = {"seq_len": train.seq_len, "seed": train.seed, "batch_size": train.batch_size}
    return Corpus.prepare(config.data, tokenizer, **options, default_general=True)


def test_what_is_advised_for_a_rate_that_is_too_high_works(make_config, tmp_path, cli):
    rate, length = {"lr": 1e30, "warmup_steps": 0}, {"steps": 20, "checkpoint_every": None}
    config = make_config(optim=rate, train=length, eval={"every": 99})
    code, _, err = cli(lambda argv: run_training(config) and 0)
    cli.refused(code, err, "10 steps in a row", "the rate 1e+30 is too high, start anew with a lower one: ")
    command = shlex.split(err.split("with a lower one: ")[1])
    code, _, err = cli(train_main, *command[2:])
    assert code == 0, err
    assert load_config(tmp_path / "run").optim.lr == 1e-4
    assert json.loads((tmp_path / "run" / "report" / "summary.json").read_text())["steps"] == 20


def test_a_weight_that_is_not_finite_is_never_saved_and_the_way_on_works(make_config, tmp_path, cli):
    """A rate beyond float32 itself: the update overflows at once."""
    rate, length = {"lr": 1e300, "warmup_steps": 0}, {"steps": 4, "checkpoint_every": 1}
    config = make_config(optim=rate, train=length, eval={"every": 99})
    code, _, err = cli(lambda argv: run_training(config) and 0)
    cli.refused(code, err, "is no longer finite", "--resume --optim.lr 0.0001")
    assert not complete_checkpoints(tmp_path / "run")
    assert cli(train_main, "--output", tmp_path / "run", "--resume", "--optim.lr", "0.0001")[0] == 0
