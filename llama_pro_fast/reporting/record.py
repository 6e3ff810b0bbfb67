"""What the folder of a run tells at any moment: of a running, a stopped, a crashed or a finished run.

Nothing in it is changed. A run in the midst of writing may leave a file half read; what cannot be read is unknown.
"""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_pro_fast.config import Settled
from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion.manifest import what_trains
from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.hf.config import BUILTIN, find_config
from llama_pro_fast.model.trained import Trained
from llama_pro_fast.resume import load_config
from llama_pro_fast.runs.checkpoint import complete_checkpoints
from llama_pro_fast.runs.metrics import METRICS_FILE, read_metrics
from llama_pro_fast.runs.run_folder import LOCK, SUMMARY


def number(value: Any) -> float | None:
    """``value`` if it is a finite number, else None: what a damaged row holds is unknown."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if known else None


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run as its folder tells it.

    Attributes:
        folder: absolute.
        config: as the run has settled it.
        rows: of its metrics, in order.
        lost_rows: lines of the metrics that are damaged.
        written: when the last row was written, seconds since the epoch; None where there is none.
        running: whether a process holds the folder; None where that cannot be found out.
        checkpoint: step of the last complete one.
        summary: of a finished run what it left; else None.
        model: transformers' config of the model that trains, and what of it does; None where it cannot be read.
    """

    folder: Path
    config: Settled
    rows: list[dict[str, Any]]
    lost_rows: int
    written: float | None
    running: bool | None
    checkpoint: int | None
    summary: dict[str, Any] | None
    model: tuple[Any, Trained] | None

    @classmethod
    def read(cls, folder: Path) -> Record:
        """The run in ``folder``.

        Raises:
            UserError: there is none, or its configuration or metrics cannot be read.
        """
        folder = folder.absolute()
        config = load_config(folder)
        # Asked before anything else is read: a run that ends meanwhile is then taken for running, not for crashed.
        running = _is_held(folder / LOCK)
        checkpoints = complete_checkpoints(folder)
        rows, lines, written = [], 0, None
        metrics = folder / METRICS_FILE
        if metrics.is_file():
            try:
                written = metrics.stat().st_mtime
                # A last line without its end is still being written.
                lines = sum(1 for line in metrics.read_bytes().split(b"\n")[:-1] if line.strip())
                rows = [row for row in read_metrics(folder) if _is_row(row)]
            except OSError as error:
                raise UserError(f"{metrics}: cannot be read ({error.strerror}); ask its owner for the right") from error
        return cls(
            folder=folder,
            config=config,
            rows=rows,
            lost_rows=max(0, lines - len(rows)),
            written=written if rows else None,
            running=running,
            checkpoint=int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else None,
            summary=_summary(folder / SUMMARY),
            model=_model(folder, config),
        )

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The rows of one kind."""
        return [row for row in self.rows if row["kind"] == kind]

    @property
    def step(self) -> int:
        """The last step that the folder knows of."""
        return max([self.checkpoint or 0, *(row["step"] for row in self.rows if row["kind"] in ("train", "eval"))])

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.train.seq_len

    @property
    def skipped_steps(self) -> int:
        """Steps that were left out because their loss or gradients were not finite."""
        counted = sum(number(row.get("skipped")) or 0 for row in self.of_kind("train"))
        return max(int(counted), len(self.of_kind("skipped")))

    @property
    def stop(self) -> str | None:
        """What stopped the run, in a word or a sentence; None where it was not stopped, or went on since."""
        for row in reversed(self.rows):
            if row["kind"] == "stop":
                return str(row.get("signal") or row.get("reason") or "a signal")
            if row["kind"] in ("train", "eval"):
                break
        return None

    @property
    def trained(self) -> Trained | None:
        return self.model[1] if self.model else None


def results(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each (role, source) its last evaluation, ``after``, and the one it started from, ``before``.

    The first is the one marked as such on the text of the last: where the held-out text changed on the way, that is
    the first on the new text. ``before`` is None where that row is damaged.
    """
    keep = ("step", "loss", "bits_per_byte", "base_loss", "kl", "first_base_loss", "first_kl")
    found = []
    for (role, source), mine in by_source(rows).items():
        last = mine[-1]
        firsts = [row for row in mine if row.get("first") is True and row.get("measured") == last.get("measured")]
        before, after = (
            {key: number(row.get(key)) for key in keep} if row else None for row in ((firsts or [None])[0], last)
        )
        found.append({"source": source, "role": role, "before": before, "after": after})
    return found


def by_source(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(role, source) -> its evaluations in order; one text may be both what is learned and what is not to be forgotten.

    An evaluation without a loss or a name is damaged, and left out.
    """
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        name = (row.get("role"), row.get("source"))
        if row["kind"] == "eval" and number(row.get("loss")) is not None and all(isinstance(n, str) for n in name):
            grouped.setdefault(name, []).append(row)
    return grouped


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("kind"), str) and type(row.get("step")) is int


def _is_held(lock: Path) -> bool | None:
    """Whether a process holds ``lock``. A shared lock tells, and is gone at once: it keeps out no other reader."""
    try:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:  # not ours to read, or a file system without locks
        return None


def _summary(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        summary = None
    return summary if isinstance(summary, dict) else {}


def _model(folder: Path, config: Settled) -> tuple[Any, Trained] | None:
    """The run's own model, or before it is made what it will be. The hub is not asked."""
    made = [path for name in ("expanded", "initial") if (path := folder / name).is_dir()]
    path = str(made[0]) if made else config.model.path
    if not path.startswith(BUILTIN) and not Path(path).is_dir():
        return None
    try:
        raw, model = find_config(path)
        plan = None
        if config.expand.wanted and not made:
            plan = ExpansionPlan.from_config(model.num_hidden_layers, config.expand)
        trained = what_trains(
            raw,
            model.num_hidden_layers,
            parameters=config.train.parameters,
            blocks=config.train.blocks,
            plan=plan,
            name=str(path),
        )
        model.num_hidden_layers = trained.num_layers
        return model, trained
    except UserError:
        return None
