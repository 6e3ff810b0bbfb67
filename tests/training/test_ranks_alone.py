"""What ranks say, ask and compare, told apart without starting several."""

from __future__ import annotations

import re
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from block_cases import SPECS, make_block
from torch import distributed

from llama_pro_fast import ranks as ranks_module
from llama_pro_fast.config import RunConfig, options
from llama_pro_fast.errors import UserError
from llama_pro_fast.model.policy import BlockClass
from llama_pro_fast.planning import devices
from llama_pro_fast.ranks import ALONE, Ranks
from llama_pro_fast.runs.run_folder import resume_command
from llama_pro_fast.training.joining import check_same_recipe
from llama_pro_fast.training.optimizer import Optimizer
from llama_pro_fast.training.run import run_training
from llama_pro_fast.training.settle import device_of
from llama_pro_fast.training.sharding import shard, share_buffers
from llama_pro_fast.training.signals import StopSignals


def seen(config: RunConfig, *, gpus: int = 0, local: int = 0, **how) -> tuple:
    """What a rank tells of itself."""
    own = {f"--{key}": repr(value) for key, value, _ in options(config)}
    return own | {f"--{key}": str(how.get(key)) for key in ("resume", "overwrite", "from_step")}, gpus, local


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"gpus": 2}, {"gpus": 2, "local": 1}, None),
        ({"gpus": 1}, {"gpus": 1, "local": 1}, "process 1 of a machine finds 1 GPU: give torchrun as many"),
        ({"gpus": 0}, {"gpus": 1}, "rank 1 sees a GPU and rank 0 none"),
        ({"gpus": 1}, {"gpus": 0}, "rank 1 sees no GPU and rank 0 does"),
        ({"resume": True}, {"resume": False}, "--resume: rank 1 was given False and rank 0 True"),
        ({}, {"from_step": 2}, "--from_step: rank 1 was given 2 and rank 0 None"),
    ],
)
def test_ranks_that_were_started_otherwise_are_refused(first, second, words, config_at, tmp_path):
    config = config_at(tmp_path / "run", train={"device": "auto"})
    ranks = SimpleNamespace(count=2, local=0, gather=lambda _: [seen(config, **first), seen(config, **second)])
    refused = pytest.raises(UserError, match=words) if words else nullcontext()
    with refused:
        check_same_recipe(config, [False, False, None], ranks)


def test_the_command_to_go_on_starts_as_many_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    end = "--nproc-per-node 8 -m llama_pro_fast.train --output run --resume"
    assert resume_command(Path("run")) == f"torchrun --standalone {end}"
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert resume_command(Path("run")) == f"torchrun ... {end}"


def test_the_plan_takes_the_least_memory_that_a_rank_has_free(config_at, tmp_path):
    config = config_at(tmp_path / "run", train={"device": "cpu"})
    ranks = SimpleNamespace(local=0, on_machine=2, gather=lambda own: [own, 5, own])
    assert device_of(config, ranks).memory == 5
    ranks.gather = lambda own: [own]
    assert device_of(config, ranks).memory < 0.6 * devices.cpu().memory


def test_what_a_launcher_sends_after_a_rank_has_ended_is_no_news():
    ranks = Ranks(count=2)
    signals = StopSignals(ranks)
    ranks.ending.set()
    signals._ask(signal.SIGTERM, None)
    assert signals.requested is None


def test_each_start_has_a_name_of_its_own():
    """Also where the store remembers who asked in an earlier one."""
    store, starts = distributed.HashStore(), []
    for _ in range(2):
        with ThreadPoolExecutor() as pool:
            of_ranks = [pool.submit(ranks_module._fresh_prefix, store, number, 3) for number in (2, 0, 1)]
            (name,) = {each.result(30) for each in of_ranks}
        starts.append(name)
    assert starts[0] != starts[1]


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:43658"), True),
        (RuntimeError("Timed out waiting 600000ms for recv operation to complete"), True),
        (distributed.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (distributed.DistNetworkError("reset"), True),
        (distributed.DistStoreError("wait timeout after 1000ms, keys: /x"), True),
        (RuntimeError("CUDA error: the launch timed out and was terminated"), False),
        (distributed.DistBackendError("NCCL error: cannot make /dev/shm/nccl-1 of 33 MB: No space left"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (UserError("connection"), False),
    ],
)
def test_an_error_is_another_ranks_end_or_is_shown_as_it_is(error, lost, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(distributed, "all_reduce", fails)
    monkeypatch.setattr(ranks_module, "NEWS", 0.0)
    with pytest.raises(UserError if lost else type(error), match=re.escape(str(error))) as found:
        Ranks(count=2, store=distributed.HashStore()).add([torch.ones(1)])
    assert ("another process of this run has " in str(found.value)) == lost


def test_a_checksum_sees_what_a_sum_does_not():
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    swapped, shifted = tensor.clone(), tensor.clone()
    swapped[[3, 7]] = tensor[[7, 3]]
    shifted.view(torch.int32)[:2] += torch.tensor([1, -1], dtype=torch.int32)
    assert len({int(ranks_module._checksum(each)) for each in (tensor, swapped, shifted)}) == 3


def test_sharded_blocks_send_through_the_same_buffers():
    """As roots of their own each would hold its gradients to the end of backward."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        spec = SPECS["gqa"]
        blocks = [make_block(spec, BlockClass.TRAINED, torch.float32) for _ in range(3)]
        for block in blocks:
            shard(block, ALONE)
        share_buffers(SimpleNamespace(blocks=[make_block(spec, BlockClass.FROZEN, torch.float32), *blocks]))
        assert len({id(block._get_fsdp_state()._comm_ctx) for block in blocks}) == 1
    finally:
        distributed.destroy_process_group()


def test_learning_is_checked_after_the_second_step_however_often_is_saved(config_at, tmp_path, monkeypatch):
    found, check = [], Optimizer.check_learning
    monkeypatch.setattr(Optimizer, "check_learning", lambda self: found.append(check(self)) or found[-1])
    run_training(config_at(tmp_path / "run", train={"steps": 4, "checkpoint_every": 1}))
    assert found == [True]
