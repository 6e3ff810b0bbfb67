"""A killed and resumed run against an uninterrupted one, bit for bit: ``python bench/train_resume.py --device auto``.

    PYTHONPATH=.:kernels python bench/train_resume.py

A small random base with a small tokenizer is made on the spot. One run expands it and trains the new blocks to the end
on the standard library's code. A second run of the same recipe is ended with SIGKILL at an arbitrary moment after its
first checkpoints, and resumed in a new process. Then every logged training and evaluation figure that is not a time or
a memory must be equal, step for step, and every exported tensor byte for byte. Exit code 0 if so, else 1, with the
first differences.

Both run `llama_pro_fast.train.run` under `train.deterministic` (without it a GPU's flash attention may reorder the sums
of its backward), in child processes, from a `RunConfig`: neither `datasets` nor `jsonargparse` is needed.

Not shown by this: resuming on another device, thread count or version (not promised), a crash of the whole machine (a
killed process leaves what it wrote in the page cache), or a kill in the very middle of writing a checkpoint, unless it
happens to fall there.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llama_pro_fast.checkpoint import complete_checkpoints, read_info
from llama_pro_fast.config import DataConfig, EvalConfig, ExpandConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from llama_pro_fast.data.stdlib import code_documents, stdlib_files
from llama_pro_fast.recipe import load_config
from llama_pro_fast.report import read_metrics
from llama_pro_fast.train import run

VOCABULARY = 1024
TOKENIZER_FILES = 40
NOT_REPEATABLE = {"tokens_per_second", "peak_memory_gib", "seconds"}
"""Keys of metrics.jsonl that tell of this execution and not of the training."""


def make_base(folder: Path) -> None:
    """A random Llama of four blocks with a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = (document.text for document in code_documents(stdlib_files("code")[:TOKENIZER_FILES]))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    # Heads of 64, so that every GPU backend of attention can serve.
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def recipe(work: Path, name: str, options: argparse.Namespace) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(work / "base")),
        expand=ExpandConfig(groups=2),
        data=DataConfig(domain="stdlib:code", general="stdlib:prose", cache=str(work / "tokens")),
        optim=OptimConfig(lr=1e-3),
        train=TrainConfig(
            steps=options.steps,
            seq_len=128,
            batch_size=4,
            micro_batch_size=2,
            device=options.device,
            deterministic=True,
            log_every=1,
            checkpoint_every=options.checkpoint_every,
            keep_checkpoints=3,
        ),
        eval=EvalConfig(every=options.steps // 2, tokens=2048),
        output=str(work / name),
    )


def start(options: argparse.Namespace, work: Path, name: str, *, resume: bool = False) -> subprocess.Popen:
    """A run in a process of its own, its output in a file."""
    command = [sys.executable, sys.argv[0], "--device", options.device, "--steps", str(options.steps)]
    command += ["--checkpoint-every", str(options.checkpoint_every), "--work", str(work), "--run", name]
    with open(work / f"{name}.log", "a", encoding="utf-8") as log:
        return subprocess.Popen([*command, *["--resume"][: int(resume)]], stdout=log, stderr=subprocess.STDOUT)


def finish(child: subprocess.Popen, work: Path, name: str) -> None:
    if code := child.wait():
        log = (work / f"{name}.log").read_text(encoding="utf-8").splitlines()
        raise SystemExit("\n".join([*log[-25:], f"the run {name} ended with code {code}"]))


def kill_in_the_middle(child: subprocess.Popen, work: Path, name: str, after: int) -> int:
    """SIGKILL as soon as the log shows a step beyond the checkpoint of step ``after``; returns the last step logged."""
    output = work / name
    while child.poll() is None:
        newest = complete_checkpoints(output)[-1:]  # an older one may be deleted while we look
        saved = read_info(newest[0]).progress.step if newest else -1
        logged = max((row["step"] for row in read_metrics(output)), default=-1)
        # Work beyond a checkpoint must be lost, so that resuming has something to redo.
        if logged > saved >= after:
            child.kill()
            child.wait()
            return max(row["step"] for row in read_metrics(output))
        time.sleep(0.002)
    finish(child, work, name)
    raise SystemExit(f"the run {name} ended before it could be killed; give more --steps")


def compare_metrics(one: Path, other: Path) -> tuple[int, list[str]]:
    """How many rows were compared, and what differs."""

    def rows(run_: Path) -> dict[tuple, dict[str, Any]]:
        return {
            (row["kind"], row["step"], row.get("source")): {k: v for k, v in row.items() if k not in NOT_REPEATABLE}
            for row in read_metrics(run_)
        }

    left, right = rows(one), rows(other)
    keys = sorted({*left, *right}, key=lambda key: (key[1], str(key)))
    return len(keys), [
        f"metrics, {key}: {left.get(key)} / {right.get(key)}" for key in keys if left.get(key) != right.get(key)
    ]


def compare_exports(one: Path, other: Path) -> tuple[int, list[str]]:
    """How many tensors were compared, and what differs."""

    def tensors(folder: Path) -> dict[str, torch.Tensor]:
        found = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return found

    left, right = tensors(one), tensors(other)
    differences = []
    for name in sorted({*left, *right}):
        a, b = left.get(name), right.get(name)
        if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
            differences.append(f"export, {name}: not in both, or of another shape or dtype")
        # As bytes: equal NaN are equal here, and 0 and -0 are not.
        elif not torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
            share = (a != b).double().mean().item()
            differences.append(f"export, {name}: {share:.2%} of the numbers, at most {(a - b).abs().max().item():.3g}")
    return len({*left, *right}), differences


def trial(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Both runs and the comparison."""
    make_base(work / "base")
    started = time.monotonic()
    finish(start(options, work, "whole"), work, "whole")
    print(f"uninterrupted: {options.steps} steps, {time.monotonic() - started:.0f} s", flush=True)
    killed_at = kill_in_the_middle(start(options, work, "killed"), work, "killed", options.steps // 2)
    resumed_at = read_info(complete_checkpoints(work / "killed")[-1]).progress.step
    print(f"killed after step {killed_at}; its last complete checkpoint is of step {resumed_at}", flush=True)
    finish(start(options, work, "killed", resume=True), work, "killed")
    rows, differences = compare_metrics(work / "whole", work / "killed")
    count, more = compare_exports(work / "whole" / "export", work / "killed" / "export")
    if not count or rows < options.steps:
        more.append(f"only {rows} rows and {count} tensors found to compare")
    losses = [row["loss"] for row in read_metrics(work / "whole") if row["kind"] == "train"]
    stored = load_config(work / "whole").train
    return {
        "steps": options.steps,
        "checkpoint_every": options.checkpoint_every,
        "killed_after_step": killed_at,
        "resumed_at_step": resumed_at,
        "dtype": stored.dtype,
        "attention": stored.attention,
        "threads": stored.threads,
        "first_loss": losses[0],
        "loss": losses[-1],
        "metric_rows": rows,
        "exported_tensors": count,
        "differences": [*differences, *more],
        "bit_equal": not differences and not more,
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--checkpoint-every", type=int, default=8, help="steps; several must fit into half the run")
    parser.add_argument("--out", type=Path, help="default: bench/results/train-resume-DEVICE.json")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # of a child: where the trial's folders are
    parser.add_argument("--run", help=argparse.SUPPRESS)  # of a child: which run it is
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.run:
        output = options.work / options.run
        config = load_config(output) if options.resume else recipe(options.work, options.run, options)
        run(config, resume=options.resume)
        return 0

    if not 1 <= options.checkpoint_every <= options.steps // 2:
        parser.error("--checkpoint-every: at least one checkpoint must fit into half of --steps")
    work = Path(tempfile.mkdtemp(prefix="train-resume-"))
    try:
        result = trial(options, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    provenance = {"commit": common.commit(), "versions": common.versions(), "command": common.command()}
    row = {"what": "resume equals uninterrupted", "device": common.device_name(options.device), **result, **provenance}
    out = options.out or common.RESULTS / f"train-resume-{common.slug(row['device'])}.json"
    common.write_json(out, [row])
    shown = ("device", "dtype", "attention", "steps", "killed_after_step", "resumed_at_step", "first_loss", "loss")
    shown += ("metric_rows", "exported_tensors", "bit_equal", "seconds")
    print(common.table(("resume", "value"), [(key, str(row[key])) for key in shown]))
    for line in result["differences"][:20]:
        print(line)
    print(f"written to {out}")
    return 0 if result["bit_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
