"""How a run should use its device: the micro-batch and what each block recomputes, chosen before anything is loaded.

Of the ways that fit, the one with the least predicted time per token is taken, and of nearly equal ones that with the
smallest micro-batch. Time is products and attention at a share of the device's peak, and memory traffic that comes once
a micro-batch (weights' gradients are added up) or once a step (AdamW). A larger micro-batch spreads the traffic over
more tokens; recomputation buys memory with products, about H FLOP for each byte, so it is the last resort. It is mixed
over the blocks to just fit: cheapest bytes first, and from the lowest block up, for what the lowest blocks keep is
there while all others run backward. Few tokens keep little, and then the cheapest bytes are the low-precision copies
that a trained block does without when it recomputes everything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llama_pro_fast.model.policy import BlockClass, Recompute
from llama_pro_fast.planning.cost import (
    StepCost,
    attention_flops,
    kept_bytes,
    matrices,
    muon_flops,
    recomputed_flops,
    recomputed_matrices,
    step_cost,
    transposed_matrices,
)
from llama_pro_fast.planning.devices import IN_A_MACHINE, NETWORK, SHARE
from llama_pro_fast.planning.job import Job, Question
from llama_pro_fast.planning.memory import (
    StepMemory,
    casts,
    evaluation_memory,
    low_precision_bytes,
    states_bytes,
    step_memory,
)
from llama_pro_kernels import accumulation_dtype

NEARLY = 0.002
"""Ways whose predicted times differ by less than this share are alike."""

ACCUMULATE = 4
"""Bytes a trained parameter costs in traffic each micro-batch of several: the product reads what it adds to."""
OPTIMIZER = 34
"""… and each step: gradient read twice (norm, AdamW); weight and moments read and written, the copy written."""

EIGHT_BITS = 1.9
"""How many times as fast a product is in e4m3 as in bf16: alone, on an H200 (docs/LOG.md, which does not say how sums
were made)."""

HOST_FORWARD, HOST_BACKWARD = 1.2e-3, 1.5e-3
"""Seconds the host takes to start the kernels of a block, however few tokens there are: on the host of an H200, by the
17 points of 1,024 tokens in bench/results/scaling-nvidia-h200.json (docs/LOG.md)."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A way to run a step.

    Attributes:
        micro_batch_size: sequences per forward and backward.
        recompute: of each block.
        memory: of the step at its fullest.
        peak: bytes at the fullest of a run, evaluation included.
        cost: FLOPs per token.
        seconds: predicted, per token, of all ranks together; it only orders ways where the device's own speed is not
            known.
        tokens_per_second: predicted; None where the device's own speed is not known.
    """

    micro_batch_size: int
    recompute: tuple[Recompute, ...]
    memory: StepMemory
    peak: int
    cost: StepCost
    seconds: float
    tokens_per_second: float | None


def fit(question: Question, *, micro_batch_size: int, recompute: Sequence[Recompute]) -> Fit:
    """What a given way takes, whether it fits or not."""
    job, device, batch_size = question.job, question.device, question.batch_size
    accumulating = batch_size > micro_batch_size
    memory = step_memory(job, recompute, micro_batch_size=micro_batch_size, accumulating=accumulating)
    evaluation = evaluation_memory(job, recompute, micro_batch_size=micro_batch_size)
    cost = step_cost(job.config, job.trained, seq_len=job.seq_len, recompute=recompute, taught=job.taught)
    executed = cost.total + cost.recomputed + flash_backward_flops(job)
    if job.muon:
        executed += len(job.trained.blocks) * muon_flops(job.specs[0]) / (batch_size * job.seq_len)
    if not device.is_cpu:
        executed -= eight_bits_flops(job) * (1 - 1 / EIGHT_BITS)
    tokens = micro_batch_size * job.seq_len
    traffic = job.num_trained * ((ACCUMULATE / tokens if accumulating else 0) + OPTIMIZER / (batch_size * job.seq_len))
    traffic += cast_bytes(job, recompute) / tokens
    layers = len(job.specs)
    forwards = layers + sum(policy is not Recompute.NONE for policy in recompute)
    starting = 0 if device.is_cpu else HOST_FORWARD * forwards + HOST_BACKWARD * (layers - job.trained.first)
    seconds = max(starting / tokens, executed / (SHARE * device.flops) + traffic / device.bandwidth)
    seconds = (seconds + sending_seconds(question, micro_batch_size) / (batch_size * job.seq_len)) / question.ranks
    return Fit(
        micro_batch_size=micro_batch_size,
        recompute=tuple(recompute),
        memory=memory,
        peak=max(memory.total, evaluation),
        cost=cost,
        seconds=seconds,
        tokens_per_second=round(1 / seconds, 1) if device.speed_known else None,
    )


def sent_bytes(question: Question, micro_batch_size: int) -> int:
    """What a rank sends in a step, by a ring. Whole weights' float32 gradients are added up once, there and back. Of a
    sharded block each micro-batch has the float32 weights gathered twice, and the gradients sent one way."""
    job, ranks = question.job, question.ranks
    in_blocks = job.num_in_blocks if job.shards > 1 else 0
    numbers = 2 * (job.num_trained - in_blocks) + 3 * in_blocks * (question.batch_size // micro_batch_size)
    return 4 * numbers * (ranks - 1) // ranks


def sending_seconds(question: Question, micro_batch_size: int) -> float:
    """Of a step, for that; nothing else runs beside it."""
    rate = question.device.link if question.ranks <= IN_A_MACHINE else min(question.device.link, NETWORK)
    return sent_bytes(question, micro_batch_size) / rate


def cast_bytes(job: Job, recompute: Sequence[Recompute]) -> int:
    """Traffic of a micro-batch for masters without a kept copy: read and written cast in forward, again for what is
    recomputed, and for dX."""
    return (job.dtype.itemsize + accumulation_dtype(job.dtype).itemsize) * sum(
        2 * sum(matrices(spec).values()) + recomputed_matrices(spec, policy)
        for spec, kind, policy in zip(job.specs, job.trained.classes, recompute, strict=True)
        if casts(job, kind, policy)
    )


def flash_backward_flops(job: Job) -> float:
    """FLOPs per token that flash attention's backward makes beyond twice its forward: it is really 2.5 times."""
    return sum(attention_flops(spec, job.seq_len) for spec in job.specs[job.trained.first :]) / 2


def eight_bits_flops(job: Job) -> float:
    """FLOPs per token, of those of dX, that are made in e4m3."""
    kinds = zip(job.specs, job.trained.classes, strict=True) if job.eight_bits else ()
    return 2.0 * sum(math.prod(shape) for each in kinds for shape in transposed_matrices(*each))


def peak_bytes(job: Job, recompute: Sequence[Recompute], micro_batch_size: int, batch_size: int) -> int:
    """Bytes at the fullest of a run, evaluation included."""
    accumulating = batch_size > micro_batch_size
    step = step_memory(job, recompute, micro_batch_size=micro_batch_size, accumulating=accumulating)
    return max(step.total, evaluation_memory(job, recompute, micro_batch_size=micro_batch_size))


def best_fit(question: Question) -> Fit | None:
    """The way to run that fits and is predicted to be fastest; None where none fits."""
    job, batch_size, usable = question.job, question.batch_size, question.usable
    if states_bytes(job) > usable:
        return None
    sizes = [question.micro_batch_size] if question.micro_batch_size else divisors(batch_size)
    found: list[Fit] = []
    too_large = False
    for size in sizes:
        if too_large and size < sizes[-1]:
            continue
        # Work rises along the ladder, so the first that fits is the cheapest. Memory need not fall all along it: what a
        # block no longer keeps it recomputes in its own backward.
        ladder = policies(job, size) if question.recompute is None else [question.recompute]
        fitting = next((rung for rung in ladder if peak_bytes(job, rung, size, batch_size) <= usable), None)
        if fitting is not None:
            found.append(fit(question, micro_batch_size=size, recompute=fitting))
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
    for index, (spec, kind) in enumerate(zip(job.specs, job.trained.classes, strict=True)):
        if kind is not BlockClass.PREFIX:
            ways = [
                (
                    tokens * kept_bytes(spec, kind, job.dtype, policy) + low_precision_bytes(job, spec, kind, policy),
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


def upper_half(layers: int, count: int) -> list[int] | None:
    """The blocks that ``count`` new ones follow, one each, evenly over the upper half; None where they are too many."""
    half = layers - layers // 2
    if count > half:
        return None
    return [layers // 2 + (place + 1) * half // count - 1 for place in range(count)]
