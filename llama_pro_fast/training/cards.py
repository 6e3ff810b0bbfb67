"""What a run says of itself before its first step, and after its last."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import torch

from llama_pro_fast.config import Settled
from llama_pro_fast.console import amount, box, duration, say, table
from llama_pro_fast.data.corpus import Corpus
from llama_pro_fast.model.decoder import DTYPES
from llama_pro_fast.model.trained import LEGEND, Trained
from llama_pro_fast.planning.cost import num_parameters, num_trained_parameters
from llama_pro_fast.planning.devices import GIB
from llama_pro_fast.planning.explain import eight_bits
from llama_pro_fast.planning.search import Fit
from llama_pro_fast.reporting import dial
from llama_pro_fast.runs.run_folder import resume_command, shown
from llama_pro_kernels import implementation_name


def show_start(config: Settled, model: Any, trained: Trained, corpus: Corpus, planned: Fit) -> None:
    """The box before the first step.

    Args:
        model: transformers' config of the model that trains.
    """
    train = config.train
    parameters, count = num_parameters(model), num_trained_parameters(model, trained)
    general = ", ".join(
        f"{text.source.name}{' (built in, no --data.general given)' if config.data.general is None else ''}"
        for text in corpus.held_out
        if text.source.role == "general"
    )
    if not trained.skip_for_base and not trained.skip_for_first_base:
        meter = f"off: {trained.base_gone}"
    elif trained.base_gone:
        meter = f"{general}; against the first base only: {trained.base_gone}"
    elif trained.first_base_gone and trained.older_blocks:
        meter = f"{general}; against the last base only: {trained.first_base_gone}"
    else:
        meter = general + ("; against the last base and the first" if trained.older_blocks else "")
    if train.parameters == "new_blocks" and (gone := trained.base_gone or trained.first_base_gone):
        what = "is off" if meter.startswith("off") else "leaves that base out"
        named = ", ".join(map(str, trained.blocks))
        say(f"{config.model.path}: {gone}; the forgetting meter {what}, and blocks {named} train, as the manifest says")
    ranks, cards, shared = "", "", ""
    if train.ranks > 1:
        ranks, cards = f"on each of {train.ranks} ranks ", f"{train.ranks} x "
        shared = "; what trains is " + ("on every rank" if train.sharding == "replicate" else "sharded over the ranks")
    device = cards + (
        torch.cuda.get_device_name() if train.device == "cuda" else f"cpu, {_several(train.threads, 'thread')}"
    )
    micro_batches = train.batch_size // train.ranks // train.micro_batch_size
    process = " for tensors, the process comes on top" if train.device == "cpu" else ""
    in_eight_bits = []
    if train.fp8 == "backward":
        in_eight_bits = [("eight bits", eight_bits(model, trained, imitated=train.device == "cpu"))]
    kernels = implementation_name(train.device, DTYPES[train.dtype])
    box(
        f"llama-pro-fast · {Path(config.output).name}",
        [
            ("model", f"{config.model.path}  ({model.architectures[0]}, {trained.num_layers} blocks)"),
            ("blocks", f"{trained.strip}  ({LEGEND})"),
            ("trained", f"{amount(count)} of {amount(parameters)} parameters ({count / parameters:.1%})"),
            ("cost", f"{planned.cost.total / 1e9:.4g} GFLOP per token (causal attention, its backward 2x)"),
            ("text", corpus.description()),
            ("packing", corpus.packing()),
            ("step", f"{train.batch_size} x {train.seq_len} = {train.batch_size * train.seq_len:,} tokens, "
                     f"{ranks}{_several(micro_batches, 'micro-batch')} of {train.micro_batch_size}; "
                     f"{_several(train.steps, 'step')}, "
                     f"{amount(train.steps * train.batch_size * train.seq_len)} tokens"),
            ("memory", f"{_gib(planned.peak / GIB)} planned{process}; recomputed in backward: {train.recompute}"
                       f"{shared}"),
            ("rate", f"{config.optim.lr:g}, {config.optim.schedule}, {_several(config.optim.warmup_steps, 'step')} of "
                     "warm-up"),
            ("device", f"{device}; {train.dtype}, attention {train.attention}, kernels {kernels}"),
            *in_eight_bits,
            ("forgetting", meter),
        ],
    )  # fmt: skip


def _several(count: int, noun: str) -> str:
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun}{'es' if noun.endswith('ch') else 's'}"


def show_end(summary: dict[str, Any], output: Path, exported: Path) -> None:
    """The card after the last step: what came of it, where it lies, what to type next."""

    def figure(value: float | None, digits: int = 4) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    results = summary["results"]
    nats = []
    for result in results:
        before, after = (result["before"] or {}).get("loss"), result["after"]["loss"]
        change = "–" if before is None else f"{after - before:+.4f}"
        nats.append((result["source"], result["role"], figure(before), figure(after), change))
    table("loss on held-out text, nats per token", ("text", "role", "before", "after", "change"), nats, words=2)
    bits = []
    for result in results:
        values = [(result[when] or {}).get("bits_per_byte") for when in ("before", "after")]
        values += [result.get(name) for name in ("unigram_bits_per_byte", "gzip_bits_per_byte")]
        bits.append((result["source"], result["role"], *(figure(value, 3) for value in values)))
    columns = ("text", "role", "before", "after", "unigram", "gzip -9")
    table("the same in bits per byte, beside two simple compressors", columns, bits, words=2)

    if summary["dial"]:
        columns, lines = dial.lines(summary["dial"])
        table(f"the dial, {dial.title(summary['dial'])}", columns, lines, words=2)

    share = summary["trained_parameters"] / summary["parameters"]
    speed, planned = summary["median_tokens_per_second"], summary["planned_tokens_per_second"]
    aimed = "" if planned is None else f" (planned {planned:,.0f})"
    of = " of the process" if summary["device"] == "cpu" else ""
    tensors = " for its tensors" if summary["device"] == "cpu" else ""
    facts = [
        ("trained", f"{amount(summary['trained_parameters'])} of {amount(summary['parameters'])} parameters "
                    f"({share:.1%}), blocks {', '.join(map(str, summary['trained_blocks']))}"),
        ("speed", f"{'–' if speed is None else format(speed, ',.0f')} tokens/s{aimed}; "
                  f"{duration(summary['seconds_of_steps'])} of training steps"),
        ("memory", f"peak {summary['peak_memory_gib']:.2f} GiB{of}; planned "
                   f"{_gib(summary['planned_memory_gib'])}{tensors}"),
        ("export", summary["export_check"]["said"]),
        *([("dial", summary["dial_said"])] if summary["dial"] and summary["dial_said"] else []),
        ("model", f"{shown(exported)}  (an ordinary Hugging Face folder)"),
        ("report", f"{shown(output / 'report')}/  report.html, summary.md, loss.png, "
                   f"{'dial.png, ' if summary['dial'] else ''}summary.json"),
    ]  # fmt: skip
    box(f"{shown(output)}: done", facts)
    pipeline = f"""
from transformers import pipeline
generate = pipeline("text-generation", {json.dumps(shown(exported))})
print(generate("import os", max_new_tokens=60, do_sample=False)[0]["generated_text"])"""
    own = "llama-pro-fast train --model.path MODEL --expand.groups 8 --data.domain mine.jsonl \\"
    evaluate = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={shown(exported)}", "--tasks", "hellaswag"]
    say("\nnext")
    say('# your model (a folder or hub id of a Llama-family checkpoint) and text (one {"text": ...} a line)')
    say(f"{own}\n    --optim.lr 5e-5 --output runs/mine")
    say("# before that: will it fit, and what will it cost")
    say("llama-pro-fast plan --model.path MODEL --expand.groups 8 --gpu h100")
    say("# generate")
    say(shlex.join(["python", "-c", pipeline]))
    say("# evaluate on any text; on tasks, after pip install lm_eval[hf]")
    say(shlex.join(["llama-pro-fast", "evaluate", shown(output), "--data.general", "stdlib:prose"]))
    say(shlex.join(evaluate))
    say("# look at the curves")
    say(shlex.join(["tensorboard", "--logdir", shown(output / "tensorboard")]))
    say("# go on with a run after Ctrl-C or a crash")
    say(resume_command(output))


def _gib(amount: float) -> str:
    return f"{amount:.2f} GiB"
