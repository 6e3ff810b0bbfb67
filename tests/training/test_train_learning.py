"""What learns and what stays: the first step, the paper's appendix A, frozen bytes, NaN."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from llama_pro_fast.config import OptimConfig
from llama_pro_fast.expansion.manifest import what_trains
from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.expansion.proof import expand_and_prove
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.hf.loading import hf_tensors, load_model
from llama_pro_fast.model.batch import PackedBatch
from llama_pro_fast.model.decoder import Decoder
from llama_pro_fast.model.layers import low_precision_copies
from llama_pro_fast.training import optimizer as optimizer_module
from llama_pro_fast.training.optimizer import Optimizer
from llama_pro_fast.training.schedule import learning_rate


@pytest.fixture
def expanded(base, tmp_path) -> PretrainedFolder:
    expand_and_prove(PretrainedFolder(base), tmp_path / "expanded", ExpansionPlan.from_groups(4, 2))
    return PretrainedFolder(tmp_path / "expanded")


@pytest.fixture
def batch() -> PackedBatch:
    generator = torch.Generator().manual_seed(3)
    return PackedBatch.from_documents([torch.randint(300, (n,), generator=generator).tolist() for n in (30, 9, 17)])


def load(folder: PretrainedFolder, dtype=torch.float32, parameters="new_blocks", **options) -> Decoder:
    trained = what_trains(folder.raw_config, folder.config.num_hidden_layers, parameters=parameters, name="")
    return load_model(folder, trained=trained, dtype=dtype, attention="cpu_flash", **options)


def make_optimizer(model: Decoder, steps: int = 10, **config) -> Optimizer:
    settings = OptimConfig(**({"lr": 1e-2, "warmup_steps": 0, "decay_steps": 0} | config))
    return Optimizer(model, model.trained_parameters(), settings, steps)


def backward(model: Decoder, batch: PackedBatch) -> torch.Tensor:
    loss = model.loss(batch, torch.tensor(1.0 / batch.num_valid))
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_zeroed_projections_get_a_gradient_in_the_first_step(expanded, batch, dtype):
    """Both branches of a new block end in a zero matrix, so nothing before it matters yet; after one step it does."""
    model = load(expanded, dtype)
    optimizer = make_optimizer(model)
    backward(model, batch)
    for name, parameter in model.trained_parameters().items():
        starts = "o_proj" in name or "down_proj" in name
        assert bool(parameter.grad.any()) == starts, name
        assert parameter.grad.any() or torch.equal(parameter.grad, torch.zeros_like(parameter)), name
    optimizer.step(0)
    backward(model, batch)
    assert all(parameter.grad.any() for parameter in model.trained_parameters().values())


def test_a_zeroed_norm_would_keep_its_ffn_from_learning(expanded, batch):
    """Paper, appendix A: with the norm's weight at 0 instead, the FFN branch's gradient is 0, and stays 0."""
    source = load(expanded).blocks[0]

    def gradients(zeroed: str) -> dict[str, torch.Tensor]:
        model = load(expanded)
        block = model.blocks[model.trained_blocks[0]]
        with torch.no_grad():
            block.down_proj.weight.copy_(source.down_proj.weight)
            block.o_proj.weight.copy_(source.o_proj.weight)
            for name in ("input_layernorm", "post_attention_layernorm") if zeroed == "norm" else ():
                getattr(block, name).weight.zero_()
            for name in ("o_proj", "down_proj") if zeroed == "projection" else ():
                getattr(block, name).weight.zero_()
        optimizer = make_optimizer(model, weight_decay=0.0)
        seen = {}
        for step in range(4):
            backward(model, batch)
            for name, parameter in block.named_parameters():
                seen[name] = seen.get(name, 0) + parameter.grad.abs().sum()
            optimizer.step(step)
        return seen

    norm, projection = gradients("norm"), gradients("projection")
    for name in ("post_attention_layernorm.weight", "gate_up_proj.weight", "down_proj.weight"):
        assert norm[name] == 0, f"{name} learns with a zeroed norm"
        assert projection[name] > 0, f"{name} does not learn with zeroed projections"


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_tensors_keep_every_byte_and_get_no_gradient(expanded, batch, dtype, eight_bits):
    model = load(expanded, dtype, eight_bits=eight_bits)
    assert bool(model.blocks[3].transposed) == eight_bits
    optimizer = make_optimizer(model, weight_decay=0.1)
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    before = {name: p.detach().clone() for name, p in frozen.items()}
    started = {name: p.detach().clone() for name, p in model.trained_parameters().items()}
    assert started.keys().isdisjoint(frozen)
    for step in range(3):
        backward(model, batch)
        assert all(parameter.grad is None for parameter in frozen.values())
        assert all(parameter.grad is not None for parameter in model.trained_parameters().values())
        optimizer.step(step)
    for name, parameter in frozen.items():
        assert torch.equal(parameter.view(torch.uint8), before[name].view(torch.uint8)), f"{name} changed"
    for name, parameter in model.trained_parameters().items():
        assert not torch.equal(parameter, started[name]), f"{name} did not train"


def test_a_second_generation_freezes_the_first(base, tmp_path, expanded):
    expand_and_prove(expanded, tmp_path / "twice", ExpansionPlan.from_after(6, [5]))
    twice = PretrainedFolder(tmp_path / "twice")
    assert load(twice).trained_blocks == [6]


def test_bf16_training_keeps_fp32_masters_and_fresh_low_precision_copies(expanded, batch):
    model = load(expanded, torch.bfloat16)
    optimizer = make_optimizer(model, lr=1e-6)
    before = {name: parameter.detach().clone() for name, parameter in model.trained_parameters().items()}
    backward(model, batch)
    optimizer.step(0)
    moved = 0
    for name, parameter in model.trained_parameters().items():
        assert parameter.dtype == torch.float32
        assert parameter.grad is None
        moved += not torch.equal(parameter, before[name])
        holder = model.get_submodule(name.rpartition(".")[0])
        if getattr(holder, "low_precision", None) is not None and name.endswith("weight"):
            assert torch.equal(holder.low_precision, parameter.bfloat16())
    assert moved > 0
    assert all(p.dtype == torch.bfloat16 for p in model.parameters() if not p.requires_grad)


def test_a_gradient_that_is_not_finite_touches_nothing_and_is_counted(expanded, batch):
    model = load(expanded)
    optimizer = make_optimizer(model)
    backward(model, batch)
    optimizer.step(0)
    before = {name: p.detach().clone() for name, p in model.trained_parameters().items()}
    state = {name: value.clone() for name, value in optimizer.state().items()}
    backward(model, batch)
    next(iter(model.trained_parameters().values())).grad.view(-1)[0] = math.inf
    norm = optimizer.step(1)
    assert not torch.isfinite(norm)
    assert optimizer.left_out == 1
    assert all(torch.equal(p, before[name]) for name, p in model.trained_parameters().items())
    assert all(torch.equal(value, state[name]) for name, value in optimizer.state().items())


def test_the_rate_of_the_schedule_is_the_one_applied(expanded, batch, monkeypatch):
    model = load(expanded)
    rates = set()
    monkeypatch.setattr(optimizer_module, "adamw_", lambda *_, lr, **others: rates.add(lr))
    optimizer = make_optimizer(model, warmup_steps=3)
    for step in range(4):
        backward(model, batch)
        optimizer.step(step)
        assert rates == {learning_rate(optimizer.config, step, 10)}
        rates.clear()


@pytest.mark.parametrize("parameters", ["new_blocks", "all"])
def test_weight_decay_is_for_matrices_but_for_the_embeddings(expanded, parameters, batch, monkeypatch):
    model = load(expanded, parameters=parameters)
    optimizer = make_optimizer(model, weight_decay=0.3)
    decays = {}
    monkeypatch.setattr(
        optimizer_module,
        "adamw_",
        lambda parameters, *_, weight_decay, **others: decays.update(dict.fromkeys(parameters, weight_decay)),
    )
    backward(model, batch)
    optimizer.step(0)
    for name, parameter in model.trained_parameters().items():
        assert decays[parameter] == (0.3 if name.endswith(("proj.weight", "lm_head.weight")) else 0.0), name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_low_precision_copies_follow_a_step_and_a_restored_checkpoint(expanded, batch, name):
    model = load(expanded, torch.bfloat16)
    optimizer = make_optimizer(model, name=name)
    copies = low_precision_copies(model)
    before = [copy.clone() for copy in copies.values()]
    backward(model, batch)
    optimizer.step(0)
    assert not all(map(torch.equal, copies.values(), before))
    assert all(torch.equal(copy, weight.bfloat16()) for weight, copy in copies.items())
    with torch.no_grad():
        for weight in copies:
            weight.mul_(2)
    optimizer.restored()
    assert all(torch.equal(copy, weight.bfloat16()) for weight, copy in copies.items())


def test_a_parameter_without_a_gradient_is_not_passed_over(expanded, batch):
    model = load(expanded)
    optimizer = make_optimizer(model)
    backward(model, batch)
    next(iter(optimizer.parameters.values())).grad = None
    with pytest.raises(RuntimeError, match="should train, and has had no gradient in this step"):
        optimizer.step(0)


def test_muon_updates_each_stacked_matrix_for_itself(expanded, batch):
    """As PyTorch's Muon does q, k, v, gate and up given alone; norms go to AdamW; a bad step changes nothing."""
    model = load(expanded)
    optimizer = make_optimizer(model, name="muon", clip=1e-3, weight_decay=0.1)
    alone = {
        f"{name} {hf}": torch.nn.Parameter(part.clone())
        for name, matrix in optimizer.muon.matrices.items()
        for hf, part in hf_tensors(expanded.config, name, matrix.detach())
    }
    other = torch.optim.Muon(alone.values(), lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        backward(model, batch)
        gradients = {name: matrix.grad.clone() for name, matrix in optimizer.muon.matrices.items()}
        optimizer.step(step)
        for name, gradient in gradients.items():
            for hf, part in hf_tensors(expanded.config, name, gradient / optimizer.divisor):
                alone[f"{name} {hf}"].grad = part
        other.param_groups[0]["lr"] = learning_rate(optimizer.config, step, 10)
        other.step()
    for name, matrix in optimizer.muon.matrices.items():
        for hf, part in hf_tensors(expanded.config, name, matrix.detach()):
            torch.testing.assert_close(part, alone[f"{name} {hf}"].detach(), rtol=1e-3, atol=1e-6)
    state = {name: value.clone() for name, value in optimizer.state().items()}
    assert {name.rsplit(".", 1)[1] for name in state} == {"momentum", "step", "exp_avg", "exp_avg_sq"}
    before = {name: p.detach().clone() for name, p in model.trained_parameters().items()}
    backward(model, batch)
    optimizer.step(3, torch.tensor(math.nan))
    assert all(torch.equal(p, before[name]) for name, p in model.trained_parameters().items())
    assert all(torch.equal(value, state[name]) for name, value in optimizer.state().items())


def test_clipping_bounds_the_update(expanded, batch):
    """SGD-like check through the moments: the first exp_avg is (1 - beta1) × the clipped gradient."""
    model = load(expanded)
    optimizer = make_optimizer(model, clip=1e-3)
    backward(model, batch)
    gradients = torch.cat([p.grad.flatten() for p in model.trained_parameters().values()])
    norm = optimizer.step(0)
    torch.testing.assert_close(norm, gradients.norm())
    moments = torch.cat([v.flatten() for name, v in optimizer.state().items() if name.endswith("exp_avg")])
    assert moments.norm() / (1 - 0.9) == pytest.approx(1e-3, rel=1e-3)


class TestLearningRate:
    def test_cosine(self):
        config = OptimConfig(lr=1.0, warmup_steps=10, decay_steps=0)
        rates = [learning_rate(config, step, 100) for step in range(100)]
        assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
        assert max(rates) == rates[9] == 1.0
        assert all(a > b for a, b in itertools.pairwise(rates[9:]))
        assert 0 < rates[-1] < 1e-3
        assert rates[54] == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 91)))

    def test_wsd(self):
        config = OptimConfig(lr=1.0, schedule="wsd", warmup_steps=10, decay_steps=20)
        rates = [learning_rate(config, step, 100) for step in range(100)]
        assert rates[9:80] == [1.0] * 71
        assert rates[80:] == pytest.approx([n / 21 for n in range(20, 0, -1)])

    def test_floor(self):
        for schedule in ("cosine", "wsd"):
            config = OptimConfig(lr=2.0, schedule=schedule, warmup_steps=0, decay_steps=50, min_lr_ratio=0.1)
            assert 0.2 < learning_rate(config, 99, 100) < 0.25


def test_low_precision_copies_exist_only_where_the_master_has_another_dtype(expanded):
    for dtype, expected in ((torch.float32, 0), (torch.bfloat16, 2 * 4)):
        modules = load(expanded, dtype).modules()
        copied = [m for m in modules if isinstance(getattr(m, "low_precision", None), torch.Tensor)]
        assert len(copied) == expected
        assert all(isinstance(m, nn.Module) and m.weight.requires_grad for m in copied)
