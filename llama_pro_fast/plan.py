"""`llama-pro-fast plan --model M --gpu h100 --groups 8`: what a run will need and cost, from the config alone.

Memory is computed as `memory.py` says, work as `cost.py` does. Speed is a prediction: products and attention at a share
of the card's dense bf16 peak, which is stated, and memory traffic at its data sheet's bandwidth.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llama_pro_fast import devices
from llama_pro_fast.advice import shortfall, why
from llama_pro_fast.block import BlockClass, Recompute
from llama_pro_fast.cli import PROGRAM, ArgumentParser, run_entry_point
from llama_pro_fast.comparison import ways
from llama_pro_fast.config import ExpandConfig, TrainConfig
from llama_pro_fast.console import amount, box, say, table
from llama_pro_fast.cost import kept_bytes, num_parameters, recomputed_flops
from llama_pro_fast.devices import DEVICES, GIB, SHARE, Device
from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion import ExpansionPlan
from llama_pro_fast.families import window_within
from llama_pro_fast.manifest import Manifest
from llama_pro_fast.memory import Job, StepMemory
from llama_pro_fast.planner import (
    Fit,
    Question,
    best_fit,
    expanded_shape,
    fit,
    parse_recompute,
    peak_bytes,
    recompute_text,
)
from llama_pro_fast.pretrained import find_config
from llama_pro_fast.recipe import packaged_recipes, parse
from llama_pro_fast.shapes import SHAPES
from llama_pro_kernels import select_attention_backend


def main(argv: list[str] | None = None) -> int:
    """The verb `plan`; 1 where nothing fits."""
    options = _parser().parse_args(argv)
    question = ask(options)
    found = best_fit(
        question.job,
        question.device,
        batch_size=question.batch_size,
        micro_batch_size=question.micro_batch_size,
        recompute=question.recompute,
        usable=question.usable,
        share=question.share,
    )
    show(question, found)
    if options.json:
        try:
            Path(options.json).write_text(json.dumps(as_dict(question, found), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--json {options.json}: cannot be written ({error.strerror}); give another file"
            ) from error
        say(f"written to {options.json}")
    return 0 if found else 1


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"{PROGRAM} plan",
        description="What a run needs in memory and costs in time, from the model's config alone.",
    )
    parser.add_argument(
        "--model",
        metavar="M",
        help="folder of a checkpoint, hub id or builtin:NAME; these are known without the network: "
        + ", ".join(SHAPES),
    )
    parser.add_argument(
        "--config", metavar="RECIPE", help=f"a recipe of train ({', '.join(packaged_recipes())}); other options win"
    )
    parser.add_argument("--gpu", default="auto", choices=["auto", *DEVICES, "cpu"], help="default: this machine's")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--groups", type=int, metavar="N", help="expand: new blocks after each of N groups")
    where.add_argument("--after", metavar="K,K,...", help="expand: the blocks (from 0) that new ones follow")
    parser.add_argument("--copies", type=int, metavar="P", help="new blocks in each place (default: 1)")
    parser.add_argument("--all", action="store_true", help="every parameter trains")
    parser.add_argument("--seq", type=int, metavar="S", help="tokens per sequence (default: 4096)")
    parser.add_argument("--batch", type=int, metavar="B", help="sequences per optimizer step (default: 16)")
    parser.add_argument("--micro-batch", type=int, metavar="B", help="sequences at a time (default: chosen)")
    parser.add_argument("--recompute", help="none, mlp, attention, block, or a letter a block (default: chosen)")
    parser.add_argument("--tokens", type=float, metavar="T", help="length of the run (default: 1e9)")
    parser.add_argument("--price", type=float, metavar="P", help="of an hour of the device")
    parser.add_argument(
        "--share",
        type=float,
        default=SHARE,
        help=f"of the device's peak that products and attention reach (default: {SHARE:g}, an H200's)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures")
    return parser


def ask(options: Any) -> Question:
    """The question that a command line, or the recipe it names, puts.

    Raises:
        UserError: naming the option and the remedy.
    """
    recipe = parse(["--config", options.config]).config if options.config else None
    model = options.model or (recipe and recipe.model.path)
    if not model:
        raise UserError("--model: say which model, a folder, a hub id, or one of " + ", ".join(SHAPES))
    for name, least in (("seq", 2), ("batch", 1), ("micro_batch", 1), ("copies", 1), ("tokens", 1), ("price", 0)):
        value = getattr(options, name)
        if value is not None and not least <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')}: {value:g} is not a number from {least} up")
    if not 0 < options.share <= 1:
        raise UserError(f"--share: {options.share:g} is not above 0 and at most 1")

    raw, base = find_config(model)
    expand = ExpandConfig(groups=options.groups, after=options.after, copies=options.copies or 1)
    if not expand.wanted and recipe is not None:
        expand = dataclasses.replace(recipe.expand, copies=options.copies or recipe.expand.copies)
    if expand.copies != 1 and not expand.wanted:
        raise UserError("--copies: says how many, not where; give --groups or --after too")
    train_all = options.all or (recipe is not None and recipe.train.parameters == "all")
    manifest = Manifest.from_config(raw)
    if manifest is not None and expand.wanted:
        raise UserError(
            f"--model {model}: is expanded already; leave --groups and --after out to plan the training of its new "
            "blocks, or add a generation with `llama-pro-fast expand` first"
        )
    expansion = ExpansionPlan.from_config(base.num_hidden_layers, expand) if expand.wanted else None
    if expansion is not None:
        config, trained = expanded_shape(base, expansion), expansion.new_indices
    elif manifest is not None or train_all:
        config, trained = base, () if manifest is None else manifest.trained_blocks
    else:
        raise UserError(
            f"--model {model}: nothing in it is new; say where new blocks go, for example --groups "
            f"{max(1, base.num_hidden_layers // 4)}, or --all to train everything"
        )
    train = TrainConfig(memory="auto", batch_size=16) if recipe is None else recipe.train
    seq_len = options.seq or train.seq_len or min(4096, base.max_position_embeddings)
    if seq_len > base.max_position_embeddings:
        raise UserError(f"--seq {seq_len}: the model has {base.max_position_embeddings} positions; give at most that")
    batch_size = options.batch or train.batch_size
    micro_batch_size = options.micro_batch or train.micro_batch_size
    if micro_batch_size and batch_size % micro_batch_size:
        raise UserError(f"--micro-batch: {micro_batch_size} does not divide the batch of {batch_size} sequences")
    device = _device(options.gpu)
    job = job_on(device, config, trained, train, train_all=train_all, seq_len=seq_len)
    text = options.recompute or train.recompute
    try:
        recompute = None if text == "auto" else parse_recompute(text, job.classes)
    except UserError as error:
        raise UserError(f"--{error}") from error
    tokens = options.tokens or train.tokens or (train.steps and train.steps * batch_size * seq_len)
    return Question(
        model=model,
        job=job,
        base=base,
        expansion=expansion,
        device=device,
        usable=device.usable if train.memory == "auto" else int(train.memory * GIB),
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        recompute=recompute,
        tokens=tokens or 1e9,
        price=options.price,
        share=options.share,
    )


def _device(name: str) -> Device:
    if name == "auto":
        return devices.present()
    return devices.cpu() if name == "cpu" else DEVICES[name]


def job_on(
    device: Device, config: Any, trained: tuple[int, ...], train: TrainConfig, *, train_all: bool, seq_len: int
) -> Job:
    """As a run on ``device`` would compute; by default in bf16 with PyTorch's flash attention, on a CPU in float32."""
    name = train.dtype if train.dtype != "auto" else "float32" if device.is_cpu else "bfloat16"
    dtype = getattr(torch, name)
    attention = train.attention
    if attention == "auto" and device.is_cpu:
        attention = select_attention_backend("cpu", dtype, window=window_within(config, seq_len))
    elif attention == "auto":
        attention = "reference" if dtype == torch.float32 else "flash"
    return Job(
        config=config,
        trained_blocks=tuple(trained),
        train_all=train_all,
        seq_len=seq_len,
        dtype=dtype,
        attention=attention,
        triton=not device.is_cpu,
    )


# -- what is said --------------------------------------------------------------------------------------------------


def show(question: Question, found: Fit | None) -> None:
    """The plan, to be read and to be pasted."""
    job, device = question.job, question.device
    trained = range(len(job.specs)) if job.train_all else job.trained_blocks
    new = f" + {len(question.expansion.new_indices)} blocks" if question.expansion else ""
    rows = [
        ("blocks", _strip(job)),
        ("", f"{len(job.specs)}: X trains, o passes the gradient on, . has no backward"),
        (
            "parameters",
            f"{amount(num_parameters(job.config))}, of which {amount(job.num_trained)} train "
            f"({job.num_trained / num_parameters(job.config):.1%}): "
            f"{'all' if job.train_all else 'blocks ' + ', '.join(map(str, trained))}",
        ),
    ]
    if found is None:
        said = shortfall(
            job,
            device,
            batch_size=question.batch_size,
            usable=question.usable,
            base=question.base,
            plan=question.expansion,
            micro_batch_size=question.micro_batch_size,
            recompute=question.recompute,
        )
        box(f"{question.model}{new} on one {device.title}: does not fit", [*rows, ("memory", said)])
    else:
        box(f"{question.model}{new} on one {device.title}", rows + list(_facts(question, found)))
        _show_memory(question, found)
    _show_policies(question)
    _show_ways(question, found)
    say("Memory is computed from the shapes, speed from the share of the peak above; neither is measured.")
    say("LoRA is an estimate, for another trainer with fused norms and SwiGLU.")


def _facts(question: Question, found: Fit) -> Iterator[tuple[str, str]]:
    job, cost, size = question.job, found.cost, found.micro_batch_size
    per_step, count = question.batch_size * job.seq_len, question.batch_size // size
    yield (
        "step",
        f"{question.batch_size} x {job.seq_len} = {per_step:,} tokens, in {count} micro-batch"
        f"{'es' if count > 1 else ''} of {size}",
    )
    yield (
        "chosen",
        why(
            found,
            job,
            question.device,
            batch_size=question.batch_size,
            usable=question.usable,
            micro_batch_size=question.micro_batch_size,
            recompute=question.recompute,
        ),
    )
    yield (
        "memory",
        f"{_figure(found.peak / GIB)} GiB at the fullest, of {question.usable / GIB:.1f} usable on "
        f"{question.device.memory / GIB:.1f}",
    )
    yield (
        "work",
        f"{cost.total / 1e9:.4g} GFLOP a token: forward {cost.forward / 1e9:.4g}, dX {cost.dx / 1e9:.4g}, dW "
        f"{cost.dw / 1e9:.4g}, attention {cost.attention / 1e9:.4g} (causal, backward 2x)",
    )
    yield (
        "disk",
        f"{_figure(12 * job.num_trained / 1e9)} GB a checkpoint; {_figure(2 * num_parameters(job.config) / 1e9)} GB "
        "each the expanded and the exported model, in 16 bits",
    )
    if not question.device.speed_known:
        return
    yield (
        "speed",
        f"{1 / found.seconds:,.0f} tokens/s, should products and attention reach {question.share:.0%} of "
        f"{question.device.flops / 1e12:.0f} TFLOP/s",
    )
    price = "" if question.price is None else f" (an hour costs {question.price:g})"
    yield "length", f"{amount(question.tokens)} tokens: {_length(question, found.seconds)}{price}"


def _length(question: Question, seconds: float) -> str:
    hours = question.tokens * seconds / 3600
    cost = "" if question.price is None else f", cost {hours * question.price:,.0f}"
    return f"{hours:,.1f} h{cost}"


KINDS = {
    "weights": "frozen weights",
    "masters": "masters of the trained weights, float32",
    "shadows": "their bf16 copies for the products",
    "moments": "AdamW's two moments, float32",
    "gradients": "gradients, float32",
    "kept_frozen": "kept for backward by frozen blocks",
    "kept_trained": "kept for backward by trained blocks",
    "logits": "a chunk of logits",
    "transient": "one block's backward, batch, tables",
}
assert tuple(KINDS) == StepMemory.KINDS


def _show_memory(question: Question, found: Fit) -> None:
    memory = found.memory
    rows = [
        (name, f"{getattr(memory, kind) / GIB:.2f}", f"{getattr(memory, kind) / memory.total:.1%}")
        for kind, name in KINDS.items()
        if getattr(memory, kind)
    ]
    rows.append((f"together, in {memory.moment}", f"{memory.total / GIB:.2f}", "100%"))
    table("memory at the fullest moment of a step", ("what", "GiB", "share"), rows)


def _show_policies(question: Question) -> None:
    """What each policy, for all blocks alike, keeps and makes room for."""
    job, device = question.job, question.device
    above = [(spec, kind) for spec, kind in zip(job.specs, job.classes, strict=True) if kind is not BlockClass.PREFIX]
    rows = []
    for policy in Recompute:
        recompute = parse_recompute(policy.value, job.classes)
        kept = sum(kept_bytes(spec, kind, job.dtype, policy) for spec, kind in above) / len(above)
        largest = _largest(question, recompute)
        way = fit(
            job,
            device,
            batch_size=max(question.batch_size, largest),
            micro_batch_size=max(1, largest),
            recompute=recompute,
            share=question.share,
        )
        again = sum(recomputed_flops(spec, policy, job.seq_len) for spec, _ in above)
        rows.append(
            (
                policy.value,
                f"{kept:,.0f}",
                f"{again / way.cost.total:+.1%}",
                _figure(peak_bytes(job, recompute, 1, 2) / GIB),
                f"{largest} x {job.seq_len}" if largest else "none",
                "–" if not (largest and device.speed_known) else f"{1 / way.seconds:,.0f}",
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


def _strip(job: Job) -> str:
    marks = {BlockClass.PREFIX: ".", BlockClass.FROZEN: "o", BlockClass.TRAINED: "X"}
    return "".join(marks[kind] for kind in job.classes)


def as_dict(question: Question, found: Fit | None) -> dict[str, Any]:
    """The figures, for programs; bytes, FLOPs per token, seconds."""
    job, device = question.job, question.device
    plain: dict[str, Any] = {
        "model": question.model,
        "device": device.title,
        "usable_bytes": question.usable,
        "layers": len(job.specs),
        "trained_blocks": [index for index, kind in enumerate(job.classes) if kind is BlockClass.TRAINED],
        "parameters": num_parameters(job.config),
        "trained_parameters": job.num_trained,
        "seq_len": job.seq_len,
        "batch_size": question.batch_size,
        "share_of_peak": question.share,
        "fits": found is not None,
    }
    if found is not None:
        plain |= {
            "micro_batch_size": found.micro_batch_size,
            "recompute": recompute_text(found.recompute, job.first),
            "peak_bytes": found.peak,
            "memory": {kind: getattr(found.memory, kind) for kind in StepMemory.KINDS},
            "moment": found.memory.moment,
            "flops_per_token": dataclasses.asdict(found.cost),
            "tokens_per_second": 1 / found.seconds if device.speed_known else None,
        }
    plain["ways"] = [dataclasses.asdict(way) for way in ways(question, found)]
    return plain


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
