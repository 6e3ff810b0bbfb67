"""One run by 1, 2, 4, … processes, replicated and sharded: speed, memory and loss beside those of one.

    PYTHONPATH=.:kernels python bench/ranks.py

The trainer itself, under torchrun, on the standard library's code: on GPUs a random model of 1.1 B parameters with four
new blocks, a card for each process; on a CPU a tiny one, whose speed says nothing but whose losses must agree as well.
The steps are the same for any number of processes, which divide the work. Needs neither `datasets` nor `jsonargparse`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import torch
import yaml
from train_resume import make_base

from llama_pro_fast.config import DataConfig, EvalConfig, ExpandConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from llama_pro_fast.resume import from_dict, to_dict
from llama_pro_fast.runs.metrics import read_metrics
from llama_pro_fast.training.run import run_training

LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}
STEPS, LOGGED = 12, 4
"""Of a run; its speed is that of the last so many."""


def recipe(work: Path, name: str, *, large: bool, batch_size: int, sharding: str) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(work / "base")),
        expand=ExpandConfig(groups=4 if large else 2),
        data=DataConfig(domain="stdlib:code", cache=str(work / "tokens")),
        optim=OptimConfig(lr=1e-4),
        train=TrainConfig(
            steps=STEPS,
            seq_len=2048 if large else 128,
            batch_size=batch_size,
            micro_batch_size=1,
            log_every=LOGGED,
            sharding=sharding,
            threads=None if large else 1,
        ),
        eval=EvalConfig(every=STEPS, tokens=4096),
        output=str(work / name),
    )


def measured(work: Path, ranks: int, sharding: str, **how: Any) -> dict[str, Any]:
    """The run by so many processes."""
    name = f"{ranks}-{sharding}"
    (work / f"{name}.yaml").write_text(yaml.safe_dump(to_dict(recipe(work, name, sharding=sharding, **how))))
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    subprocess.run([sys.executable, *start, __file__, "--recipe", str(work / f"{name}.yaml")], check=True)
    last = [row for row in read_metrics(work / name) if row["kind"] == "train"][-1]
    figures = {"tokens_per_s": last["tokens_per_second"], "peak_gib": last["peak_memory_gib"], "loss": last["loss"]}
    return {"ranks": ranks, "sharding": sharding if ranks > 1 else "none", **figures}


def main() -> None:
    parser = common.parser(__doc__, out="ranks-DEVICE", device=False)
    parser.add_argument("--counts", help="of processes, 1,2,4; default: powers of two up to the GPUs, on a CPU 1,2")
    parser.add_argument("--recipe", type=Path, help="make the run of this recipe, as one of the processes")
    options = parser.parse_args()
    if options.recipe:
        run_training(from_dict(RunConfig, yaml.safe_load(options.recipe.read_text())))
        return
    gpus = torch.cuda.device_count()
    powers = [2**n for n in range(8) if 2**n <= max(2, gpus)]
    counts = [int(n) for n in options.counts.split(",")] if options.counts else powers
    rows = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as work:
        make_base(Path(work) / "base", **(LARGE if gpus else {}))
        for ranks in counts:
            for sharding in ("replicate", "trained") if ranks > 1 else ("replicate",):
                rows.append(measured(Path(work), ranks, sharding, large=bool(gpus), batch_size=4 * max(counts)))
    provenance = common.provenance(common.found_device("auto"))
    rows = [row | provenance for row in rows]
    out = options.out or common.result_file("ranks", provenance["device"])
    common.write_json(out, rows)
    first = rows[0]
    lines = [
        [
            str(row["ranks"]),
            row["sharding"],
            f"{row['tokens_per_s']:,.0f}",
            f"{row['tokens_per_s'] / first['tokens_per_s']:.2f}",
            f"{row['peak_gib']:.2f}",
            f"{row['loss']:.6f}",
            f"{row['loss'] / first['loss'] - 1:+.1e}",
        ]
        for row in rows
    ]
    print(common.table(["ranks", "sharded", "tokens/s", "times one", "GiB each", "loss", "beside one"], lines))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
