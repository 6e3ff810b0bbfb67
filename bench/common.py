"""What benches share: options, where a figure comes from, what the device reaches, tables and JSON.

A figure that nobody can trace is worth nothing, so every result file names device, commit, versions and command.
Nothing here talks to the network. ``python bench/common.py`` prints the provenance of this checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t, of so many values: 95 % lie within so many of their deviations over the root of their number."""
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def parser(doc: str, *, out: str, device: bool = True) -> argparse.ArgumentParser:
    """The options of every bench; a device's "auto" has become "cuda" or "cpu" when they are parsed."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--out", type=Path, help=f"the result, as JSON; default: bench/results/{out}.json")
    if device:
        made.add_argument("--device", type=found_device, default="auto", choices=["cpu", "cuda"], help="default: auto")
    return made


def found_device(device: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def provenance(device: str) -> dict[str, Any]:
    return {"device": device_name(device), "commit": commit(), "versions": versions(), "command": command()}


def result_file(name: str, device: str) -> Path:
    """``bench/results/NAME-DEVICE.json``, of a device's full name."""
    return RESULTS / f"{name}-{slug(device)}.json"


def commit() -> str:
    """The commit measured, ``-dirty`` when files outside the results differ from it.

    A copy of the checkout whose git does not know says it in the variable COMMIT; without either it is unknown.
    """
    if told := os.environ.get("COMMIT"):
        return told
    try:
        head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
        # Without optional locks: a bench must not disturb somebody who is at work in the checkout.
        status = ("--no-optional-locks", "status", "--porcelain", "--", ".", ":(exclude)bench/results")
        return head + ("-dirty" if _output("git", "-C", str(ROOT), *status) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str | None]:
    """Of what decides speed and rounding; None for what is not there."""
    try:
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = None
    return {
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "driver": driver,
    }


def command() -> str:
    """The command line to repeat this, free of the machine's paths: of an absolute one what is below the checkout, else
    its last part."""

    def free(argument: str) -> str:
        path = Path(argument)
        if not path.is_absolute():
            return argument
        return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name

    return shlex.join(["python", free(str(Path(sys.argv[0]).resolve())), *map(free, sys.argv[1:])])


def device_name(device: str) -> str:
    """``NVIDIA H200``, or ``cpu, <its model>``."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return f"cpu, {model[1] if model else platform.processor() or platform.machine()}"


def slug(device: str) -> str:
    """A device's name as part of a file's name; all CPUs are one."""
    return "cpu" if device.startswith("cpu") else re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def seconds(call: Callable[[], Any], device: str) -> float:
    """What a call takes, the median: on a GPU by events, the L2 cache flushed before each."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=50, rep=200, return_mode="median") / 1e3
    return statistics.median(timeit.repeat(call, number=1, repeat=3))


def ceilings(device: str) -> tuple[float, float]:
    """Bytes a second of a large copy, read and written, and FLOPs a second of a large product."""
    size, n, dtype = (1 << 31, 8192, torch.bfloat16) if device == "cuda" else (1 << 26, 1024, torch.float32)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    return 2 * size / seconds(lambda: target.copy_(source), device), 2 * n**3 / seconds(lambda: a @ b, device)


def write_json(path: Path, result: Any) -> None:
    """Replace ``path`` whole, so that a killed bench leaves its last complete state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".new")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned plain text that survives any terminal and log; the first column is a name, the others are figures."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    lines = [columns, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def _output(*arguments: str) -> str:
    return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.strip()


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(json.dumps(provenance(found_device("auto"))))
