"""What a run says of itself, in files that prove themselves: JSON with a digest of its own, so to read it runs no code.

COMPLETE makes a folder a checkpoint: all of it that is no tensor, and the size and SHA-256 of every file. START in a
run's folder says the same of its first step: what model, text and settings it was begun with.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llama_pro_fast.config import NOT_BELOW_0, Settled, check_values, number
from llama_pro_fast.errors import UserError
from llama_pro_fast.files import first_line, sync, why_refused
from llama_pro_fast.resume import from_dict, to_dict

COMPLETE = "COMPLETE"
START = "start.json"
FORMAT = 2
STEP = re.compile(r"step-([0-9]{6,})")
"""The name of a checkpoint's folder."""


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps done, those that were left out among them.
        sequences: sequences consumed; the position in the data.
        tokens: tokens consumed.
    """

    step: int = number(0, NOT_BELOW_0)
    sequences: int = number(0, NOT_BELOW_0)
    tokens: int = number(0, NOT_BELOW_0)

    def advanced(self, *, sequences: int, tokens: int) -> Progress:
        """After one more step over that many."""
        return Progress(self.step + 1, self.sequences + sequences, self.tokens + tokens)


@dataclass(frozen=True)
class LogState:
    """What the log has counted and no row holds yet; a run that was stopped goes on as if it had not been.

    Attributes:
        unlogged: losses of the steps since the last row, without those that were left out.
        skipped: steps left out since the last row.
        bad_in_a_row: steps left out up to the last one, without a good one between.
        source_tokens: tokens gone through so far, by the source's name.
    """

    unlogged: list[float] = field(default_factory=list)
    skipped: int = 0
    bad_in_a_row: int = 0
    source_tokens: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself.

    Attributes:
        progress: how far the run was.
        config: the run's settings at that step.
        model: path of the model folder the run trains, relative to the run where it lies in it (a run can be moved).
        identity: of that folder, as :func:`~llama_pro_fast.expansion.lineage.model_identity` gives it.
        data: fingerprint of the training text and its order.
        measured: fingerprint of the held-out text.
        evaluated: whether the evaluation of this step, if it has one, is done.
        ended: which bound of `stop` ended the run at this step, in words; None where none did.
        log: see :class:`LogState`.
    """

    progress: Progress
    config: Settled
    model: str
    identity: dict[str, Any]
    data: str
    measured: str
    evaluated: bool = True
    ended: str | None = None
    log: LogState = field(default_factory=LogState)


def step_of(folder: Path) -> int:
    """The step a checkpoint's folder is named by."""
    return int(STEP.fullmatch(folder.name)[1])


def write_marker(path: Path, info: CheckpointInfo, files: dict[str, Any]) -> None:
    """Write COMPLETE or START, all of it or none.

    Args:
        files: by name their ``bytes`` and ``sha256``.
    """
    marker = path.with_name(path.name + ".new")
    marker.write_text(_marker_text(info, files), encoding="utf-8")
    sync(marker)
    marker.replace(path)
    sync(path.parent)


def _marker_text(info: CheckpointInfo, files: dict[str, Any]) -> str:
    content = {"format": FORMAT, **asdict(info), "config": to_dict(info.config), "files": files}
    return json.dumps(content | {"digest": _own_digest(content)}, indent=1)


def _own_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_info(folder: Path) -> CheckpointInfo:
    """What ``folder``'s COMPLETE says, itself proved by its digest; the other files are not looked at.

    Raises:
        UserError: as :func:`read_marker`.
    """
    return read_marker(folder / COMPLETE)[0]


def read_marker(path: Path) -> tuple[CheckpointInfo, dict[str, dict[str, Any]]]:
    """What COMPLETE or START says: of the run, and of each file its ``bytes`` and ``sha256``.

    Raises:
        UserError: it is damaged, of another step, or of another version of this program.
    """
    folder = path.parent
    with _readable(path):
        if path.exists() and not path.is_file():
            raise ValueError("it is no regular file")
        content = json.loads(path.read_text(encoding="utf-8"))
        is_old = not {"format", "digest"} & content.keys() and "progress" in content
        if not is_old and content.pop("digest") != _own_digest(content):
            raise ValueError("its digest is another")
    if is_old:
        raise UserError(
            f"{folder}: was written by an older version, with pickles, which can run code and are not read; finish "
            "that run with the older version"
        )
    if content.pop("format", None) != FORMAT:
        raise UserError(f"{folder}: was written by a newer version of this program; use that one")
    with _readable(path):
        files = content.pop("files")
        _check_files(files)
        config = from_dict(Settled, content.pop("config"))
        progress, log = Progress(**content.pop("progress")), LogState(**content.pop("log"))
        info = CheckpointInfo(progress=progress, config=config, log=log, **content)
        check_values(info)
    if path.name == COMPLETE and info.progress.step != step_of(folder):
        raise UserError(f"{folder}: damaged: its {COMPLETE} is of step {info.progress.step}")
    return info, files


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file's content: it is damaged."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read: {why_refused(error)}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path.parent}: damaged: {path.name} is not readable ({first_line(error)})") from error


def _check_files(files: Any) -> None:
    for name, entry in files.items():
        if Path(name).name != name or type(entry["bytes"]) is not int or not isinstance(entry["sha256"], str):
            raise ValueError(f"its entry of {name} is not one")


def digests_of(folder: Path, names: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of files, a few side by side: hashlib lets go of the interpreter while it hashes."""

    def digest(name: str) -> str:
        with open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    try:
        with ThreadPoolExecutor(max_workers=4) as pool:
            return dict(zip(names, pool.map(digest, names), strict=True))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
