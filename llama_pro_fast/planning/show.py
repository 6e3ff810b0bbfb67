"""A plan, to be read: what fits and why, where memory goes, what else could be done.

Speed is a prediction: products and attention at a share of the card's dense bf16 peak, which is stated, and memory
traffic at its data sheet's bandwidth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from llama_pro_fast.console import amount, box, say, table
from llama_pro_fast.model.policy import BlockClass, Recompute
from llama_pro_fast.model.trained import LEGEND
from llama_pro_fast.planning.alternatives import ways
from llama_pro_fast.planning.cost import kept_bytes, num_parameters, recomputed_flops
from llama_pro_fast.planning.devices import GIB, SHARE
from llama_pro_fast.planning.explain import eight_bits, shortfall, why
from llama_pro_fast.planning.job import Question, parse_recompute, recompute_text
from llama_pro_fast.planning.memory import StepMemory
from llama_pro_fast.planning.search import Fit, eight_bits_flops, fit, peak_bytes, sending_seconds, sent_bytes


def show(question: Question, found: Fit | None) -> None:
    """The plan, to be read and to be pasted."""
    job, device = question.job, question.device
    trained, parameters = job.trained, num_parameters(job.config)
    new = f" + {len(question.expansion.new_indices)} blocks" if question.expansion else ""
    cards = f"{'one' if question.ranks == 1 else f'{question.ranks} x'} {device.title}"
    which = "all" if trained.everything else f"blocks {', '.join(map(str, trained.blocks))}"
    rows = [
        ("blocks", trained.strip),
        ("", f"{trained.num_layers}: {LEGEND}"),
        (
            "parameters",
            f"{amount(parameters)}, of which {amount(job.num_trained)} train ({job.num_trained / parameters:.1%}): "
            f"{which}",
        ),
        ("assumed", f"{question.assumed}; a run finds out and plans anew"),
    ]
    if found is None:
        title = f"{question.model}{new} on {cards}: does not fit"
        box(title, [*rows, ("memory", shortfall(question))])
    else:
        box(f"{question.model}{new} on {cards}", rows + list(_facts(question, found)))
        _show_memory(found)
    _show_policies(question)
    _show_ways(question, found)
    how = ", speed from the share of the peak above; neither is" if device.speed_known else "; it is not"
    say(f"Memory is computed from the shapes{how} measured.")
    if not device.speed_known:
        say("How long it would take is said for a card: --gpu h100.")
    say("LoRA is an estimate, for another trainer with fused norms and SwiGLU.")


def _facts(question: Question, found: Fit) -> Iterator[tuple[str, str]]:
    job, cost, size = question.job, found.cost, found.micro_batch_size
    stored = (getattr(job.config, "dtype", None) or torch.bfloat16).itemsize
    sequences, count = question.batch_size * question.ranks, question.batch_size // size
    each = "" if question.ranks == 1 else f"on each of {question.ranks} ranks "
    yield (
        "step",
        f"{sequences} x {job.seq_len} = {sequences * job.seq_len:,} tokens, {each}in {count} micro-batch"
        f"{'es' if count > 1 else ''} of {size}",
    )
    if question.ranks > 1:
        sent, seconds = sent_bytes(question, size), sending_seconds(question, size)
        how = (
            "all weights on each; once a step each sends"
            if job.shards == 1
            else ("trained blocks sharded, frozen weights on each; in a step each sends")
        )
        what = "gradients" if job.shards == 1 else "weights and gradients"
        share = seconds / (found.seconds * sequences * job.seq_len)
        yield (
            "ranks",
            f"{how} {_figure(sent / 1e9)} GB of {what}, "
            f"{seconds * 1000:,.0f} ms{f' ({share:.1%} of it)' if question.device.speed_known else ''}",
        )
    yield "chosen", why(question, found)
    yield (
        "memory",
        f"{_figure(found.peak / GIB)} GiB at the fullest, of {question.usable / GIB:.1f} usable on "
        f"{question.device.memory / GIB:.1f}",
    )
    in_eight_bits = f" ({eight_bits_flops(job) / 1e9:.4g} in eight bits)" if job.eight_bits else ""
    yield (
        "work",
        f"{cost.total / 1e9:.4g} GFLOP a token: forward {cost.forward / 1e9:.4g}, dX {cost.dx / 1e9:.4g}"
        f"{in_eight_bits}, dW {cost.dw / 1e9:.4g}, attention {cost.attention / 1e9:.4g} (causal, backward 2x)",
    )
    if job.eight_bits:
        yield "eight bits", eight_bits(job.config, job.trained, imitated=question.device.is_cpu)
    yield (
        "disk",
        f"{_figure(job.checkpoint_bytes / 1e9)} GB a checkpoint; {_figure(stored * num_parameters(job.config) / 1e9)} "
        f"GB each the expanded and the exported model, in {8 * stored} bits",
    )
    if found.tokens_per_second is None:
        return
    yield (
        "speed",
        f"{found.tokens_per_second:,.0f} tokens/s, should products and attention reach {SHARE:.0%} of "
        f"{question.device.flops / 1e12:.0f} TFLOP/s",
    )
    hour = "an hour" if question.ranks == 1 else "an hour of one"
    price = "" if question.price is None else f" ({hour} costs {question.price:g})"
    yield "length", f"{amount(question.tokens)} tokens: {_length(question, found.seconds)}{price}"


def _length(question: Question, seconds: float) -> str:
    hours = question.tokens * seconds / 3600
    cost = "" if question.price is None else f", cost {hours * question.price * question.ranks:,.0f}"
    return f"{hours:,.1f} h{cost}"


KINDS = {
    "weights": "frozen weights",
    "transposed": "their transposes in eight bits, for backward",
    "masters": "master weights of what trains, float32",
    "low_precision": "their low-precision copies for the products",
    "moments": "the optimizer's moments, float32",
    "gradients": "gradients, float32",
    "kept_frozen": "kept for backward by frozen blocks",
    "kept_trained": "kept for backward by trained blocks",
    "logits": "a chunk of logits",
    "transient": "one block's backward, batch, tables",
}
assert tuple(KINDS) == StepMemory.KINDS


def _show_memory(found: Fit) -> None:
    memory = found.memory
    rows = [
        (name, f"{getattr(memory, kind) / GIB:.2f}", f"{getattr(memory, kind) / memory.total:.1%}")
        for kind, name in KINDS.items()
        if getattr(memory, kind)
    ]
    rows.append((f"together, in {memory.phase}", f"{memory.total / GIB:.2f}", "100%"))
    table("memory in the fullest phase of a step", ("what", "GiB", "share"), rows)


def _show_policies(question: Question) -> None:
    """What each policy, for all blocks alike, keeps and makes room for."""
    job = question.job
    above = [
        (spec, kind) for spec, kind in zip(job.specs, job.trained.classes, strict=True) if kind is not BlockClass.PREFIX
    ]
    rows = []
    for policy in Recompute:
        recompute = parse_recompute(policy.value, job.trained.classes)
        kept = sum(kept_bytes(spec, kind, job.dtype, policy) for spec, kind in above) / len(above)
        largest = _largest(question, recompute)
        size = max(1, largest)
        batch = dataclasses.replace(question, batch_size=max(question.batch_size, size))
        way = fit(batch, micro_batch_size=size, recompute=recompute)
        more = sum(recomputed_flops(spec, policy, job.seq_len) for spec, _ in above)
        rows.append(
            (
                policy.value,
                f"{kept:,.0f}",
                f"{more / way.cost.total:+.1%}",
                _figure(peak_bytes(job, recompute, 1, 2) / GIB),
                f"{largest} x {job.seq_len}" if largest else "none",
                f"{way.tokens_per_second:,.0f}" if largest and way.tokens_per_second else "–",
            )
        )
    columns = ("recomputed", "bytes a token", "work", "GiB for 1", "most at a time", "tokens/s")
    table("if all blocks recompute alike: kept in a block, peak with one sequence, room", columns, rows)


def _largest(question: Question, recompute: tuple[Recompute, ...]) -> int:
    """Sequences in the largest micro-batch that fits, 0 for none."""

    def fits(size: int) -> bool:
        return peak_bytes(question.job, recompute, size, 2 * size) <= question.usable

    size = 1
    while size < 4096 and fits(size):
        size *= 2
    low, high = size // 2, size
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _show_ways(question: Question, found: Fit | None) -> None:
    rows = []
    for way in ways(question, found):
        length = _length(question, way.seconds) if way.fits and question.device.speed_known else "–"
        how = way.how if way.fits else "too large"
        rows.append((way.name, amount(way.trained), _figure(way.gflop), _figure(way.peak / GIB), how, length))
    columns = ("way", "trained", "GFLOP", "GiB", "at a time", f"{amount(question.tokens)} tokens")
    others = "other places for the new blocks, and other methods on the base" if question.expansion else "other methods"
    table(others, columns, rows)


def _figure(value: float) -> str:
    """A tenth for what is large, three digits for what is small."""
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def as_dict(question: Question, found: Fit | None) -> dict[str, Any]:
    """The figures, for programs; bytes, FLOPs per token, seconds."""
    job, device = question.job, question.device
    plain: dict[str, Any] = {
        "model": question.model,
        "device": device.title,
        "usable_bytes": question.usable,
        "layers": len(job.specs),
        "trained_blocks": list(job.trained.blocks),
        "parameters": num_parameters(job.config),
        "trained_parameters": job.num_trained,
        "seq_len": job.seq_len,
        "batch_size": question.batch_size * question.ranks,
        "ranks": question.ranks,
        "sharded": job.shards > 1,
        "share_of_peak": SHARE,
        "fits": found is not None,
    }
    if found is not None:
        plain |= {
            "micro_batch_size": found.micro_batch_size,
            "recompute": recompute_text(found.recompute, job.trained.first),
            "peak_bytes": found.peak,
            "sent_bytes": sent_bytes(question, found.micro_batch_size),
            "memory": {kind: getattr(found.memory, kind) for kind in StepMemory.KINDS},
            "phase": found.memory.phase,
            "flops_per_token": dataclasses.asdict(found.cost),
            "tokens_per_second": found.tokens_per_second,
        }
    plain["ways"] = [dataclasses.asdict(way) for way in ways(question, found)]
    return plain
