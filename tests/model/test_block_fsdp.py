"""Trained blocks under FSDP on two gloo ranks, frozen ones replicated: the gradients are one rank's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fsdp_rank
import pytest
import torch

from llama_pro_fast.model.batch import PackedBatch


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_ranks_have_the_gradients_of_one(dtype, family, make_base, tmp_path):
    """In bf16 a sharded master weight has no low-precision copy: it is cast in forward and in backward."""
    folder = make_base(family=family, dtype=torch.bfloat16, head_dim=12)
    script, store, out = Path(fsdp_rank.__file__), tmp_path / "store", tmp_path / "gradients.pt"
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, (script, folder.path, dtype, rank, store, out))],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(fsdp_rank.RANKS)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * fsdp_rank.RANKS, "\n".join(said)
    sharded = torch.load(out)

    model = fsdp_rank.load(folder.path, getattr(torch, dtype))
    scale = torch.tensor(1 / fsdp_rank.num_valid())
    for micro in range(len(fsdp_rank.MICRO_BATCHES)):
        for rank in range(fsdp_rank.RANKS):
            model.loss(PackedBatch.from_documents(fsdp_rank.documents(micro, rank)), scale).backward()
    trained = model.trained_parameters()
    assert sharded.keys() == trained.keys()
    for name, parameter in trained.items():
        assert sharded[name].dtype == torch.float32
        # The same numbers added in another order; the factor of two ranks rounds nothing, in bf16 neither.
        error = (sharded[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-6, f"{name}: {error}"
