"""The quickstart by the clock: `llama-pro-fast train` in an empty folder.

    python bench/quickstart.py

The command runs as a user's does, in a process of its own, with nothing cached: the clock goes from its start to its
end, imports, tokenising, expansion, proof, evaluations, export and read-back included. Afterwards
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


def measure(folder: Path) -> dict[str, Any]:
    """One quickstart in ``folder``, and its row.

    Raises:
        subprocess.CalledProcessError: the run failed, or its report does not hold what is promised.
    """
    # Read from another folder, a relative path would lead elsewhere.
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(paths)}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "llama_pro_fast.train"], cwd=folder, env=environment, check=True)
    seconds = time.perf_counter() - start
    run = folder / "runs" / "quickstart"
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


def main() -> int:
    options = common.parser(__doc__, out="quickstart-DEVICE", device=False).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(Path(folder))
    out = options.out or common.result_file("quickstart", row["device"])
    common.write_json(out, [row])
    shown = [(name, str(value)) for name, value in row.items() if name not in ("versions", "command")]
    print(common.table(("quickstart", "value"), shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
