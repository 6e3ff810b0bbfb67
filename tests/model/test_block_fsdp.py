"""Trained blocks under FSDP on two gloo ranks, frozen ones replicated: the gradients are one rank's."""

from __future__ import annotations

import forked
import fsdp_rank
import pytest
import torch

from llama_pro_fast.model.batch import PackedBatch

CASES = [(family, dtype) for family in ("llama", "qwen3") for dtype in ("float32", "bfloat16")]


@pytest.mark.slow
def test_two_ranks_have_the_gradients_of_one(make_base, tmp_path):
    """In bf16 a sharded master weight has no low-precision copy: it is cast in forward and in backward."""
    folders = {
        family: make_base(name=family, family=family, dtype=torch.bfloat16, head_dim=12).path for family, _ in CASES
    }
    cases = [(str(folders[family]), dtype) for family, dtype in CASES]
    screens = [tmp_path / f"rank-{rank}.txt" for rank in range(fsdp_rank.RANKS)]
    processes = [
        forked.start(fsdp_rank.main, rank, str(tmp_path / "store"), str(tmp_path / "out"), cases, screen=screen)
        for rank, screen in enumerate(screens)
    ]
    for process in processes:
        process.join(300)
        process.kill()
    said = "\n".join(screen.read_text() for screen in screens)
    assert [process.exitcode for process in processes] == [0] * fsdp_rank.RANKS, said

    for case, sharded in zip(cases, torch.load(tmp_path / "out"), strict=True):
        folder, dtype = case
        model = fsdp_rank.load(folder, getattr(torch, dtype))
        scale = torch.tensor(1 / fsdp_rank.num_valid())
        for micro in range(len(fsdp_rank.MICRO_BATCHES)):
            for rank in range(fsdp_rank.RANKS):
                model.loss(PackedBatch.from_documents(fsdp_rank.documents(micro, rank)), scale).backward()
        trained = model.trained_parameters()
        assert sharded.keys() == trained.keys(), case
        for name, parameter in trained.items():
            assert sharded[name].dtype == torch.float32, (case, name)
            # The same numbers added in another order; the factor of two ranks rounds nothing, in bf16 neither.
            error = (sharded[name] - parameter.grad).norm() / parameter.grad.norm()
            assert error < 1e-6, f"{case}, {name}: {error}"
