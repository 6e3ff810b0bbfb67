"""What trains, sharded over the ranks by PyTorch's `fully_shard`: each new block's weights, gradients and moments.

Frozen weights stay whole on every rank: nothing of them is ever sent. A block's weights are put together in float32 for
its forward and again for its backward, and cast there; embedding, final norm and head, where these train, stay whole.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, share_comm_ctx
from torch.distributed.tensor import DTensor

from llama_pro_fast.model.block import Block
from llama_pro_fast.model.decoder import Decoder
from llama_pro_fast.model.policy import BlockClass
from llama_pro_fast.ranks import Ranks


def shard(block: Block, ranks: Ranks) -> None:
    """Shard a block that trains; what of it requires a gradient is settled by now. Any other is left as it is."""
    if block.block_class is not BlockClass.TRAINED:
        return
    for module in block.modules():
        if getattr(module, "low_precision", None) is not None:
            module.low_precision = None
    assert all(parameter.dtype == torch.float32 for parameter in block.parameters()), "a master is float32"
    mesh = init_device_mesh(next(block.parameters()).device.type, (ranks.count,))
    # Each block is a root of its own, and a root's weights would stay together until its backward.
    fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # The loss is a mean over the whole step already: gradients are summed. (Their mean over three ranks of a loss three
    # times as large is rounded elsewhere.)
    block.set_gradient_divide_factor(1.0)
    block.set_force_sum_reduction_for_comms(True)


def share_buffers(model: Decoder) -> None:
    """Let all sharded blocks send through the same buffers and streams. As roots they would each have their own, in
    which a block's gradients, sent long ago, stay until the whole backward is done."""
    share_comm_ctx([block for block in model.blocks if isinstance(block, FSDPModule)])


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
