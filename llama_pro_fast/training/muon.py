"""`torch.optim.Muon` over the matrices of decoder blocks.

What a block stacks in one parameter is orthogonalised each for itself: q, k and v, gate and up. For this PyTorch's
optimizer gets views of the rows, of weights, gradients and momentum alike.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from llama_pro_fast.config import OptimConfig
from llama_pro_fast.hf.families import hf_parts
from llama_pro_fast.model.decoder import Decoder


class Muon:
    """Muon over weight matrices; its updates have the root mean square of AdamW's.

    Args:
        matrices: name -> parameter ``[out, in]`` of ``model``'s blocks.

    Attributes:
        momentum: name -> momentum, in the parameter's shape and dtype.
    """

    def __init__(self, model: Decoder, matrices: Mapping[str, nn.Parameter], config: OptimConfig) -> None:
        self.matrices = dict(matrices)
        self.momentum = {name: torch.zeros_like(matrix) for name, matrix in self.matrices.items()}
        self._views: list[tuple[nn.Parameter, nn.Parameter, slice]] = []
        states = {}
        for name, matrix in self.matrices.items():
            _, index, rest = name.split(".", 2)
            begin = 0
            for _, (rows, _) in hf_parts(model.blocks[int(index)].spec)[rest]:
                part = slice(begin, begin + rows)
                view = nn.Parameter(matrix.detach()[part])
                states[view] = {"momentum_buffer": self.momentum[name][part]}
                self._views.append((view, matrix, part))
                begin += rows
        self.optimizer = torch.optim.Muon(
            [view for view, _, _ in self._views],
            lr=config.lr,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self.optimizer.state.update(states)

    def step(self, divisor: torch.Tensor, rate: float) -> None:
        """Update the matrices by their gradients, which are divided by ``divisor`` first."""
        for matrix in self.matrices.values():
            matrix.grad.div_(divisor)
        for view, matrix, part in self._views:
            view.grad = matrix.grad[part]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
