"""A killed and resumed run against an uninterrupted one, bit for bit.

    PYTHONPATH=.:kernels python bench/train_resume.py

One run expands a small random base and trains the new blocks to the end on the standard library's code. A second run
of the same recipe is ended with SIGKILL at an arbitrary moment after its first checkpoints, and resumed in a new
process. Then every logged training and evaluation figure that is not a time or a memory must be equal, step for step,
and every exported tensor byte for byte. Exit code 0 if so, else 1, with the first differences.

Both run `run_training` under `train.deterministic` (without it a GPU's flash attention may reorder the sums
of its backward), from a `RunConfig`: neither `datasets` nor `jsonargparse` is needed.

Not shown by this: resuming on another device, thread count or version (not promised), a crash of the whole machine (a
killed process leaves what it wrote in the page cache), or a kill in the very middle of writing a checkpoint, unless it
happens to fall there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import torch
from child import context
from transformers import LlamaConfig, LlamaForCausalLM

from llama_pro_fast.config import DataConfig, EvalConfig, ExpandConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from llama_pro_fast.hf.config import resolve
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.resume import load_config
from llama_pro_fast.runs.checkpoint import complete_checkpoints
from llama_pro_fast.runs.marker import read_info
from llama_pro_fast.runs.metrics import read_metrics
from llama_pro_fast.training.run import run_training

NOT_REPEATABLE = {"tokens_per_second", "peak_memory_gib", "peak_share", "seconds", "data_seconds"}
"""Keys of metrics.jsonl that tell of this execution and not of the training."""


def make_base(folder: Path, **shape: int) -> None:
    """A random Llama, of four blocks where ``shape`` does not say, with the packaged base's tokenizer."""
    tokenizer = PretrainedFolder(resolve("builtin:prose-3m")).tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    # Heads of 64, so that every GPU backend of attention can serve.
    small = {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
    }
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **(small | shape), **ids)).save_pretrained(folder)


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


def start(config: RunConfig, *, resume: bool = False) -> Any:
    """A run in a process of its own: it sets threads, determinism and device for all of it."""
    process = context(config.train.device).Process(target=run_training, args=(config,), kwargs={"resume": resume})
    process.start()
    return process


def finish(process: Any) -> None:
    process.join()
    if process.exitcode:
        raise SystemExit(f"a run ended with code {process.exitcode}")


def kill_in_the_middle(process: Any, output: Path, after: int) -> int:
    """SIGKILL as soon as the log shows a step beyond the checkpoint of step ``after``; returns the last step logged."""
    while process.is_alive():
        newest = complete_checkpoints(output)[-1:]  # an older one may be deleted while we look
        saved = read_info(newest[0]).progress.step if newest else -1
        logged = max((row["step"] for row in read_metrics(output)), default=-1)
        # Work beyond a checkpoint must be lost, so that resuming has something to redo.
        if logged > saved >= after:
            process.kill()
            process.join()
            return max(row["step"] for row in read_metrics(output))
        time.sleep(0.002)
    finish(process)
    raise SystemExit(f"the run {output.name} ended before it could be killed; give more --steps")


def metrics(output: Path) -> dict[tuple, dict[str, Any]]:
    """The figures of a run that must repeat."""
    return {
        (row["kind"], row["step"], row.get("source")): {k: v for k, v in row.items() if k not in NOT_REPEATABLE}
        for row in read_metrics(output)
        if row["kind"] in ("train", "eval")
    }


def tensors(folder: Path) -> dict[str, str]:
    """Shape, dtype and digest of the bytes of each: equal NaN are equal here, and 0 and -0 are not."""
    model = PretrainedFolder(folder)
    return {name: f"{entry.dtype} {entry.shape} {model.digest(name)}" for name, entry in model.entries.items()}


def differences(one: dict, other: dict) -> list[str]:
    return [f"{key}: {one.get(key)} / {other.get(key)}" for key in one | other if one.get(key) != other.get(key)]


def trial(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Both runs and the comparison."""
    make_base(work / "base")
    started, whole, killed = time.monotonic(), work / "whole", work / "killed"
    finish(start(recipe(work, whole.name, options)))
    killed_at = kill_in_the_middle(start(recipe(work, killed.name, options)), killed, options.steps // 2)
    resumed_at = read_info(complete_checkpoints(killed)[-1]).progress.step
    finish(start(load_config(killed), resume=True))
    rows, exported = metrics(whole), tensors(whole / "export")
    said = differences(rows, metrics(killed)) + differences(exported, tensors(killed / "export"))
    losses, stored = [row["loss"] for row in read_metrics(whole) if row["kind"] == "train"], load_config(whole).train
    return {
        **{name: getattr(stored, name) for name in ("steps", "checkpoint_every", "dtype", "attention", "threads")},
        "killed_after_step": killed_at,
        "resumed_at_step": resumed_at,
        "first_loss": losses[0],
        "loss": losses[-1],
        "metric_rows": len(rows),
        "exported_tensors": len(exported),
        "differences": said,
        "bit_equal": not said and len(losses) == options.steps and bool(exported),
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> int:
    parser = common.parser(__doc__, out="train-resume-DEVICE")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--checkpoint-every", type=int, default=8, help="steps; several must fit into half the run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="train-resume-") as work:
        result = trial(options, Path(work))
    row = {"what": "resume equals uninterrupted", **result, **common.provenance(options.device)}
    out = options.out or common.result_file("train-resume", row["device"])
    common.write_json(out, [row])
    said = result["differences"]
    print(common.table(("resume", "value"), [(k, str(v)) for k, v in result.items() if v is not said]))
    print("\n".join([*said[:20], f"written to {out}"]))
    return 0 if result["bit_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
