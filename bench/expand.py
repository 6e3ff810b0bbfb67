"""Time and peak memory of expanding a LLaMA-2-7B: ``python bench/expand.py``.

Writes a random checkpoint of that shape (13.5 GB in three shards) into a temporary folder (31 GB, where TMPDIR says),
expands it with 8 groups in a child process, and reads the child's peak resident memory from the kernel (`os.wait4`).
Mapped file pages count as resident. The target: no more than two shards. Writing the checkpoint takes 14 GB of memory.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import torch
import transformers
from workload import SIZES

from llama_pro_fast.hf.folder import PretrainedFolder


def write_base(folder: Path, size: str) -> None:
    """A random bf16 checkpoint."""
    config = transformers.LlamaConfig(**SIZES[size].base)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="5GB")


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident bytes of a child process."""
    start = time.monotonic()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"the expansion ended with code {code}")
    return time.monotonic() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = common.parser(__doc__, out="expand-LAYERSxHIDDEN", device=False)
    parser.add_argument("--size", choices=list(SIZES), default="7b", help="default: 7b; another tries the bench")
    options = parser.parse_args()
    size = SIZES[options.size]
    with tempfile.TemporaryDirectory() as folder:
        base, out = Path(folder) / "base", Path(folder) / "expanded"
        # In a process of its own: what this one holds at its fullest would count as its child's.
        writer = multiprocessing.get_context("spawn").Process(target=write_base, args=(base, options.size))
        writer.start()
        writer.join()
        shards = sorted(path.stat().st_size for path in base.glob("*.safetensors"))
        told = [str(base), str(out), "--expand.groups", str(size.groups)]
        seconds, peak = measure([sys.executable, "-m", "llama_pro_fast.expand", *told])
        before, after = (sum(e.num_bytes for e in PretrainedFolder(path).entries.values()) for path in (base, out))
    layers, hidden = size.base["num_hidden_layers"], size.base["hidden_size"]
    result = common.provenance("cpu") | {
        **{"what": "expansion and identity proof", "layers": layers, "hidden": hidden, "groups": size.groups},
        "base_bytes": before,
        "expanded_bytes": after,
        "largest_shard_bytes": shards[-1],
        "seconds": round(seconds, 1),
        "peak_resident_bytes": peak,
    }
    path = options.out or common.RESULTS / f"expand-{layers}x{hidden}.json"
    common.write_json(path, result)
    print(f"{before / 1e9:.2f} GB in {len(shards)} shards became {after / 1e9:.2f} GB in {seconds:.1f} s")
    print(f"peak resident memory {peak / 1e9:.2f} GB (two shards: {2 * shards[-1] / 1e9:.2f} GB); written to {path}")


if __name__ == "__main__":
    main()
