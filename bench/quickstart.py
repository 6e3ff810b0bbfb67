"""How long the quickstart takes: ``python bench/quickstart.py``.

`llama-pro-fast train` runs as a user's does, in an empty folder and a process of its own, with nothing cached: from its
start to its end, imports, tokenising, expansion, proof, evaluations, export and read-back included. Afterwards
`.ci/quickstart_check.py` holds its report to what is promised of it. The time is recorded, not checked: it is the
machine's as well. Aimed at: 240 s on 2 CPU cores, 60 s on a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common


def by_the_clock(folder: Path) -> dict[str, Any]:
    """One quickstart in ``folder``, and its row."""
    # Read from another folder, a relative path would lead elsewhere.
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(paths)}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "llama_pro_fast.train"], cwd=folder, env=environment, check=True)
    seconds, run = time.perf_counter() - start, folder / "runs" / "quickstart"
    subprocess.run([sys.executable, str(common.ROOT / ".ci" / "quickstart_check.py"), str(run)], check=True)
    summary = json.loads((run / "report" / "summary.json").read_text())
    taken = ("seconds_of_steps", "median_tokens_per_second", "peak_memory_gib", "threads", "dtype", "attention")
    measured = {"seconds": round(seconds, 1)} | {name: summary[name] for name in taken}
    return measured | losses(summary) | common.provenance(summary["device"])


def losses(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of domain and general text, before and after, from a run's report."""
    return {
        result["role"]: {when: result[when]["loss"] for when in ("before", "after")} for result in summary["results"]
    }


def main() -> None:
    options = common.parser(__doc__, out="quickstart-DEVICE", device=False).parse_args()
    out = options.out or common.result_file("quickstart", common.device_name(common.found_device("auto")))
    with tempfile.TemporaryDirectory() as folder:
        row = by_the_clock(Path(folder))
    common.write_json(out, [row])
    shown = [(name, str(value)) for name, value in row.items() if name not in ("versions", "command")]
    print(common.table(("quickstart", "value"), shown))


if __name__ == "__main__":
    main()
