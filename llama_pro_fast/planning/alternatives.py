"""What else could be trained instead: other places for the new blocks, full fine-tuning, LoRA; in memory and work."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.hf.families import hf_parts
from llama_pro_fast.model.policy import BlockClass, Recompute
from llama_pro_fast.model.trained import Trained
from llama_pro_fast.planning.cost import StepCost, kept_bytes, num_parameters, recomputed_flops, step_cost
from llama_pro_fast.planning.devices import SHARE
from llama_pro_fast.planning.job import Job, Question, parse_recompute, recompute_text
from llama_pro_fast.planning.search import Fit, best_fit, divisors, fit, flash_backward_flops, upper_half
from llama_pro_kernels import accumulation_dtype

LORA_RANK = 16


@dataclass(frozen=True, kw_only=True)
class Way:
    """One line of the comparison: other places for the new blocks, or another method."""

    name: str
    trained: int
    gflop: float
    peak: int
    fits: bool
    how: str
    seconds: float


def ways(question: Question, found: Fit | None) -> Iterator[Way]:
    """The plan itself (``found``), other places for as many new blocks, full fine-tuning of the base, and LoRA."""
    job, base, expansion = question.job, question.base, question.expansion
    yield _way(question, "this plan", job, found)
    if expansion is not None and not job.trained.everything:
        layers, count = expansion.num_old, len(expansion.new_indices)
        others = {}
        if count <= layers:
            others["interleaved"] = ExpansionPlan.from_groups(layers, count)
        if (upper := upper_half(layers, count)) is not None:
            others["in the upper half"] = ExpansionPlan.from_after(layers, upper)
        for name, other in others.items():
            if other != expansion:
                yield _way(question, f"{count} {name}", job.expanded(base, other))
    trained = Trained.all_of(base.num_hidden_layers)
    whole = dataclasses.replace(job, config=base, trained=trained, taught=0.0, eight_bits=False)
    if not job.trained.everything or expansion is not None:
        yield _way(question, "full fine-tuning", whole)
    yield _lora(question, whole)


def _way(question: Question, name: str, job: Job, found: Fit | None = None) -> Way:
    question = dataclasses.replace(question, job=job)
    found = found or best_fit(dataclasses.replace(question, micro_batch_size=None, recompute=None))
    fits = found is not None
    if found is None:
        found = fit(question, micro_batch_size=1, recompute=parse_recompute("block", job.trained.classes))
    how = recompute_text(found.recompute, job.trained.first)
    return Way(
        name=name,
        trained=job.num_trained,
        gflop=(found.cost.total + found.cost.recomputed) / 1e9,
        peak=found.peak,
        fits=fits,
        how=f"{found.micro_batch_size}, {how if how in {policy.value for policy in Recompute} else 'mixed'}",
        seconds=found.seconds,
    )


def _lora(question: Question, whole: Job) -> Way:
    usable = question.usable
    for size in reversed(divisors(question.batch_size)):
        estimate = lora_estimate(whole, rank=LORA_RANK, micro_batch_size=size, usable=usable)
        if estimate.peak <= usable and (not estimate.recomputed or size == 1):
            break
    cost = estimate.cost
    return Way(
        name=f"LoRA, rank {LORA_RANK}",
        trained=estimate.parameters,
        gflop=(cost.total + cost.recomputed) / 1e9,
        peak=estimate.peak,
        fits=estimate.peak <= usable,
        how=f"{size}, {'block' if estimate.recomputed else 'none'}",
        seconds=(cost.total + cost.recomputed + flash_backward_flops(whole))
        / (SHARE * question.device.flops * question.ranks),
    )


def adapter_parameters(job: Job, rank: int) -> int:
    """Parameters of LoRA adapters of ``rank`` on every matrix of every block."""
    return sum(
        rank * (shape[0] + shape[1])
        for spec in job.specs
        for parts in hf_parts(spec).values()
        for _, shape in parts
        if len(shape) == 2
    )


@dataclass(frozen=True, kw_only=True)
class LoraEstimate:
    """LoRA on every matrix of the base, by the shapes, for a trainer that fuses norms and SwiGLU and is not ours.

    Attributes:
        peak: bytes.
        cost: FLOPs per token; the adapters' products are counted as dW.
        recomputed: whether blocks had to be checkpointed whole.
    """

    parameters: int
    peak: int
    cost: StepCost
    recomputed: bool


def lora_estimate(job: Job, *, rank: int, micro_batch_size: int, usable: int) -> LoraEstimate:
    """What LoRA on ``job``'s model takes; ``job`` trains every block for the sake of the backward's length."""
    tokens, element = micro_batch_size * job.seq_len, job.dtype.itemsize
    acc = accumulation_dtype(job.dtype).itemsize
    adapters = adapter_parameters(job, rank)
    none = (Recompute.NONE,) * len(job.specs)
    # A trained input keeps what each adapter reads: both normed inputs and the SwiGLU product beside the usual.
    inputs = sum(element * (2 * spec.hidden_size + spec.intermediate_size) for spec in job.specs)
    blocks = Trained(len(job.specs), tuple(range(len(job.specs))))
    cost = step_cost(job.config, blocks, seq_len=job.seq_len, recompute=none)
    states = adapters * (4 * acc) + element * num_parameters(job.config)
    full = tokens * (sum(kept_bytes(spec, BlockClass.FROZEN, job.dtype) for spec in job.specs) + inputs)
    light = tokens * sum(kept_bytes(spec, BlockClass.FROZEN, job.dtype, Recompute.BLOCK) for spec in job.specs)
    one = full // len(job.specs)
    recomputed = states + full + one > usable
    block = sum(recomputed_flops(spec, Recompute.BLOCK, job.seq_len) for spec in job.specs) if recomputed else 0.0
    return LoraEstimate(
        parameters=adapters,
        peak=states + (light + one if recomputed else full) + one,
        cost=StepCost(forward=cost.forward, dx=cost.dx, dw=6.0 * adapters, attention=cost.attention, recomputed=block),
        recomputed=recomputed,
    )
