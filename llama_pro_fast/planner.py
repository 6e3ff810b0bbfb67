"""How a run should use its device: the micro-batch and what each block recomputes, chosen before anything is loaded.

Of the ways that fit, the one with the least predicted time per token is taken, and of nearly equal ones that with the
smallest micro-batch. Time is products and attention at a share of the device's peak, and memory traffic that comes once
a micro-batch (weights' gradients are added up) or once a step (AdamW). A larger micro-batch spreads the traffic over
more tokens; recomputation buys memory with products, about H FLOP for each byte, so it is the last resort. It is mixed
over the blocks to just fit: cheapest bytes first, and from the lowest block up, for what the lowest blocks keep is
there while all others run backward.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llama_pro_fast.block import BlockClass, Recompute
from llama_pro_fast.cost import StepCost, attention_flops, kept_bytes, num_parameters, recomputed_flops, step_cost
from llama_pro_fast.devices import DEVICES, GIB, SHARE, Device
from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion import ExpansionPlan
from llama_pro_fast.memory import Job, StepMemory, evaluation_memory, states_bytes, step_memory
from llama_pro_kernels import compute_dtype

NEARLY = 0.002
"""Ways whose predicted times differ by less than this share are alike."""

ACCUMULATE = 12
"""Bytes a trained parameter costs in traffic each micro-batch: its gradient and the new one read, the sum written."""
OPTIMIZER = 44
"""… and each step: gradient three times (norm, clipping, AdamW), clipped once, weight and moments both ways, shadow."""

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


def fit(
    job: Job, device: Device, *, batch_size: int, micro_batch_size: int, recompute: Sequence[Recompute], share: float
) -> Fit:
    """What a given way takes, whether it fits or not."""
    accumulating = batch_size > micro_batch_size
    memory = step_memory(job, recompute, micro_batch_size=micro_batch_size, accumulating=accumulating)
    cost = step_cost(job.config, job.trained_blocks, seq_len=job.seq_len, train_all=job.train_all, recompute=recompute)
    # Flash attention's backward is really 2.5 times its forward.
    extra = sum(attention_flops(spec, job.seq_len) for spec in job.specs[job.first :]) / 2
    executed = cost.total + cost.recomputed + extra
    traffic = job.num_trained * (
        (ACCUMULATE / (micro_batch_size * job.seq_len) if accumulating else 0) + OPTIMIZER / (batch_size * job.seq_len)
    )
    return Fit(
        micro_batch_size=micro_batch_size,
        recompute=tuple(recompute),
        memory=memory,
        peak=_peak(job, recompute, micro_batch_size, batch_size),
        cost=cost,
        seconds=executed / (share * device.flops) + traffic / device.bandwidth,
    )


def _peak(job: Job, recompute: Sequence[Recompute], micro_batch_size: int, batch_size: int) -> int:
    """Bytes at the fullest moment of a run, evaluation included."""
    accumulating = batch_size > micro_batch_size
    step = step_memory(job, recompute, micro_batch_size=micro_batch_size, accumulating=accumulating)
    return max(step.total, evaluation_memory(job, micro_batch_size=micro_batch_size))


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
        ladder = [tuple(recompute)] if recompute is not None else policies(job)
        fitting = next((rung for rung in ladder if _peak(job, rung, size, batch_size) <= usable), None)
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


def policies(job: Job) -> Iterator[tuple[Recompute, ...]]:
    """Mixtures of policies over the blocks, from none recomputed to the least memory, one block's change at a time."""
    steps = []
    for index, (spec, kind) in enumerate(zip(job.specs, job.classes, strict=True)):
        if kind is not BlockClass.PREFIX:
            ways = [
                (kept_bytes(spec, kind, job.dtype, policy), recomputed_flops(spec, policy, job.seq_len), policy)
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


# -- the model as it will be ---------------------------------------------------------------------------------------


def expanded_shape(config: Any, plan: ExpansionPlan) -> Any:
    """The config of ``config``'s model expanded by ``plan``, as far as blocks' shapes go."""
    changed = copy.deepcopy(config)
    changed.num_hidden_layers = plan.num_layers
    if getattr(config, "layer_types", None) is not None:
        changed.layer_types = [config.layer_types[source] for source in plan.sources]
    return changed


# -- where nothing fits --------------------------------------------------------------------------------------------


def why(
    found: Fit,
    job: Job,
    device: Device,
    *,
    batch_size: int,
    usable: int,
    micro_batch_size: int | None = None,
    recompute: Sequence[Recompute] | None = None,
) -> str:
    """What was chosen and for what reason, in one line; the arguments are those of :func:`best_fit`."""
    size = found.micro_batch_size
    sequences = f"{size} sequence{'s' if size > 1 else ''} at a time"
    larger = next((n for n in divisors(batch_size) if n > size), None)
    if micro_batch_size is not None:
        sequences += " as asked"
    elif larger is None:
        sequences += ", the whole batch"
    else:
        other = best_fit(
            job, device, batch_size=batch_size, micro_batch_size=larger, recompute=recompute, usable=usable
        )
        if other is None:
            sequences += f" ({larger} do not fit)"
        elif other.cost.recomputed > found.cost.recomputed:
            sequences += f" ({larger} would fit with more recomputed only)"
        else:
            sequences += f" ({larger} would hardly be faster)"
    made_again = f"{recompute_text(found.recompute, job.first)} recomputed"
    if recompute is not None:
        made_again += " as asked"
    elif not found.cost.recomputed:
        made_again = "nothing recomputed: everything fits"
    if found.cost.recomputed:
        made_again += f", {found.cost.recomputed / found.cost.total:.1%} more work"
    return f"{sequences}; {made_again}"


def shortfall(
    job: Job,
    device: Device,
    *,
    batch_size: int,
    usable: int,
    base: Any = None,
    plan: ExpansionPlan | None = None,
    micro_batch_size: int | None = None,
    recompute: Sequence[Recompute] | None = None,
) -> str:
    """Why nothing fits, and the smallest changes that would, in one line.

    Args:
        base, plan: the config before the expansion and the expansion, where the run makes one.
        micro_batch_size, recompute: what was asked for, where it was.
    """
    free = best_fit(job, device, batch_size=batch_size, usable=usable)
    if free is not None:
        asked = fit(
            job,
            device,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size or 1,
            recompute=recompute or list(policies(job))[-1],
            share=SHARE,
        )
        wanted = [f"micro-batch {micro_batch_size}"] if micro_batch_size else []
        wanted += ["the recomputation asked for"] if recompute is not None else []
        return (
            f"{' and '.join(wanted)} needs {_gib(asked.peak)}, and {_gib(usable)} are usable on {device.title}. What "
            f"would fit: micro-batch {free.micro_batch_size} with recompute {recompute_text(free.recompute, job.first)}"
            f", which needs {_gib(free.peak)}; leave both out and they are chosen"
        )
    least = min(_peak(job, rung, 1, batch_size) for rung in policies(job))
    said = (
        f"needs {_gib(least)}, with one sequence of {job.seq_len} tokens at a time and everything recomputed that "
        f"can be, and {_gib(usable)} are usable on {device.title}; weights, masters, moments and gradients alone take "
        f"{_gib(states_bytes(job))}"
    )
    changes = list(_changes(job, device, usable=usable, base=base, plan=plan))
    if changes:
        return f"{said}. What would fit: {'; or '.join(changes)}"
    return f"{said}. No card in the list holds it, and sharding over several is not there yet; give a smaller model"


def _changes(job: Job, device: Device, *, usable: int, base: Any, plan: ExpansionPlan | None) -> Iterator[str]:
    def fits(job: Job, usable: int = usable, batch_size: int = 2) -> bool:
        return best_fit(job, device, batch_size=batch_size, micro_batch_size=1, usable=usable) is not None

    length = job.seq_len // 2
    while length >= 256:
        if fits(dataclasses.replace(job, seq_len=length)):
            yield f"sequences of {length} tokens"
            break
        length //= 2
    if plan is not None:
        after = [index - sum(plan.is_new[:index]) - 1 for index in plan.new_indices]
        places = sorted(set(after))
        for count in range(len(places) - 1, 0, -1):
            # The highest places: they also have the shortest way back.
            fewer = ExpansionPlan.from_after(plan.num_old, places[-count:])
            if fits(dataclasses.replace(job, config=expanded_shape(base, fewer), trained_blocks=fewer.new_indices)):
                yield f"{count} new block{'s' if count > 1 else ''} instead of {len(after)}"
                break
    if job.train_all:
        layers = base.num_hidden_layers if base is not None else job.config.num_hidden_layers
        few = ExpansionPlan.from_groups(layers, min(8, layers))
        new = dataclasses.replace(
            job,
            config=expanded_shape(base if base is not None else job.config, few),
            trained_blocks=few.new_indices,
            train_all=False,
        )
        if fits(new):
            yield f"{min(8, layers)} new blocks in place of all parameters"
    larger = [card for card in DEVICES.values() if card.usable > usable and fits(job, card.usable)]
    if larger:
        yield f"one {larger[-1].title}"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB ({size / 1e9:.1f} GB)" if size >= GIB else f"{size / 2**20:.0f} MiB"


def adapter_parameters(job: Job, rank: int) -> int:
    """Parameters of LoRA adapters of ``rank`` on every matrix of every block."""
    return sum(
        rank * (shape[0] + shape[1])
        for spec in job.specs
        for parts in spec.tensors().values()
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
    tokens, narrow = micro_batch_size * job.seq_len, job.dtype.itemsize
    wide = compute_dtype(job.dtype).itemsize
    adapters = adapter_parameters(job, rank)
    none = (Recompute.NONE,) * len(job.specs)
    # A trained input keeps what each adapter reads: both normed inputs and the SwiGLU product beside the usual.
    inputs = sum(narrow * (2 * spec.hidden_size + spec.intermediate_size) for spec in job.specs)
    cost = step_cost(job.config, range(len(job.specs)), seq_len=job.seq_len, recompute=none)
    weights = sum(2 * elements for elements in (adapters, adapters, adapters))
    states = adapters * (4 * wide) + narrow * num_parameters(job.config)
    full = tokens * (sum(kept_bytes(spec, BlockClass.FROZEN, job.dtype) for spec in job.specs) + inputs)
    light = tokens * sum(kept_bytes(spec, BlockClass.FROZEN, job.dtype, Recompute.BLOCK) for spec in job.specs)
    one = full // len(job.specs)
    recomputed = states + full + one > usable
    block = sum(recomputed_flops(spec, Recompute.BLOCK, job.seq_len) for spec in job.specs) if recomputed else 0.0
    return LoraEstimate(
        parameters=adapters,
        peak=states + (light + one if recomputed else full) + one,
        cost=StepCost(forward=cost.forward, dx=cost.dx, dw=float(weights), attention=cost.attention, recomputed=block),
        recomputed=recomputed,
    )
