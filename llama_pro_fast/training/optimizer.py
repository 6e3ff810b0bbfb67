"""AdamW or Muon, the learning-rate schedules, and a step that lets no NaN into a weight.

AdamW's step never asks the device anything: a loss or gradient norm that is not finite is turned into a flag on the
device, `left_out`, for which the op leaves weights, moments and its count of steps untouched, and the trainer reads the
flag when it logs. Muon has no such flag: there the host waits for it, once a step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from llama_pro_fast.config import OptimConfig
from llama_pro_fast.errors import UserError
from llama_pro_fast.model.layers import low_precision_copies, refresh_low_precision_copies
from llama_pro_fast.ranks import ALONE, Ranks
from llama_pro_fast.training.muon import Muon
from llama_pro_fast.training.schedule import learning_rate, lower_rate
from llama_pro_fast.training.sharding import like, local
from llama_pro_kernels import adamw_


class Optimizer:
    """AdamW over the trained parameters of a model; or Muon over its blocks' matrices and AdamW over the others.

    Args:
        model: its low-precision copies follow each step.
        parameters: name -> parameter; the order is part of the state.
        config: resolved (rate and warm-up filled in).
        steps: length of the run, for the schedule.
        ranks: over which sharded parameters are.

    Of a sharded parameter each rank updates its own part, an ordinary tensor; norms are over all parts.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        config: OptimConfig,
        steps: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model = model
        self.parameters = dict(parameters)
        self.config = config
        self.steps = steps
        self.ranks = ranks
        self.parts = {name: nn.Parameter(local(p)) if isinstance(p, DTensor) else p for name, p in parameters.items()}
        matrices = {name: p for name, p in self.parameters.items() if p.ndim == 2 and name.startswith("blocks.")}
        self.muon = Muon(model, matrices, config) if config.name == "muon" else None
        self.moments = {  # of AdamW, by the parameter's name
            name: {
                "step": torch.zeros((), dtype=torch.float32, device=part.device),
                "exp_avg": torch.zeros_like(part, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(part, requires_grad=False),
            }
            for name, part in self.parts.items()
            if self.muon is None or name not in matrices
        }
        self._copies = low_precision_copies(model)
        device = next(iter(self.parts.values())).device
        self.left_out = torch.zeros((), device=device)
        """1 where the last step was left out, else 0; a device scalar."""

    def step(self, index: int, loss: torch.Tensor | None = None) -> torch.Tensor:
        """Clip, update, refresh the low-precision copies, drop the gradients.

        Args:
            index: the step's number from 0.
            loss: of the step, a device scalar that must be finite too.

        Returns:
            The gradient norm before clipping, a device scalar. Where it or the loss is not finite the step is left out.
        """
        norm = self._norm()
        # By which gradients are divided as they are read; clipped on their own, all would be read once more.
        self.divisor = ((norm.float() + 1e-6) / self.config.clip).clamp(min=1.0)
        finite = torch.isfinite(self.divisor)
        self.left_out = (~(finite if loss is None else finite & torch.isfinite(loss))).float()
        rate = learning_rate(self.config, index, self.steps)
        for decayed in (True, False):
            self._adamw([name for name in self.moments if self.decays(name) is decayed], rate, decayed)
        if self.muon is not None and not self.left_out:
            self.muon.step(self.divisor, rate)
            refresh_low_precision_copies(self.model)
        self.drop_gradients()
        return norm

    def decays(self, name: str) -> bool:
        """Whether a parameter is drawn to 0: a matrix, but for the input embeddings."""
        return self.parts[name].ndim == 2 and not name.startswith("embed_tokens")

    def _adamw(self, names: list[str], rate: float, decayed: bool) -> None:
        for name in names:
            if self.parts[name].grad is None:
                raise RuntimeError(f"{name} should train, and has had no gradient in this step")
        adamw_(
            [self.parts[name] for name in names],
            [self.parts[name].grad for name in names],
            *([self.moments[name][key] for name in names] for key in ("exp_avg", "exp_avg_sq", "step")),
            [self._copies.get(self.parameters[name]) for name in names],
            lr=rate,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            eps=self.config.eps,
            weight_decay=self.config.weight_decay if decayed else 0.0,
            divisor=self.divisor,
            left_out=self.left_out,
        )

    def whole_gradients(self) -> list[torch.Tensor]:
        """Of all parameters that are not sharded and have one, in their order."""
        return [p.grad for p in self.parameters.values() if p.grad is not None and not isinstance(p, DTensor)]

    def _norm(self) -> torch.Tensor:
        """Of all gradients, a device scalar."""
        norm = nn.utils.get_total_norm(self.whole_gradients(), foreach=True)
        parts = []
        for name, parameter in self.parameters.items():
            if isinstance(parameter, DTensor) and parameter.grad is not None:
                self.parts[name].grad = local(parameter.grad)
                parts.append(self.parts[name].grad)
        if not parts:
            return norm
        square = nn.utils.get_total_norm(parts, foreach=True) ** 2
        self.ranks.add([square])
        return (norm.to(square) ** 2 + square).sqrt()

    def drop_gradients(self) -> None:
        """Forget a step that was begun."""
        for parameter in (*self.parameters.values(), *self.parts.values()):
            parameter.grad = None

    def check_finite(self) -> None:
        """To be called before the weights are saved; waits for the device.

        Raises:
            UserError: a weight is not a finite number.
        """
        finite = torch.stack([parameter.isfinite().all() for parameter in self.parts.values()])
        if not finite.all():
            name = next(name for name, fine in zip(self.parts, finite.tolist(), strict=True) if not fine)
            raise UserError(
                f"weight {name} is no longer finite, and was not saved: the rate {self.config.lr:g} is too high; go on "
                f"from the last checkpoint, or where there is none from the start, with --resume --optim.lr "
                f"{lower_rate(self.config):g}"
            )

    def check_learning(self) -> bool:
        """Whether two steps have counted; by then every matrix that trains has had a gradient, on every rank its part.
        Waits for the device.

        Raises:
            RuntimeError: one has had none.
        """
        if any(moments["step"] < 2 for moments in self.moments.values()):
            return False
        for name, part in self.parts.items():
            in_muon = self.muon is not None and name in self.muon.momentum
            moment = self.muon.momentum[name] if in_muon else self.moments[name]["exp_avg"]
            if part.ndim == 2 and moment.numel() and not moment.any():
                raise RuntimeError(f"{name} should train, and has had no gradient in two steps")
        return True

    def restored(self) -> None:
        """To be called when the parameters were read from a checkpoint: the low-precision copies follow."""
        refresh_low_precision_copies(self.model)

    def state(self) -> dict[str, torch.Tensor]:
        """Every moment and step count by the parameter's name: ``name.exp_avg`` or ``name.momentum`` and so on (what a
        checkpoint holds). A new run can read a checkpoint into it in place."""
        flat = {}
        for name, parameter in self.parameters.items():
            if name in self.moments:
                flat |= {f"{name}.{key}": like(value, parameter) for key, value in self.moments[name].items()}
            else:
                flat[f"{name}.momentum"] = self.muon.momentum[name]
        return flat
