"""What a run writes while it goes: rows in metrics.jsonl, the same figures for TensorBoard and Weights & Biases.

None of them can end a run: rows that the disk has no room for wait in memory, and a board that fails is switched off.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from llama_pro_fast.console import say
from llama_pro_fast.errors import UserError
from llama_pro_fast.files import first_line, sync, writing_to

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends rows to ``metrics.jsonl`` (one JSON object a line; its kinds: docs/data.md) and to the boards.

    Args:
        run: the run's folder.
        resumed_at: the step a resumed run starts from; what a crashed run wrote beyond it is dropped, and so are its
            rows of kind ``change``, which whoever resumes writes.
        evaluated: whether the evaluation at that step was made to its end; where not, its rows are dropped too.
        wandb: project of Weights & Biases.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(
        self, run: Path, *, resumed_at: int | None = None, evaluated: bool = True, wandb: str | None = None
    ) -> None:
        self.path = run / METRICS_FILE
        kept = []
        if resumed_at is not None:
            if not self.path.exists():
                say(f"{self.path}: is gone; its rows up to step {resumed_at} are lost")
            for row in self._before():
                undone = ("change",) if evaluated else ("change", "eval")
                if row["step"] < resumed_at or (row["step"] == resumed_at and row["kind"] not in undone):
                    kept.append(row)
        with writing_to(run):
            replacement = self.path.with_suffix(".new")
            replacement.write_bytes(b"".join(map(_line, kept)))
            sync(replacement)
            replacement.replace(self.path)
        self.waiting: list[bytes] = []
        self.complained = False
        self.boards: dict[str, _Board] = {}
        self._board("TensorBoard", lambda: _TensorBoard(run, 0 if resumed_at is None else resumed_at + 1))
        if wandb is not None:
            self._board("Weights & Biases", lambda: _WandB(run, wandb))

    def _before(self) -> list[dict[str, Any]]:
        """What the run has logged; a file that cannot be read is kept under another name."""
        if self.path.exists() and not os.access(self.path, os.R_OK):
            aside = self.path.with_name(f"{METRICS_FILE}.{secrets.token_hex(4)}")
            with writing_to(self.path):
                self.path.rename(aside)
            say(f"{self.path}: cannot be read, check its permissions; it is kept as {aside.name}")
        return read_metrics(self.path.parent)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Add a row; what is a number in it (a flag is none) goes to the boards as well."""
        self.waiting.append(_line({"kind": kind, "step": step, **values}))
        self._write_out()
        prefix = "/".join([kind, *([values["source"]] if "source" in values else [])])
        scalars = dict(_scalars(prefix, values))
        for name in list(self.boards):
            self._try(name, lambda board: board.write(step, scalars))

    def sync(self) -> None:
        """Wait until the rows are on the disk: a checkpoint vouches for those before it."""
        self._write_out(sync=True)

    def close(self) -> None:
        self._write_out()
        if self.waiting:
            say(f"{self.path}: {len(self.waiting)} rows could not be written")
        for name in list(self.boards):
            self._try(name, lambda board: board.close())

    def _write_out(self, *, sync: bool = False) -> None:
        """Append the rows that wait, all of them or none."""
        content = b"".join(self.waiting)
        try:
            # Opened anew each time: a file that was moved or deleted in between is not written into nowhere.
            with open(self.path, "ab", buffering=0) as file:
                end = file.tell()
                try:
                    written = 0
                    while written < len(content):  # a disk that fills up takes a part first
                        written += file.write(content[written:])
                    self.waiting.clear()
                    if sync:
                        os.fsync(file.fileno())
                except OSError:
                    if self.waiting:
                        file.truncate(end)
                    raise
        except OSError as error:
            if not self.complained:
                say(f"{self.path}: cannot be written ({error.strerror}); rows wait in memory, the run goes on")
            self.complained = True

    def _board(self, name: str, make: Callable[[], _Board]) -> None:
        try:
            self.boards[name] = make()
        except Exception as error:
            self._switch_off(name, error)

    def _try(self, name: str, action: Callable[[_Board], None]) -> None:
        try:
            action(self.boards[name])
        except Exception as error:
            self._switch_off(name, error)

    def _switch_off(self, name: str, error: Exception) -> None:
        self.boards.pop(name, None)
        say(f"{name}: off from here on ({first_line(error)}); {METRICS_FILE} has the same figures, the run goes on")


class NotWritten:
    """The metrics of a rank that does not lead: another one writes them."""

    def write(self, kind: str, step: int, **values: Any) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class _Board(Protocol):
    """Where figures are looked at; whatever it raises switches it off."""

    def write(self, step: int, scalars: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """An event file of TensorBoard's.

    Not through its own writer, whose thread fails on a full disk with a traceback, and out of sight of its caller.

    Args:
        purge_step: the step from which on what earlier files hold no longer counts.
    """

    def __init__(self, run: Path, purge_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.Event, self.Summary = Event, Summary
        folder = run / "tensorboard"
        folder.mkdir(exist_ok=True)
        number = sum(1 for _ in folder.iterdir())  # files are read in the order of their names
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{number}"
        self.file = open(folder / name, "xb")  # noqa: SIM115 - open as long as the run
        self.records = RecordWriter(self.file)
        self._add(file_version="brain.Event:2")
        self._add(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        values = [self.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._add(step=step, summary=self.Summary(value=values))

    def close(self) -> None:
        self.file.close()

    def _add(self, **event: Any) -> None:
        self.records.write(self.Event(wall_time=time.time(), **event).SerializeToString())
        self.records.flush()


class _WandB:
    """A run of Weights & Biases for a run's folder, which goes on in it after a resume."""

    def __init__(self, run: Path, project: str) -> None:
        import wandb

        name = run / "wandb" / "id"
        if not name.is_file():
            name.parent.mkdir(exist_ok=True)
            name.write_text(secrets.token_hex(4))
        self.run = wandb.init(
            project=project,
            id=name.read_text(),
            name=run.name,
            dir=str(run),
            resume="allow",
            # Our own output stays ours; nobody may be there to be asked for a key; at the end a network that is gone is
            # not waited for.
            settings=wandb.Settings(console="off", login_timeout=30, finish_timeout=120),
        )
        # A step of ours, and not a count of rows: after a crash some steps come again.
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self.run.log({"step": step, **scalars})

    def close(self) -> None:
        self.run.finish()


def _scalars(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(f"{prefix}/{name}", value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}/{name}", value


def check_wandb(project: str | None) -> None:
    """Refuse a project of Weights & Biases where its package is not installed.

    Raises:
        UserError: it is not.
    """
    if project is None:
        return
    try:
        from wandb import init  # noqa: F401 - a folder called wandb imports too, but has none
    except Exception as error:
        raise UserError(
            f"--train.wandb {project}: the package wandb does not import ({first_line(error)}); "
            "`pip install wandb`, or leave the option out"
        ) from error


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run. Damaged ones (a crash or a disk cut them short) are left out, with a warning."""
    path = run / METRICS_FILE
    try:
        content = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        _warn(f"{path}: cannot be read ({error.strerror}); going on without what was logged before")
        return []
    rows, damaged = [], []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode(), parse_int=_number)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and isinstance(row.get("kind"), str) and _is_step(row.get("step")):
            rows.append(row)
        else:
            damaged.append(number)
    if damaged:
        places = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        _warn(f"{path}: {len(damaged)} damaged rows left out (line {places})")
    return rows


def _is_step(value: Any) -> bool:
    return type(value) is int and value >= 0


def _number(text: str) -> int | float:
    """No run counts so far, and arithmetic fails on what no float holds."""
    return int(text) if len(text) < 19 else float(text)


_warn = functools.cache(say)
"""A report reads the rows several times; a warning is said once."""


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row) + "\n").encode()
