"""Why a plan is what it is, and what would help where there is none: each in one line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.hf.families import block_spec
from llama_pro_fast.model.policy import BlockClass
from llama_pro_fast.model.trained import Trained
from llama_pro_fast.planning.devices import DEVICES, GIB
from llama_pro_fast.planning.job import Job, Question, recompute_text
from llama_pro_fast.planning.memory import states_bytes
from llama_pro_fast.planning.search import Fit, best_fit, divisors, fit, peak_bytes, policies, upper_half
from llama_pro_kernels.linear import E4M3_MULTIPLE, fits_e4m3


def why(question: Question, found: Fit) -> str:
    """What was chosen and for what reason, in one line."""
    size = found.micro_batch_size
    sequences = f"{size} sequence{'s' if size > 1 else ''} at a time"
    larger = next((n for n in divisors(question.batch_size) if n > size), None)
    if question.micro_batch_size is not None:
        sequences += " as asked"
    elif larger is None:
        sequences += ", the whole batch" if question.ranks == 1 else ", all that a rank has of a step"
    else:
        other = best_fit(dataclasses.replace(question, micro_batch_size=larger))
        if other is None:
            sequences += f" ({larger} do not fit)"
        elif other.cost.recomputed > found.cost.recomputed:
            sequences += f" ({larger} would fit with more recomputed only)"
        else:
            sequences += f" ({larger} would hardly be faster)"
    recomputed = f"{recompute_text(found.recompute, question.job.trained.first)} recomputed"
    if question.recompute is not None:
        recomputed += " as asked"
    elif not found.cost.recomputed:
        recomputed = "nothing recomputed: everything fits"
    if found.cost.recomputed:
        recomputed += f", {found.cost.recomputed / found.cost.total:.1%} more work"
    return f"{sequences}; {recomputed}"


def eight_bits(model: Any, trained: Trained, *, imitated: bool) -> str:
    """Which products of backward are in eight bits, and which matrices' sides do not allow it.

    Args:
        model: transformers' config.
        imitated: the device is a CPU.
    """
    shapes = {n.removesuffix(".weight"): s for n, s in block_spec(model, 0).shapes().items() if len(s) == 2}
    left = [f"{name} {list(shape)}" for name, shape in shapes.items() if not fits_e4m3(shape)]
    but = f", but for {', '.join(left)}, whose sides are no multiples of {E4M3_MULTIPLE}" if left else ""
    on_cpu = "; on a CPU imitated, which gains nothing" if imitated else ""
    count = trained.classes.count(BlockClass.FROZEN)
    blocks = "the frozen block" if count == 1 else f"the {count} frozen blocks"
    return f"dX of {blocks} with a backward{but}{on_cpu}"


def shortfall(question: Question) -> str:
    """Why nothing fits, and the smallest changes that would, in one line."""
    job, device, usable = question.job, question.device, question.usable
    free = best_fit(dataclasses.replace(question, micro_batch_size=None, recompute=None))
    if free is not None:
        asked = fit(
            question,
            micro_batch_size=question.micro_batch_size or 1,
            recompute=question.recompute or list(policies(job))[-1],
        )
        wanted = [f"micro-batch {question.micro_batch_size}"] if question.micro_batch_size else []
        wanted += ["the recomputation asked for"] if question.recompute is not None else []
        assert wanted, "something fits, and nothing was asked for"
        recompute = recompute_text(free.recompute, job.trained.first)
        return (
            f"{' and '.join(wanted)} needs {_gib(asked.peak)}, and {_gib(usable)} are usable on {device.title}. "
            f"What would fit: micro-batch {free.micro_batch_size} with recompute {recompute}, which needs "
            f"{_gib(free.peak)}; leave both out and they are chosen"
        )
    least = min(peak_bytes(job, rung, 1, question.batch_size) for rung in policies(job))
    said = (
        f"needs {_gib(least)}, with one sequence of {job.seq_len} tokens at a time and everything recomputed that "
        f"can be, and {_gib(usable)} are usable on {device.title}; weights, masters, moments and gradients alone take "
        f"{_gib(states_bytes(job))}"
    )
    limit = math.ceil(1000 * least / GIB) / 1000
    changes = [f"a limit of {limit:g} GiB, or none of your own"] if least <= device.usable else []
    changes += list(_changes(question))
    if changes:
        return f"{said}. What would fit: {'; or '.join(changes)}"
    return f"{said}. No card in the list holds it, and what is frozen stands on every card; give a smaller model"


def _changes(question: Question) -> Iterator[str]:
    job, base, plan = question.job, question.base, question.expansion

    def fits(job: Job, usable: int = question.usable) -> bool:
        smallest = Question(job=job, device=question.device, usable=usable, batch_size=2, micro_batch_size=1)
        return best_fit(smallest) is not None

    if job.eight_bits and fits(dataclasses.replace(job, eight_bits=False)):
        yield "--train.fp8 none, without a second copy of frozen weights"
    length = job.seq_len // 2
    while length >= 256:
        if fits(dataclasses.replace(job, seq_len=length)):
            yield f"sequences of {length} tokens"
            break
        length //= 2
    if plan is not None:
        after = [index - sum(plan.is_new[:index]) - 1 for index in plan.new_indices]
        places, new = sorted(set(after)), len(after)
        copies = new // len(places)

        def fits_at(after: list[int], copies: int) -> bool:
            other = ExpansionPlan.from_after(plan.num_old, after, copies)
            return fits(job.expanded(base, other, everything=job.trained.everything))

        upper = upper_half(plan.num_old, new)
        if upper is not None and places[0] < upper[0] and fits_at(upper, 1):
            yield f"the {new} new blocks in the upper half"
        for count in range(len(places) - 1, 0, -1):
            # The highest places: they also have the shortest way back.
            if fits_at(places[-count:], copies):
                yield f"{count * copies} new block{'s' if count * copies > 1 else ''} instead of {new}"
                break
    if job.trained.everything:
        model = base if plan is not None else job.config
        few = ExpansionPlan.from_groups(model.num_hidden_layers, min(8, model.num_hidden_layers))
        if fits(job.expanded(model, few)):
            yield f"{len(few.new_indices)} new blocks in place of all parameters"
    for ranks in sorted({2, 4, 8, question.ranks} - {1}) if job.shards == 1 and not job.muon else ():
        if ranks >= question.ranks and fits(dataclasses.replace(job, shards=ranks)):
            yield f"{ranks} such cards that share what trains (torchrun, --train.sharding trained)"
            break
    able = [card for card in DEVICES.values() if card.eight_bits or not job.eight_bits]
    larger = [card for card in able if card.usable > question.device.usable and fits(job, card.usable)]
    if larger and not fits(job, question.device.usable):
        yield f"one {larger[-1].title}"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB ({size / 1e9:.1f} GB)" if size >= GIB else f"{size / 2**20:.0f} MiB"
