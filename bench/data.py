"""What the data engine costs, on text of this machine: ``python bench/data.py FOLDER`` (Linux).

Writes at least 200 MB of the source files and pages that are installed here into FOLDER, as jsonl and as parquet, and
prepares them with the packaged base's tokenizer:

- CPU seconds a MB beside those of `encode_batch_fast` alone on the same texts in memory, and the main process' share of
  them: what it needs itself limits how many CPUs can work for it;
- peak memory of the main process and of a worker, for three sizes;
- steps of 16 sequences of which more than half is one document, and what packing leaves empty and cuts;
- seconds to draw an epoch of 30 million documents, and its peak memory.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
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
KIB = 1024
SPAWN = multiprocessing.get_context("spawn")


def installed_texts() -> Iterator[str]:
    """Every file of text that is installed, once; the same ones in the same order as long as nothing is installed."""
    seen = set()
    for place in dict.fromkeys(map(os.path.realpath, PLACES)):
        for folder, subfolders, names in os.walk(place):
            subfolders.sort()
            for path in (os.path.join(folder, name) for name in sorted(names) if name.endswith(ENDINGS)):
                if os.path.realpath(path) in seen or not os.path.isfile(path):
                    continue
                seen.add(os.path.realpath(path))
                text = Path(path).read_bytes().decode(errors="replace")
                if text.strip():
                    yield text


def write_texts(folder: Path, megabytes: int) -> None:
    """``N.jsonl`` for each size and ``whole.parquet``: the beginning of the installed texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, size, sizes = [], 0, sorted({min(each, megabytes) for each in SIZES_MB})
    for text in installed_texts():
        rows.append(text)
        size += len(text.encode())
        while sizes and size >= sizes[0] * 1e6:
            with open(folder / f"{sizes.pop(0)}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows)
        if not sizes:
            break
    else:
        raise SystemExit(f"only {size / 1e6:.0f} MB of text are installed here; give a smaller --megabytes")
    pq.write_table(pa.table({"text": rows}), folder / f"{megabytes}.parquet", row_group_size=1000)


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
        for pid in (process.pid, *_children(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def encode_alone(path: Path, part: int, parts: int) -> float:
    """CPU seconds of `encode_batch_fast` on one thread, for every ``parts``-th document."""
    import pyarrow.parquet as pq

    texts = pq.read_table(path.with_suffix(".parquet"))["text"][part::parts].to_pylist()
    tokenizer, os.environ["RAYON_NUM_THREADS"] = _tokenizer().backend_tokenizer, "1"
    started = time.process_time()
    for begin in range(0, len(texts), MAP_BATCH):
        tokenizer.encode_batch_fast(texts[begin : begin + MAP_BATCH])
    return time.process_time() - started


def prepared(path: Path, cache: Path, workers: int | None = None) -> dict[str, float]:
    """CPU seconds and peak memory of preparing a file, of the main process and of its workers."""
    tokenizer = _tokenizer()
    before, peaks = resource.getrusage(resource.RUSAGE_SELF), [0]
    threading.Thread(target=_watch, args=(peaks,), daemon=True).start()
    _store(path, cache, tokenizer, workers)
    own, workers = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "main_cpu_seconds": own.ru_utime + own.ru_stime - before.ru_utime - before.ru_stime,
        "workers_cpu_seconds": workers.ru_utime + workers.ru_stime,
        "main_peak_bytes": own.ru_maxrss * KIB,
        "main_peak_bytes_before": before.ru_maxrss * KIB,
        "worker_peak_bytes": peaks[0],
    }


def _watch(peaks: list[int]) -> None:
    """Follow the most memory that a child has resident; the kernel's own figure has the parent's from before `exec`."""
    while True:
        for child in _children(os.getpid()):
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{child}/status").read_text()
                if "python" in status.partition("\n")[0] and (found := re.search(r"VmHWM:\s+(\d+) kB", status)):
                    peaks[0] = max(peaks[0], 1024 * int(found[1]))
        time.sleep(0.2)


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
    lengths = store.train.lengths
    return {
        "documents": len(lengths),
        "mean_tokens": float(lengths.mean()),
        "largest_tokens": int(lengths.max()),
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


def _store(path: Path, cache: Path, tokenizer: Any, workers: int | None = None) -> Any:
    from llama_pro_fast.config import DataConfig
    from llama_pro_fast.text.preparing import tokenize_source
    from llama_pro_fast.text.sources import resolve_sources

    source = resolve_sources(DataConfig(domain=str(path)), default_general=False)[0]
    return tokenize_source(source, tokenizer, held_out=0.02, cache_dir=cache, workers=workers)


def draw() -> dict[str, float]:
    """An epoch of many documents, whose lengths are log-normal."""
    from llama_pro_fast.data.rounds import Rounds

    generator = np.random.default_rng(0)
    lengths = np.exp(generator.normal(5.9, 1.3, DOCUMENTS)).astype(np.int64) + 1
    rounds = Rounds(lengths, weight=1, seq_len=LONG_SEQ_LEN, packing="best_fit", seed=0, source=0)
    started = time.perf_counter()
    rounds.first()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    return {"documents": DOCUMENTS, "mean_tokens": float(lengths.mean()), "seconds": seconds, "peak_bytes": peak}


def main() -> None:
    parser = common.parser(__doc__, out="data-cpu", device=False)
    parser.add_argument("folder", type=Path, help="where texts and tokens go (1 GB); must not exist")
    parser.add_argument("--megabytes", type=int, default=SIZES_MB[-1], help="of text; default: %(default)s")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    try:
        result = measure(options.folder, options.megabytes)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    path = options.out or common.RESULTS / "data-cpu.json"
    common.write_json(path, result)
    show(result)
    print(f"written to {path}")


def measure(folder: Path, megabytes: int) -> dict[str, Any]:
    """Everything, each in a process of its own."""
    in_process(write_texts, folder, megabytes)
    sizes = sorted({min(size, megabytes) for size in SIZES_MB})
    whole, table = folder / f"{megabytes}.jsonl", folder / f"{megabytes}.parquet"
    with open(whole, "rb") as file:
        text = sum(len(json.loads(line)["text"].encode()) for line in file)
    formats = {path.suffix[1:]: beside(path, folder / f"cache{path.suffix}") for path in (whole, table)}
    peaks = {str(size): in_process(prepared, folder / f"{size}.jsonl", folder / f"cache{size}") for size in sizes[:-1]}
    return common.provenance("cpu") | {
        "what": "text to tokens to batches",
        "cores": os.cpu_count(),
        "text_bytes": text,
        "formats": formats,
        "sizes": peaks | {str(megabytes): formats["jsonl"]},
        "order": in_process(order, whole, folder / "cache.jsonl"),
        "draw": in_process(draw),
    }


def show(result: dict[str, Any]) -> None:
    megabytes, gib = result["text_bytes"] / 1e6, 2**30
    rows = []
    for name, run in result["formats"].items():
        main, workers, alone = (run[f"{what}_cpu_seconds"] for what in ("main", "workers", "encode_batch_fast"))
        per_megabyte = [f"{1e3 * seconds / megabytes:.1f}" for seconds in (main + workers, alone)]
        rows.append((name, *per_megabyte, f"{alone / (main + workers):.3f}", f"{main / (main + workers):.2%}"))
    columns = (f"{megabytes:.0f} MB of text", "CPU ms/MB", "encode_batch_fast alone", "its rate", "main process")
    print(common.table(columns, rows))
    print()
    columns = ("text, MB", "main process, peak GiB", "of it imports", "a worker, peak GiB")
    peaks = ("main_peak_bytes", "main_peak_bytes_before", "worker_peak_bytes")
    print(common.table(columns, [(n, *(f"{e[key] / gib:.2f}" for key in peaks)) for n, e in result["sizes"].items()]))
    order, draw = result["order"], result["draw"]
    print(
        f"\n{order['documents']:,} documents of {order['mean_tokens']:,.0f} tokens on average, the largest "
        f"{order['largest_tokens']:,}, in steps of {BATCH} x {SEQ_LEN}: {order['steps_over_half_one_document']} of "
        f"{order['steps']:,} steps over half one document (most {order['largest_share_of_a_step']:.0%}), "
        f"{order['empty']:.3%} of the places empty, {order['without_beginning']:.1%} of the tokens in a piece without "
        f"its beginning\n{draw['documents']:,} documents: an epoch drawn in {draw['seconds']:.1f} s, peak "
        f"{draw['peak_bytes'] / gib:.1f} GiB"
    )


if __name__ == "__main__":
    main()
