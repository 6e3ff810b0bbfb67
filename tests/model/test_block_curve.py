"""Two hundred steps with this block have the losses of two hundred steps with autograd's."""

from __future__ import annotations

import pytest
import torch
from block_cases import autograd_block

from llama_pro_fast.config import OptimConfig
from llama_pro_fast.expansion.manifest import Manifest
from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.expansion.proof import expand_and_prove
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.model.batch import PackedBatch
from llama_pro_fast.model.block import Block
from llama_pro_fast.training.optimizer import Optimizer

STEPS = 200


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_losses_of_200_steps_are_autograds_within_rounding(family, make_base, load, tmp_path, monkeypatch):
    """The rule of every op for a whole training: against fp64, at most twice the error of autograd in that dtype."""
    base = make_base(family=family, vocab_size=32, head_dim=8, num_hidden_layers=2)
    plan = ExpansionPlan.from_after(2, [0])  # below, trained, frozen
    expand_and_prove(base, tmp_path / "expanded", plan)
    folder = PretrainedFolder(tmp_path / "expanded")
    trained = Manifest.from_config(folder.raw_config).trained_blocks
    generator = torch.Generator().manual_seed(5)
    # Counting modulo something: there is a rule to learn.
    starts, strides = (
        torch.randint(32, (STEPS, 3), generator=generator),
        torch.randint(1, 4, (STEPS, 3), generator=generator),
    )
    batches = [
        PackedBatch.from_documents(
            [[(int(a) + int(b) * i) % 29 for i in range(n)] for a, b, n in zip(*row, (17, 6, 11), strict=True)]
        )
        for row in zip(starts, strides, strict=True)
    ]

    def losses(dtype):
        model = load(folder, dtype=dtype, trained_blocks=trained)
        config = OptimConfig(lr=2e-2, warmup_steps=10, decay_steps=0)
        optimizer, seen = Optimizer(model, model.trained_parameters(), config, STEPS), []
        for step, batch in enumerate(batches):
            loss = model.loss(batch, torch.tensor(1 / batch.num_valid, dtype=torch.promote_types(dtype, torch.float32)))
            loss.backward()
            optimizer.step(step)
            seen.append(loss.detach().double())
        return torch.stack(seen)

    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    exact, *ours = map(losses, dtypes)
    monkeypatch.setattr(Block, "forward", autograd_block)
    plain_exact, *plain = map(losses, dtypes)
    assert exact[-20:].mean() < exact[:20].mean() - 0.3, "nothing was learned: the losses would agree anyway"
    assert (exact - plain_exact).abs().max() < 1e-9
    for dtype, by_hand, by_autograd in zip(dtypes[1:], ours, plain, strict=True):
        assert (by_hand - exact).norm() <= 2 * (by_autograd - exact).norm(), dtype
