"""`train.kl_weight`: the base teaches on the general text of every step."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.expansion.proof import expand_and_prove
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.hf.loading import load_model
from llama_pro_fast.model.batch import IGNORE_INDEX, PackedBatch
from llama_pro_fast.recipe import parse
from llama_pro_fast.runs.metrics import read_metrics
from llama_pro_fast.training.run import run_training

TAUGHT = {"data": {"replay": 0.25}, "train": {"kl_weight": 2.0, "batch_size": 8}}


@pytest.mark.parametrize("num_general", [24, 64])
def test_its_gradient_is_that_of_cross_entropy_and_kl_written_out(base, tmp_path, num_general):
    """In float64, some blocks having learned something, in a batch that is partly or wholly general text."""
    folder = PretrainedFolder(base)
    plan = ExpansionPlan.from_groups(folder.config.num_hidden_layers, 2)
    expand_and_prove(folder, tmp_path / "expanded", plan)
    trained = plan.trained
    model = load_model(
        PretrainedFolder(tmp_path / "expanded"), trained=trained, dtype=torch.float64, attention="reference"
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    documents = torch.randint(0, 90, (8, 8), generator=generator).tolist()
    batch = PackedBatch.from_documents(documents, cu_seqlens_length=16)
    batch = dataclasses.replace(batch, num_general=num_general, num_valid_general=num_general * 7 // 8)
    scale = torch.tensor(1 / batch.num_valid, dtype=torch.float64)

    loss, divergence = model.loss_beside_base(batch, scale, 0.7, skip=trained.blocks)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.trained_parameters().items()}
    model.zero_grad()

    logits = F.linear(model.hidden_states(batch), model.lm_head.weight)
    with torch.no_grad():
        alone = PackedBatch.from_documents(documents[8 - num_general // 8 :])
        base_log = F.linear(model.hidden_states(alone, skip=trained.blocks), model.lm_head.weight).log_softmax(-1)
    kl = (base_log.exp() * (base_log - logits[-num_general:].log_softmax(-1))).sum(-1)
    kl = (kl * (batch.labels[-num_general:] != IGNORE_INDEX)).sum() * scale
    plain = F.cross_entropy(logits, batch.labels, reduction="sum") * scale + 0.7 * kl
    plain.backward()

    assert float(kl.detach()) > 1e-3
    torch.testing.assert_close(divergence, kl.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(loss.detach(), plain.detach(), rtol=1e-10, atol=0)
    for name, parameter in model.trained_parameters().items():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-10 * float(plain.detach()))


def test_the_general_sequences_of_a_batch_come_last(packed):
    plain, taught = packed(()), packed((1,))
    for start in (0, 8, 20):
        batch, same = taught.batch(start, 8), plain.batch(start, 8)
        rows, others = (b.input_ids.view(8, -1) for b in (batch, same))
        row = plain.pieces(start, 8)
        sequence = np.repeat(np.arange(len(row.lengths)), row.lengths).reshape(8, -1)
        is_general = (row.sources[sequence] == 1).any(axis=1)
        order = np.argsort(is_general, kind="stable")
        assert torch.equal(rows, others[order])
        assert batch.num_general == is_general.sum() * taught.seq_len
        labels = batch.labels[len(batch.labels) - batch.num_general :]
        assert batch.num_valid_general == int((labels != IGNORE_INDEX).sum())
        assert (batch.num_valid, same.num_general) == (same.num_valid, 0)
        assert set(batch.cu_seqlens.tolist()) >= set(range(0, 8 * taught.seq_len + 1, taught.seq_len))


@pytest.fixture
def packed(make_config, tokenizer):
    from llama_pro_fast.data.corpus import Corpus
    from llama_pro_fast.data.dataset import PackedDataset

    config = make_config(data={"replay": 0.4}).data
    mixed = Corpus.prepare(config, tokenizer, seq_len=32, seed=0, batch_size=8, default_general=False).mixed
    return lambda taught: PackedDataset(mixed, seq_len=32, seed=0, batch_size=8, taught=taught)


def test_a_run_is_the_same_in_other_micro_batches_and_resumed(make_config, stopped_at_2, tmp_path):
    """And its first step, where nothing has moved, sees no divergence."""
    seen = {}
    for micro in (2, 8):
        output = tmp_path / f"micro-{micro}"
        run_training(make_config(output=str(output), **_with(TAUGHT, train={"micro_batch_size": micro})))
        seen[micro] = [row for row in read_metrics(output) if row["kind"] == "train"]
    stopped_at_2(make_config(**TAUGHT))
    run_training(parse(["--output", str(tmp_path / "run"), "--resume"]).config, resume=True)
    resumed = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    for key in ("loss", "kl", "grad_norm"):
        values = [row[key] for row in seen[2]]
        assert [row[key] for row in resumed] == values
        assert [row[key] for row in seen[8]] == pytest.approx(values, rel=1e-4, abs=1e-7)
    assert seen[2][0]["kl"] == 0.0
    assert all(row["kl"] > 0 for row in seen[2][1:])


def test_the_divergence_is_held_down(make_config, tmp_path):
    ends = []
    for weight in (0.0, 20.0):
        output = tmp_path / f"{weight:g}"
        run_training(make_config(output=str(output), **_with(TAUGHT, train={"kl_weight": weight, "steps": 12})))
        ends.append([row for row in read_metrics(output) if row["kind"] == "eval" and row["role"] == "general"][-1])
    assert ends[1]["kl"] < 0.7 * ends[0]["kl"]


def _with(changes: dict, **more: dict) -> dict:
    return changes | {name: changes.get(name, {}) | values for name, values in more.items()}


def test_it_is_refused_where_there_is_no_base_or_no_general_text(refused):
    refused("--train.kl_weight 1", "not kept", train__kl_weight=1, train__parameters="all", expand__groups=None)
    refused("--train.kl_weight", "--data.replay 0.2", train__kl_weight=1)
    refused("--train.kl_weight", "and --data.general FILE", train__kl_weight=1, data__general=None)
    refused("--train.kl_weight", "-1", train__kl_weight=-1)
