"""What the data engine costs, on text of this machine: ``python bench/data.py`` (Linux).

At least 200 MB of the source files and pages that are installed here are written as jsonl and as parquet (1 GB in a
temporary folder) and prepared with the packaged base's tokenizer:

- CPU seconds a MB beside those of `encode_batch_fast` alone on the same texts in memory, its ids taken out (the least
  that is of use), and the main process' share of them: what it needs itself limits how many CPUs can work for it;
- peak memory of the main process and of a worker, for three sizes;
- steps of 16 sequences of which more than half is one document, and what packing leaves empty and cuts;
- seconds to draw an epoch of 30 million documents, and its peak memory.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import common
import numpy as np

SIZES_MB = (50, 100, 200)
ENDINGS = (".py", ".pyi", ".h", ".hpp", ".c", ".cpp", ".cu", ".md", ".rst", ".txt", ".js", ".html", ".json", ".pm")
PLACES = (sys.prefix, sys.base_prefix, "/usr/share", "/usr/lib", "/usr/include")
SEQ_LEN, BATCH = 1024, 16
DOCUMENTS, LONG_SEQ_LEN = 30_000_000, 4096
MAP_BATCH = 1000
"""Documents that `datasets.map` hands a tokenizer at a time, unless it is told otherwise."""
TURNS = 3
SPAWN = multiprocessing.get_context("spawn")


def write_texts(folder: Path, sizes: list[int]) -> int:
    """``N.jsonl`` and ``N.parquet`` for each size in MB, of the files of text that are installed here; bytes of the
    largest one's text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = (path for place in PLACES for path in Path(place).rglob("*") if path.suffix in ENDINGS and path.is_file())
    rows, num_bytes, left = [], 0, sizes[:]
    for path in sorted({path.resolve() for path in found}):
        if text := path.read_bytes().decode(errors="replace").strip():
            rows.append(text)
            num_bytes += len(text.encode())
        while num_bytes >= left[0] * 1e6:
            name = folder / str(left.pop(0))
            with open(name.with_suffix(".jsonl"), "w", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows)
            pq.write_table(pa.table({"text": rows}), name.with_suffix(".parquet"), row_group_size=1000)
            if not left:
                return num_bytes
    raise ValueError(f"only {num_bytes / 1e6:.0f} MB of text are installed here; give a smaller --megabytes")


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives in a process of its own, whose usage is its alone."""
    with SPAWN.Pool(1) as pool:
        return pool.apply(function, arguments)


def beside(path: Path, cache: Path) -> dict[str, float]:
    """Preparing a file with a worker for each CPU, and `encode_batch_fast` alone on its texts in as many processes.

    They take turns of a tenth of a second, so a machine whose speed drifts is as fast for the one as for the other.
    """
    count = os.cpu_count()
    with SPAWN.Pool(1) as ours:
        own = multiprocessing.active_children()
        with SPAWN.Pool(count) as rivals:
            others = [each for each in multiprocessing.active_children() if each not in own]
            run = ours.apply_async(prepared, [path, cache])
            alone = rivals.starmap_async(encode_alone, [(path, part, count) for part in range(count)], chunksize=1)
            while not (run.ready() and alone.ready()):
                for waiting, working in ((own, others), (others, own)):
                    _signal(waiting, signal.SIGSTOP)
                    _signal(working, signal.SIGCONT)
                    time.sleep(0.1)
            _signal(others, signal.SIGCONT)  # only then do they end
            return run.get() | {"encode_batch_fast_cpu_seconds": sum(alone.get())}


def _signal(processes: list[multiprocessing.Process], number: int) -> None:
    for process in processes:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (process.pid, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def encode_alone(path: Path, part: int, parts: int) -> float:
    """CPU seconds of `encode_batch_fast` on one thread, to the ids of every ``parts``-th document."""
    import pyarrow.parquet as pq

    texts = pq.read_table(path.with_suffix(".parquet"))["text"][part::parts].to_pylist()
    tokenizer, os.environ["RAYON_NUM_THREADS"] = _tokenizer().backend_tokenizer, "1"
    started = time.process_time()
    for begin in range(0, len(texts), MAP_BATCH):
        [encoding.ids for encoding in tokenizer.encode_batch_fast(texts[begin : begin + MAP_BATCH])]
    return time.process_time() - started


def prepared(path: Path, cache: Path) -> dict[str, float]:
    """CPU seconds and peak memory of preparing a file, of the main process and of its workers."""
    tokenizer = _tokenizer()
    before = resource.getrusage(resource.RUSAGE_SELF)
    _store(path, cache, tokenizer)
    own, workers = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "main_cpu_seconds": own.ru_utime + own.ru_stime - before.ru_utime - before.ru_stime,
        "workers_cpu_seconds": workers.ru_utime + workers.ru_stime,
        "main_peak_bytes": own.ru_maxrss * 1024,
        "main_peak_bytes_before": before.ru_maxrss * 1024,
        "worker_peak_bytes": workers.ru_maxrss * 1024,  # or what its parent held when it started, which is less
    }


def order(path: Path, cache: Path) -> dict[str, float]:
    """How the documents of a prepared file lie in the steps of an epoch."""
    from llama_pro_fast.data.dataset import Mixed, PackedDataset

    store = _store(path, cache, _tokenizer())
    data = PackedDataset([Mixed(store=store, weight=1.0, share=None)], seq_len=SEQ_LEN, seed=0, batch_size=BATCH)
    steps = data.sequences_in_epoch(0) // BATCH
    largest = []
    for step in range(steps):
        row = data.pieces(step * BATCH, BATCH)
        tokens = np.bincount(np.unique(row.documents, return_inverse=True)[1], weights=row.lengths * (row.sources >= 0))
        largest.append(tokens.max() / (BATCH * SEQ_LEN))
    return {
        "documents": len(store.train.lengths),
        "steps": steps,
        "steps_over_half_one_document": int((np.array(largest) > 0.5).sum()),
        "largest_share_of_a_step": max(largest),
        "empty": 1 - data.filled,
        "without_beginning": data.without_beginning,
    }


def _tokenizer():
    from transformers import AutoTokenizer

    from llama_pro_fast.hf.config import resolve

    return AutoTokenizer.from_pretrained(resolve("builtin:prose-3m"))


def _store(path: Path, cache: Path, tokenizer: Any) -> Any:
    from llama_pro_fast.config import DataConfig
    from llama_pro_fast.text.preparing import tokenize_source
    from llama_pro_fast.text.sources import resolve_sources

    source = resolve_sources(DataConfig(domain=str(path)), default_general=False)[0]
    return tokenize_source(source, tokenizer, held_out=0.02, cache_dir=cache)


def draw() -> dict[str, float]:
    """An epoch of many documents, whose lengths are log-normal."""
    from llama_pro_fast.data.rounds import Rounds

    generator = np.random.default_rng(0)
    lengths = np.exp(generator.normal(5.9, 1.3, DOCUMENTS)).astype(np.int64) + 1
    rounds = Rounds(lengths, weight=1, seq_len=LONG_SEQ_LEN, packing="best_fit", seed=0, source=0)
    started = time.perf_counter()
    rounds.first()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def main() -> None:
    parser = common.parser(__doc__, out="data-cpu", device=False)
    parser.add_argument("--megabytes", type=int, default=SIZES_MB[-1], help="of text; default: %(default)s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options.megabytes)
    path = options.out or common.RESULTS / "data-cpu.json"
    common.write_json(path, result)
    show(result)
    print(f"written to {path}")


def measure(folder: Path, megabytes: int) -> dict[str, Any]:
    """Everything, each in a process of its own."""
    sizes = sorted({min(size, megabytes) for size in SIZES_MB})
    num_bytes, whole = in_process(write_texts, folder, sizes), folder / f"{megabytes}.jsonl"
    formats = {
        end: [beside(whole.with_suffix(f".{end}"), folder / f"cache{turn}.{end}") for turn in range(TURNS)]
        for end in ("jsonl", "parquet")
    }
    peaks = {str(size): in_process(prepared, folder / f"{size}.jsonl", folder / f"cache{size}") for size in sizes[:-1]}
    return common.provenance("cpu") | {
        **{"what": "text to tokens to batches", "cores": os.cpu_count(), "text_bytes": num_bytes, "formats": formats},
        "sizes": peaks | {str(megabytes): formats["jsonl"][0]},
        "order": in_process(order, whole, folder / "cache0.jsonl"),
        "draw": in_process(draw),
    }


def show(result: dict[str, Any]) -> None:
    megabytes, gib = result["text_bytes"] / 1e6, 2**30
    rows = []
    for name, runs in result["formats"].items():
        whats = ("main", "workers", "encode_batch_fast")
        main, workers, alone = (mean(run[f"{what}_cpu_seconds"] for run in runs) for what in whats)
        per_megabyte = [f"{1e3 * seconds / megabytes:.1f}" for seconds in (main + workers, alone)]
        rows.append((name, *per_megabyte, f"{alone / (main + workers):.3f}", f"{main / (main + workers):.2%}"))
    columns = (f"{megabytes:.0f} MB of text", "CPU ms/MB", "encode_batch_fast alone", "its rate", "main process")
    print(common.table(columns, rows), end="\n\n")
    of = ("main_peak_bytes", "main_peak_bytes_before", "worker_peak_bytes")
    peaks = [(size, *(f"{run[key] / gib:.2f}" for key in of)) for size, run in result["sizes"].items()]
    print(common.table(("text, MB", "main process, peak GiB", "of it imports", "a worker, peak GiB"), peaks))
    order, draw = result["order"], result["draw"]
    print(
        f"\n{order['documents']:,} documents in {order['steps']:,} steps of {BATCH} x {SEQ_LEN} tokens: "
        f"{order['steps_over_half_one_document']} steps are over half one document (most "
        f"{order['largest_share_of_a_step']:.0%}), {order['empty']:.3%} of the places are empty, "
        f"{order['without_beginning']:.1%} of the tokens in a piece without its beginning\n"
        f"{DOCUMENTS:,} documents: an epoch drawn in {draw['seconds']:.1f} s, peak {draw['peak_bytes'] / gib:.1f} GiB"
    )


if __name__ == "__main__":
    main()
