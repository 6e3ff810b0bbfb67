"""What a run writes while it goes: rows in metrics.jsonl, the same for TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from llama_pro_fast.files import writing_to

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends rows to ``metrics.jsonl`` (one JSON object a line, ``kind`` is ``train`` or ``eval``) and TensorBoard.

    Args:
        run: the run's folder.
        resumed_at: the step a resumed run starts from; what a crashed run wrote beyond it is dropped.
    """

    def __init__(self, run: Path, *, resumed_at: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = run / METRICS_FILE
        kept = [row for row in read_metrics(run) if resumed_at is not None and row["step"] <= resumed_at]
        with writing_to(run):
            replacement = self.path.with_suffix(".new")
            replacement.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            replacement.replace(self.path)
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
            self.board = SummaryWriter(run / "tensorboard", purge_step=0 if resumed_at is None else resumed_at + 1)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Add a row.

        Raises:
            UserError: no space is left.
        """
        with writing_to(self.path):
            self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self.file.flush()
            prefix = "/".join([kind, *([values["source"]] if "source" in values else [])])
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(f"{prefix}/{name}", value, step)

    def sync(self) -> None:
        """Wait until the rows are on the disk: a checkpoint vouches for those before it."""
        with writing_to(self.path):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        self.board.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run; a last line that a crash cut short is left out."""
    path = run / METRICS_FILE
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
