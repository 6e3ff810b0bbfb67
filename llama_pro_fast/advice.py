"""Why a plan is what it is, and what would help where there is none: each in one line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from llama_pro_fast.block import Recompute
from llama_pro_fast.devices import DEVICES, GIB, SHARE, Device
from llama_pro_fast.expansion import ExpansionPlan
from llama_pro_fast.memory import Job, states_bytes
from llama_pro_fast.planner import (
    Fit,
    best_fit,
    divisors,
    expanded_shape,
    fit,
    peak_bytes,
    policies,
    recompute_text,
    upper_half,
)


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
        assert wanted, "something fits, and nothing was asked for"
        return (
            f"{' and '.join(wanted)} needs {_gib(asked.peak)}, and {_gib(usable)} are usable on {device.title}. What "
            f"would fit: micro-batch {free.micro_batch_size} with recompute {recompute_text(free.recompute, job.first)}"
            f", which needs {_gib(free.peak)}; leave both out and they are chosen"
        )
    least = min(peak_bytes(job, rung, 1, batch_size) for rung in policies(job))
    said = (
        f"needs {_gib(least)}, with one sequence of {job.seq_len} tokens at a time and everything recomputed that "
        f"can be, and {_gib(usable)} are usable on {device.title}; weights, masters, moments and gradients alone take "
        f"{_gib(states_bytes(job))}"
    )
    limit = math.ceil(1000 * least / GIB) / 1000
    changes = [f"a limit of {limit:g} GiB, or none of your own"] if least <= device.usable else []
    changes += list(_changes(job, device, usable=usable, base=base, plan=plan))
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
        places, new = sorted(set(after)), len(after)
        copies = new // len(places)

        def fits_at(after: list[int], copies: int) -> bool:
            other = ExpansionPlan.from_after(plan.num_old, after, copies)
            return fits(dataclasses.replace(job, config=expanded_shape(base, other), trained_blocks=other.new_indices))

        upper = upper_half(plan.num_old, new)
        if upper is not None and places[0] < upper[0] and fits_at(upper, 1):
            yield f"the {new} new blocks in the upper half"
        for count in range(len(places) - 1, 0, -1):
            # The highest places: they also have the shortest way back.
            if fits_at(places[-count:], copies):
                yield f"{count * copies} new block{'s' if count * copies > 1 else ''} instead of {new}"
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
    larger = [card for card in DEVICES.values() if card.usable > device.usable and fits(job, card.usable)]
    if larger and not fits(job, device.usable):
        yield f"one {larger[-1].title}"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB ({size / 1e9:.1f} GB)" if size >= GIB else f"{size / 2**20:.0f} MiB"
