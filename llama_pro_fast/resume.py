"""A run's stored configuration, and what is refused when it is resumed.

A resumed run keeps its settings: another value on the command line is refused here, and so are other weights, or text,
than its checkpoint was made with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from llama_pro_fast.config import RunConfig, Settled, Source, options
from llama_pro_fast.errors import UserError
from llama_pro_fast.files import first_line, sync

CONFIG_NAME = "config.yaml"


def stored_config(asked: RunConfig, given: Collection[str], *, overwrite: bool) -> Settled:
    """The stored configuration of the run to resume, with ``output`` as given (the run may have been moved).

    Args:
        asked: what the command line comes to.
        given: the keys that it names.

    Raises:
        UserError: it names another value than the stored one, or no run.
    """
    if overwrite:
        raise UserError("--resume and --overwrite contradict each other; give one of them")
    if "output" not in given:
        raise UserError("--resume: say which run, --output runs/NAME")
    run = Path(asked.output)
    stored = load_config(run)
    wanted, kept = ({key: value for key, value, _ in options(config)} for config in (asked, stored))
    for key in given:
        # `auto` and an empty value leave the choice to the run, which has made it.
        if key in kept and key != "output" and wanted[key] not in ("auto", None) and wanted[key] != kept[key]:
            raise UserError(
                f"--resume: {key} is {wanted[key]} here and {kept[key]} in {run / CONFIG_NAME}; a resumed run keeps "
                f"its settings, leave {key} out (or start a new run in another folder)"
            )
    return dataclasses.replace(stored, output=asked.output)


def check_unchanged(checkpoint: Path, *, model: str, model_digest: tuple[str, str], data: tuple[str, str]) -> None:
    """A run goes on from a checkpoint only on the weights and the text that it was made with.

    Args:
        model: path of the model's folder.
        model_digest: of that folder's tensors, then and now.
        data: fingerprint of the training text and its order, then and now.

    Raises:
        UserError: one of them has changed.
    """
    then, now = model_digest
    if then != now:
        raise UserError(
            f"{checkpoint}: was made on other weights (of {model}, digest {then}) than are there now ({now}); put them "
            "back"
        )
    if data[0] != data[1]:
        raise UserError(
            f"{checkpoint}: the training text has changed since it was written, so the order of the data is another; "
            "put the text back, or start a new run"
        )


def load_config(run: Path) -> Settled:
    """The configuration of a run's folder.

    Raises:
        UserError: there is no run, or its config.yaml is damaged.
    """
    path = run / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"{run}: no run there (no {CONFIG_NAME}); give the folder of a run")
    try:
        return from_dict(Settled, yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not readable as the configuration of a run ({first_line(error)})") from error


def save_config(config: Settled, path: Path) -> None:
    """Write the configuration; ``path`` holds all of it or does not exist."""
    replacement = path.with_suffix(".new")
    replacement.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
    sync(replacement)
    replacement.replace(path)
    sync(path.parent)


def to_dict(config: RunConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """The dataclass from plain values; nested dataclasses are told by their defaults, sources by their key.

    A plain value that is not there is its default.
    """
    known = {f.name for f in dataclasses.fields(cls)}
    if not isinstance(values, dict) or not values.keys() <= known:
        raise ValueError(f"{values!r:.60} is not of {', '.join(sorted(known))}")
    built = {}
    for f in dataclasses.fields(cls):
        if f.name not in values and f.default is not dataclasses.MISSING:
            continue
        value = values[f.name]
        if f.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(f.default_factory):
            value = from_dict(f.default_factory, value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            value = [Source(**row) for row in value]
        built[f.name] = value
    return cls(**built)
