"""How a run should use its device: the micro-batch and what each block recomputes, chosen before anything is loaded.

Of the ways that fit, the one with the least predicted time per token is taken, and of nearly equal ones that with the
smallest micro-batch. Time is products and attention at a share of the device's peak, and memory traffic that comes once
a micro-batch (weights' gradients are added up) or once a step (AdamW). A larger micro-batch spreads the traffic over
more tokens; recomputation buys memory with products, about H FLOP for each byte, so it is the last resort. It is mixed
over the blocks to just fit: cheapest bytes first, and from the lowest block up, for what the lowest blocks keep is
there while all others run backward. Few tokens keep little, and then the cheapest bytes are the narrow copies that a
trained block does without when it recomputes everything.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llama_pro_fast.block import BlockClass, Recompute
from llama_pro_fast.cost import (
    StepCost,
    attention_flops,
    kept_bytes,
    matrices,
    recomputed_flops,
    replayed_matrices,
    step_cost,
)
from llama_pro_fast.devices import SHARE, Device
from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion import ExpansionPlan
from llama_pro_fast.memory import (
    Job,
    StepMemory,
    evaluation_memory,
    needs_shadow,
    shadow_bytes,
    states_bytes,
    step_memory,
)
from llama_pro_kernels import compute_dtype

NEARLY = 0.002
"""Ways whose predicted times differ by less than this share are alike."""

ACCUMULATE = 12
"""Bytes a trained parameter costs in traffic each micro-batch: its gradient and the new one read, the sum written."""
OPTIMIZER = 42
"""… and each step: gradient read twice (norm, AdamW) and written clipped, weight and moments both ways, shadow."""

HOST_FORWARD, HOST_BACKWARD = 1.2e-3, 1.5e-3
"""Seconds the host takes to start the kernels of a block, however few tokens there are: on the host of an H200, by the
17 points of 1,024 tokens in bench/results/scaling-nvidia-h200.json (docs/LOG.md)."""

LETTERS = {Recompute.NONE: ".", Recompute.MLP: "m", Recompute.ATTENTION: "a", Recompute.BLOCK: "b"}
"""How a strip of blocks shows what each recomputes."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A way to run a step.

    Attributes:
        micro_batch_size: sequences per forward and backward.
        recompute: of each block.
        memory: of the step at its fullest.
        peak: bytes at the fullest moment of a run, evaluation included.
        cost: FLOPs per token.
        seconds: predicted, per token.
    """

    micro_batch_size: int
    recompute: tuple[Recompute, ...]
    memory: StepMemory
    peak: int
    cost: StepCost
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be planned.

    Attributes:
        model: as it was named.
        job: the model as it will be trained.
        base, expansion: before the expansion and how, where the run makes one.
        device: what it runs on.
        usable: bytes of it.
        batch_size: sequences per step.
        micro_batch_size, recompute: None where they are to be chosen.
        tokens: length of the run.
        price: of an hour of the device, in the reader's currency; None leaves costs out.
        share: of the device's peak that is assumed to be reached.
    """

    model: str
    job: Job
    base: Any
    expansion: ExpansionPlan | None
    device: Device
    usable: int
    batch_size: int
    micro_batch_size: int | None
    recompute: tuple[Recompute, ...] | None
    tokens: float
    price: float | None
    share: float


def fit(
    job: Job, device: Device, *, batch_size: int, micro_batch_size: int, recompute: Sequence[Recompute], share: float
) -> Fit:
    """What a given way takes, whether it fits or not."""
    accumulating = batch_size > micro_batch_size
    memory = step_memory(job, recompute, micro_batch_size=micro_batch_size, accumulating=accumulating)
    evaluation = evaluation_memory(job, recompute, micro_batch_size=micro_batch_size)
    cost = step_cost(job.config, job.trained_blocks, seq_len=job.seq_len, train_all=job.train_all, recompute=recompute)
    executed = cost.total + cost.recomputed + flash_backward_flops(job)
    tokens = micro_batch_size * job.seq_len
    traffic = job.num_trained * ((ACCUMULATE / tokens if accumulating else 0) + OPTIMIZER / (batch_size * job.seq_len))
    traffic += narrowing_bytes(job, recompute) / tokens
    forwards = len(job.specs) + sum(policy is not Recompute.NONE for policy in recompute)
    starting = 0 if device.is_cpu else HOST_FORWARD * forwards + HOST_BACKWARD * (len(job.specs) - job.first)
    return Fit(
        micro_batch_size=micro_batch_size,
        recompute=tuple(recompute),
        memory=memory,
        peak=max(memory.total, evaluation),
        cost=cost,
        seconds=max(starting / tokens, executed / (share * device.flops) + traffic / device.bandwidth),
    )


def narrowing_bytes(job: Job, recompute: Sequence[Recompute]) -> int:
    """Traffic of a micro-batch for masters without a kept copy: read and written narrow in forward, again for what is
    replayed, and for dX."""
    return (job.dtype.itemsize + compute_dtype(job.dtype).itemsize) * sum(
        2 * sum(matrices(spec).values()) + replayed_matrices(spec, policy)
        for spec, kind, policy in zip(job.specs, job.classes, recompute, strict=True)
        if needs_shadow(kind, job.dtype) and policy is Recompute.BLOCK
    )


def flash_backward_flops(job: Job) -> float:
    """FLOPs per token that flash attention's backward makes beyond twice its forward: it is really 2.5 times."""
    return sum(attention_flops(spec, job.seq_len) for spec in job.specs[job.first :]) / 2


def peak_bytes(job: Job, recompute: Sequence[Recompute], micro_batch_size: int, batch_size: int) -> int:
    """At the fullest moment of a run, evaluation included."""
    accumulating = batch_size > micro_batch_size
    step = step_memory(job, recompute, micro_batch_size=micro_batch_size, accumulating=accumulating)
    return max(step.total, evaluation_memory(job, recompute, micro_batch_size=micro_batch_size))


def best_fit(
    job: Job,
    device: Device,
    *,
    batch_size: int,
    micro_batch_size: int | None = None,
    recompute: Sequence[Recompute] | None = None,
    usable: int | None = None,
    share: float = SHARE,
) -> Fit | None:
    """The way to run that fits and is predicted to be fastest; None where none fits.

    Args:
        batch_size: sequences per optimizer step.
        micro_batch_size, recompute: where given, these are kept and only the rest is chosen.
        usable: bytes, in place of the device's own.
    """
    usable = device.usable if usable is None else usable
    if states_bytes(job) > usable:
        return None
    sizes = [micro_batch_size] if micro_batch_size else divisors(batch_size)
    found: list[Fit] = []
    too_large = False
    for size in sizes:
        if too_large and size < sizes[-1]:
            continue
        way = functools.partial(fit, job, device, batch_size=batch_size, micro_batch_size=size, share=share)
        # Work rises along the ladder, so the first that fits is the cheapest. Memory need not fall all along it: what a
        # block no longer keeps it makes again in its own backward.
        ladder = [tuple(recompute)] if recompute is not None else policies(job, size)
        fitting = next((rung for rung in ladder if peak_bytes(job, rung, size, batch_size) <= usable), None)
        if fitting is not None:
            found.append(way(recompute=fitting))
        elif size < sizes[-1]:
            too_large = True  # so is every larger one, but for the whole batch: there no gradients wait for the next
    if not found:
        return None
    least = min(way.seconds for way in found)
    return next(way for way in found if way.seconds <= least * (1 + NEARLY))


def divisors(number: int) -> list[int]:
    """All of them, rising."""
    lower = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*lower, *(number // n for n in lower)})


def policies(job: Job, micro_batch_size: int = 1) -> Iterator[tuple[Recompute, ...]]:
    """Mixtures of policies over the blocks, from none recomputed to the least memory, one block's change at a time."""
    steps, tokens = [], micro_batch_size * job.seq_len
    for index, (spec, kind) in enumerate(zip(job.specs, job.classes, strict=True)):
        if kind is not BlockClass.PREFIX:
            ways = [
                (
                    tokens * kept_bytes(spec, kind, job.dtype, policy) + shadow_bytes(spec, kind, job.dtype, policy),
                    tokens * recomputed_flops(spec, policy, job.seq_len),
                    policy,
                )
                for policy in Recompute
            ]
            steps += [(rate, index, policy) for rate, policy in _cheapest_bytes(ways)]
    mixture = [Recompute.NONE] * len(job.specs)
    yield tuple(mixture)
    for _, index, policy in sorted(steps, key=lambda step: step[:2]):
        mixture[index] = policy
        yield tuple(mixture)


def _cheapest_bytes(ways: list[tuple[int, float, Recompute]]) -> Iterator[tuple[float, Recompute]]:
    """From ``(bytes kept, FLOPs, policy)``: what to change to next and its FLOPs for each byte saved, rising.

    The lower convex hull: a policy that another beats for the bytes it saves is passed over.
    """
    kept, flops, _ = ways[0]
    while better := [way for way in ways if way[0] < kept]:
        # Of equal rates the smallest change, so that the mixture fits closely.
        rates = [(round((way[1] - flops) / (kept - way[0]), 3), -way[0]) for way in better]
        rate, least = min(rates)
        kept, flops, policy = better[rates.index((rate, least))]
        yield rate, policy


# -- what is written in a recipe -----------------------------------------------------------------------------------


def recompute_text(recompute: Sequence[Recompute], first: int) -> str:
    """A policy's name where all blocks with a backward share it, else a strip of :data:`LETTERS`, a letter a block."""
    above = set(recompute[first:])
    return above.pop().value if len(above) == 1 else "".join(LETTERS[policy] for policy in recompute)


def parse_recompute(text: str, classes: Sequence[BlockClass]) -> tuple[Recompute, ...]:
    """The inverse of :func:`recompute_text`.

    Raises:
        UserError: neither a policy's name nor a letter for each block.
    """
    names = {policy.value: policy for policy in Recompute}
    if text in names:
        return tuple(Recompute.NONE if kind is BlockClass.PREFIX else names[text] for kind in classes)
    by_letter = {letter: policy for policy, letter in LETTERS.items()}
    if len(text) != len(classes) or not set(text) <= set(by_letter):
        raise UserError(
            f"recompute {text}: give auto, {', '.join(names)}, or a letter for each of the {len(classes)} blocks: "
            + ", ".join(f"{letter} {policy.value}" for letter, policy in by_letter.items())
        )
    return tuple(by_letter[letter] for letter in text)


def upper_half(layers: int, count: int) -> list[int] | None:
    """The blocks that ``count`` new ones follow, one each, evenly over the upper half; None where they are too many."""
    half = layers - layers // 2
    if count > half:
        return None
    return [layers // 2 + (place + 1) * half // count - 1 for place in range(count)]


# -- the model as it will be ---------------------------------------------------------------------------------------


def expanded_shape(config: Any, plan: ExpansionPlan) -> Any:
    """The config of ``config``'s model expanded by ``plan``, as far as blocks' shapes go."""
    changed = copy.deepcopy(config)
    changed.num_hidden_layers = plan.num_layers
    if getattr(config, "layer_types", None) is not None:
        changed.layer_types = [config.layer_types[source] for source in plan.sources]
    return changed
