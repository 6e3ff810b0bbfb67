"""Time and peak memory of expanding a LLaMA-2-7B: ``python bench/expand.py FOLDER``.

Writes a random checkpoint of that shape (13.5 GB in three shards) into FOLDER, expands it with 8 groups in a child
process, and reads the child's peak resident memory from the kernel (`os.wait4`). Mapped file pages count as resident.
The target: no more than two shards. FOLDER needs 31 GB; the models are deleted at the end unless ``--keep`` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import common
import numpy as np
import torch
import transformers

from llama_pro_fast.model import expected_tensors
from llama_pro_fast.pretrained import CONFIG_FILE, INDEX_FILE, PretrainedFolder, write_header

SHARD_BYTES = 5_000_000_000
PIECE = 4 << 20


def write_base(folder: Path, config: transformers.LlamaConfig, shard_bytes: int) -> None:
    """A random bf16 checkpoint, never more of it in memory than a few megabytes."""
    shards: list[list[tuple[str, str, tuple[int, ...], int]]] = [[]]
    for name, shape in expected_tensors(config).items():
        row = (name, "BF16", shape, 2 * int(np.prod(shape)))
        if shards[-1] and sum(r[3] for r in shards[-1]) + row[3] > shard_bytes:
            shards.append([])
        shards[-1].append(row)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    # One piece of noise at several offsets: drawing 6.7 billion normals would take longer than the expansion.
    noise = (0.02 * torch.randn(2 * PIECE, generator=generator)).bfloat16().view(torch.uint8).numpy()
    ones = torch.ones(config.hidden_size, dtype=torch.bfloat16).view(torch.uint8).numpy()
    weight_map, starts = {}, np.random.default_rng(0)
    for number, rows in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with open(folder / file, "wb") as out:
            write_header(out, rows)
            for name, _, _, left in rows:
                weight_map[name] = file
                if name.endswith("norm.weight"):
                    out.write(ones.data)
                    continue
                while left:
                    start = 2 * int(starts.integers(PIECE))
                    piece = noise[start : start + min(PIECE, left)]
                    out.write(piece.data)
                    left -= len(piece)
    total = sum(row[3] for rows in shards for row in rows)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    (folder / CONFIG_FILE).write_text(config.to_json_string(use_diff=False))


def measure(command: list[str]) -> tuple[float, float, str]:
    """Seconds, peak resident bytes and output of a child process."""
    start = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.monotonic() - start
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"the expansion failed:\n{output}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the models go; must not exist")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--keep", action="store_true", help="leave the two models there")
    options = parser.parse_args()

    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=options.layers,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_attention_heads=options.heads,
        vocab_size=options.vocab,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )
    base, out = options.folder / "base", options.folder / "expanded"
    try:
        write_base(base, config, SHARD_BYTES)
        shards = sorted(path.stat().st_size for path in base.glob("*.safetensors"))
        command = [sys.executable, "-m", "llama_pro_fast.expand", str(base), str(out), "--groups", str(options.groups)]
        seconds, peak, output = measure(command)
        sizes = [sum(entry.num_bytes for entry in PretrainedFolder(folder).entries.values()) for folder in (base, out)]
    finally:
        if not options.keep:
            shutil.rmtree(options.folder, ignore_errors=True)

    result = {
        "what": "expansion and identity proof",
        "device": f"{common.device_name('cpu')}, {os.cpu_count()} cores",
        "versions": common.versions(),
        "commit": common.commit(),
        "command": common.command(),
        "layers": options.layers,
        "hidden": options.hidden,
        "groups": options.groups,
        "base_bytes": sizes[0],
        "expanded_bytes": sizes[1],
        "largest_shard_bytes": shards[-1],
        "seconds": round(seconds, 1),
        "peak_resident_bytes": peak,
    }
    path = common.RESULTS / f"expand-{options.layers}x{options.hidden}.json"
    common.write_json(path, result)

    rows = [
        ("base", f"{options.layers} blocks, {sizes[0] / 1e9:.2f} GB in {len(shards)} shards"),
        ("expanded", f"{options.layers + options.groups} blocks, {sizes[1] / 1e9:.2f} GB"),
        ("time", f"{seconds:.1f} s"),
        ("peak memory", f"{peak / 1e9:.2f} GB (two shards: {2 * shards[-1] / 1e9:.2f} GB)"),
    ]
    print(output)
    print(common.table(("expansion", "and its identity proof"), rows))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
