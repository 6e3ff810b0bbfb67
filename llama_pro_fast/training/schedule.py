"""The learning rate of each step."""

from __future__ import annotations

import dataclasses
import math

from llama_pro_fast.config import OptimConfig
from llama_pro_fast.errors import UserError


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of optimizer step ``step`` (from 0) of ``steps``.

    Linear warm-up over ``warmup_steps``, reaching the peak at its last step; then `cosine`: half a cosine towards
    ``min_lr_ratio``; `wsd`: constant, then linear over the last ``decay_steps`` (Hu et al., arXiv 2404.06395). Both
    would reach the floor one step after the last, so that no step is spent at a rate of 0.
    """
    floor = config.min_lr_ratio
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps + 1) / (steps - config.warmup_steps + 1)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        share = min(1.0, (steps - step) / (config.decay_steps + 1))
    return config.lr * (floor + (1 - floor) * share)


def lower_rate(config: OptimConfig) -> float:
    """A rate to advise where the one in use was too high for the model to bear."""
    return min(config.lr / 10, 1e-4)


def settle_schedule(optim: OptimConfig, steps: int) -> OptimConfig:
    """With the lengths of warm-up and decay filled in for a run of ``steps``.

    Raises:
        UserError: they are longer than the run.
    """
    warmup = round(0.06 * steps) if optim.warmup_steps is None else optim.warmup_steps
    if warmup > steps:
        raise UserError(
            f"--optim.warmup_steps {warmup}: longer than the run of {steps} steps; make the run longer or, before its "
            "start, the warm-up shorter"
        )
    decay = min(round(0.2 * steps), steps - warmup) if optim.decay_steps is None else optim.decay_steps
    if optim.schedule == "wsd" and warmup + decay > steps:
        raise UserError(
            f"--optim.decay_steps {decay}: with {warmup} of warm-up longer than the run of {steps} steps; shorten it"
        )
    return dataclasses.replace(optim, warmup_steps=warmup, decay_steps=decay)
