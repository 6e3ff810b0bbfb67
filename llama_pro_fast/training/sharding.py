"""What trains, sharded over the ranks by PyTorch's `fully_shard`: each new block's weights, gradients and moments.

Frozen weights stay whole on every rank: nothing of them is ever sent. A block's weights are put together in float32 for
its forward and again for its backward, and cast there; embedding, final norm and head, where these train, stay whole.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from llama_pro_fast.model.block import BlockClass
from llama_pro_fast.model.decoder import Decoder
from llama_pro_fast.ranks import Ranks


def shard(model: Decoder, ranks: Ranks) -> None:
    """Shard every trained block of a model over the ranks; what requires a gradient is settled by now."""
    mesh = init_device_mesh(model.norm.weight.device.type, (ranks.count,))
    for block in model.blocks:
        if block.block_class is BlockClass.TRAINED:
            for module in block.modules():
                if getattr(module, "low_precision", None) is not None:
                    module.low_precision = None
            assert all(parameter.dtype in (torch.float32, torch.float64) for parameter in block.parameters())
            # Each block is a root of its own, and of a root the weights would stay together until its backward.
            fully_shard(block, mesh=mesh, reshard_after_forward=True)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, in the same memory; any other tensor as it is."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def like(part: torch.Tensor, sharded: torch.Tensor) -> torch.Tensor:
    """``part`` as a tensor that is sharded as ``sharded`` is, whose part it belongs to."""
    if not isinstance(sharded, DTensor) or part.ndim == 0:
        return part
    return DTensor.from_local(
        part, sharded.device_mesh, sharded.placements, run_check=False, shape=sharded.shape, stride=sharded.stride()
    )
