"""Clipping inside AdamW is clipping before it, and a norm that is not finite leaves everything as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llama_pro_fast.config import OptimConfig
from llama_pro_fast.training.optimizer import Optimizer

# An eps that counts, else AdamW would not see by what its gradients are multiplied.
CONFIG = OptimConfig(lr=1e-2, schedule="wsd", warmup_steps=0, decay_steps=0, clip=1.0, eps=0.1)


def model_with_gradients(size: float) -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    for parameter in model.parameters():
        parameter.grad = size * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_it_is_clipping_before_the_step(size):
    ours, plain = model_with_gradients(size), model_with_gradients(size)
    norm = Optimizer(ours, dict(ours.named_parameters()), CONFIG, 10).step(0)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(plain.parameters(), 1.0))
    groups = [
        {"params": [plain.weight], "weight_decay": CONFIG.weight_decay},
        {"params": [plain.bias], "weight_decay": 0},
    ]
    torch.optim.AdamW(groups, lr=1e-2, betas=(CONFIG.beta1, CONFIG.beta2), eps=CONFIG.eps).step()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_changes_nothing(bad):
    model = model_with_gradients(1.0)
    model.weight.grad[1, 2] = bad
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = Optimizer(model, dict(model.named_parameters()), CONFIG, 10)
    assert not optimizer.step(0).isfinite()
    assert all(map(torch.equal, model.parameters(), before))
    assert optimizer.left_out == 1


def test_a_loss_that_is_not_finite_changes_nothing_however_its_gradient_looks():
    model = model_with_gradients(1.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = Optimizer(model, dict(model.named_parameters()), CONFIG, 10)
    optimizer.state()
    assert optimizer.step(0, torch.tensor(float("inf"))).isfinite()
    assert all(map(torch.equal, model.parameters(), before))
    assert optimizer.left_out == 1
    assert not any(value.any() for value in optimizer.state().values()), "moments or the count of steps moved"
