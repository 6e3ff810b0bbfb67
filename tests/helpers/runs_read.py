"""What tests read of a run to hold it against another."""

from __future__ import annotations

from pathlib import Path

from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.runs.metrics import read_metrics


def losses(run: Path) -> list[tuple]:
    """Everything a run measured that is not a clock."""
    keep = ("kind", "step", "source", "loss", "base_loss", "kl", "grad_norm", "lr")
    return [tuple(row.get(key) for key in keep) for row in read_metrics(run) if row["kind"] in ("train", "eval")]


def digests(folder: Path) -> dict[str, str]:
    """Of every tensor of a model."""
    opened = PretrainedFolder(folder)
    return {name: opened.digest(name) for name in opened.entries}
