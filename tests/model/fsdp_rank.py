"""One rank of test_block_fsdp.py."""

from __future__ import annotations

import os

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.hf.loading import load_model
from llama_pro_fast.model.batch import PackedBatch
from llama_pro_fast.model.decoder import Decoder
from llama_pro_fast.model.policy import BlockClass
from llama_pro_fast.model.trained import Trained

RANKS = 2
TRAINED = [1, 3]
# Of each micro-batch, and in it of each rank: other numbers of tokens and of documents on each.
MICRO_BATCHES = [[(19, 1, 7), (24,)], [(5,), (11, 0, 3)]]


def documents(micro: int, rank: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(10 * micro + rank)
    return [torch.randint(80, (n,), generator=generator).tolist() for n in MICRO_BATCHES[micro][rank]]


def load(folder: str, dtype: torch.dtype) -> Decoder:
    folder = PretrainedFolder(folder)
    trained = Trained(folder.config.num_hidden_layers, tuple(TRAINED))
    return load_model(folder, trained=trained, dtype=dtype, attention="cpu_flash")


def num_valid() -> int:
    """Of the whole step, over micro-batches and ranks."""
    batches = [PackedBatch.from_documents(documents(m, r)) for m in range(len(MICRO_BATCHES)) for r in range(RANKS)]
    return sum(batch.num_valid for batch in batches)


def gradients(folder: str, dtype: torch.dtype, rank: int) -> dict[str, torch.Tensor]:
    """Of the trained parameters, whole, after all micro-batches."""
    mesh = init_device_mesh("cpu", (RANKS,))
    model = load(folder, dtype)
    for block in model.blocks:
        if block.block_class is BlockClass.TRAINED:
            for module in block.modules():
                if getattr(module, "low_precision", None) is not None:
                    module.low_precision = None
            fully_shard(block, mesh=mesh)
    # FSDP takes the mean over the ranks.
    scale = torch.tensor(RANKS / num_valid())
    for micro in range(len(MICRO_BATCHES)):
        model.loss(PackedBatch.from_documents(documents(micro, rank)), scale).backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert isinstance(parameter, DTensor), name
            assert parameter.to_local().numel() < parameter.numel(), f"{name} is not sharded"
            found[name] = parameter.grad.full_tensor()
        else:
            assert parameter.grad is None, name
    return found


def main(rank: int, store: str, out: str, cases: list[tuple[str, str]]) -> None:
    """One rank; the first saves the gradients of every case (folder, dtype) to ``out``."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    found = [gradients(folder, getattr(torch, dtype), rank) for folder, dtype in cases]
    if rank == 0:
        torch.save(found, out)
    distributed.barrier()  # who leaves first takes the connection along
    # Taken down in order, gloo's threads now and then abort the process ("terminate called without an active
    # exception") when all is done.
    os._exit(0)
