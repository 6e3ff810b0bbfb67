"""A run's stored configuration, and what of it may change when the run is resumed.

What makes a run the run it is (the model, what trains, the text and its order, the optimizer's memory) stays from its
first step to its last. The rest may change, on the command line or in `config.yaml`: each change is compared with what
the checkpoint was written with, said, and kept in the run's history.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from llama_pro_fast.config import (
    MAY_STAY_OPEN,
    Change,
    RunConfig,
    Settled,
    Source,
    check_values,
    options,
)
from llama_pro_fast.errors import UserError
from llama_pro_fast.files import first_line, sync

CONFIG_NAME = "config.yaml"

_OTHER_RUN = "from here on it is another run"
_ROUNDING = "from here on it is equal within rounding, no longer bit for bit"
_SAME = "what is computed stays the same bit for bit"

MAY_CHANGE = {
    "optim.lr": _OTHER_RUN,
    "optim.min_lr_ratio": _OTHER_RUN,
    "optim.decay_steps": _OTHER_RUN,
    "optim.clip": _OTHER_RUN,
    "train.steps": f"the schedule follows the new length, {_OTHER_RUN}",
    "train.tokens": f"the schedule follows the new length, {_OTHER_RUN}",
    "train.micro_batch_size": _ROUNDING,
    "train.device": _ROUNDING,
    "train.fp8": f"gradients are rounded otherwise, {_OTHER_RUN}",
    "train.attention": _ROUNDING,
    "train.threads": _ROUNDING,
    "train.ranks": _ROUNDING,
    "train.sharding": _ROUNDING,
    "train.deterministic": _ROUNDING,
    "data.workers": _SAME,
    "data.max_bad_share": _SAME,
    "train.memory": _SAME,
    "train.recompute": _SAME,
    "train.log_every": _SAME,
    "train.checkpoint_minutes": _SAME,
    "train.checkpoint_every": _SAME,
    "train.keep_checkpoints": _SAME,
    "train.max_bad_steps": _SAME,
    "train.wandb": _SAME,
    "eval.every": _SAME,
    "eval.tokens": f"{_SAME}, what is measured counts from here",
    "stop.kl_above": _SAME,
    "stop.general_rise": _SAME,
}
"""The keys that may have another value on resume, and what that does to the run."""

_CHECKED_OTHERWISE = ("output", "data.cache", "model.path", "data.domain", "data.general")
"""Places, which may be others, as long as the weights and the text in them are those of the checkpoint."""

_KEPT = {
    "model": "the run has made its model",
    "expand": "the model is expanded already",
    "data.held_out": "it decides which documents are never trained on",
    "data.replay": "it decides what every step is made of",
    "data": "it decides which text is trained on",
    "train.seed": "it orders the text",
    "train.seq_len": "it cuts the text",
    "train.batch_size": "steps are counted in it",
    "train.kl_weight": "it is part of the loss",
    "train.parameters": "it decides what trains",
    "train.blocks": "it decides what trains",
    "train.dtype": "it decides how every number is rounded",
    "optim": "the optimizer's state has grown with it",
}
"""Why a key, or a section, stays."""

# What was chosen along with a key, and is chosen anew where that has changed and it is not given itself.
_SETTLED_WITH = {
    "train.memory": ("train.micro_batch_size", "train.recompute"),
    "train.micro_batch_size": ("train.recompute",),
    "train.device": ("train.memory", "train.micro_batch_size", "train.recompute", "train.attention", "train.threads"),
    "train.ranks": ("train.micro_batch_size", "train.recompute", "train.threads"),
    "train.sharding": ("train.micro_batch_size", "train.recompute"),
    "train.fp8": ("train.micro_batch_size", "train.recompute"),
    "train.steps": ("train.tokens",),
    "train.tokens": ("train.steps",),
}
_OPEN = dict.fromkeys(("train.memory", "train.recompute", "train.attention"), "auto")


def stored_config(asked: RunConfig, given: Collection[str], *, overwrite: bool) -> RunConfig:
    """The configuration to resume a run with: the stored one, with what may change as the command line has it.

    Args:
        asked: what the command line comes to.
        given: the keys that it names.

    Raises:
        UserError: it names another value for a key that a run keeps, or no run.
    """
    if overwrite:
        raise UserError("--resume and --overwrite contradict each other; give one of them")
    if "output" not in given:
        raise UserError("--resume: say which run, --output runs/NAME")
    run = Path(asked.output)
    stored = load_config(run)
    wanted, kept = ({key: value for key, value, _ in options(config)} for config in (asked, stored))
    # `auto` and an empty value leave the choice to the run, which has made it, but where empty is a choice.
    optional = [key for key in MAY_CHANGE if key in MAY_STAY_OPEN and key != "train.tokens"]
    changed = {
        key: wanted[key]
        for key in given
        if key in wanted and wanted[key] != kept[key] and (wanted[key] not in ("auto", None) or key in optional)
    }
    for key, value in changed.items():
        _check_may_change(key, kept[key], value, "on the command line")
    if changed.keys() >= {"train.steps", "train.tokens"}:
        raise UserError("--train.steps and --train.tokens both set the length; give one of them")
    config = _with(stored, changed | {"output": asked.output})
    check_values(config)
    return config


def opened(then: RunConfig, now: RunConfig) -> RunConfig:
    """``now`` with what hangs on a changed key, and has not changed itself, left open to be settled anew: on another
    device, or with more or fewer ranks, all that was chosen for the old ones; of the two lengths the one that has not
    changed."""
    before, after = ({key: value for key, value, _ in options(config)} for config in (then, now))
    changed = {key for key, value in after.items() if value != before[key]}
    if after["train.tokens"] is None:
        changed.discard("train.tokens")
    follow = {other for key in changed & _SETTLED_WITH.keys() for other in _SETTLED_WITH[key]} - changed
    return _with(now, {key: _OPEN.get(key) for key in follow})


def changes(then: RunConfig, now: RunConfig, *, step: int) -> list[Change]:
    """What of a run's settings is another than when its checkpoint was written, whoever changed it and where.

    Raises:
        UserError: a key that a run keeps.
    """
    before, after = ({key: value for key, value, _ in options(config)} for config in (then, now))
    found = []
    for key, value in after.items():
        if key != "history" and value != before[key] and key not in _CHECKED_OTHERWISE:
            _check_may_change(key, before[key], value, f"in {CONFIG_NAME}")
            found.append(Change(step=step, key=key, before=before[key], after=value))
    return found


def _check_may_change(key: str, before: Any, after: Any, where: str) -> None:
    if key in MAY_CHANGE or key in _CHECKED_OTHERWISE:
        return
    section = key.partition(".")[0]
    reason = _KEPT.get(key) or _KEPT.get(section, "it is part of what the run is")
    raise UserError(
        f"--resume: {key} is {_short(after)} {where} and was {_short(before)} in the run, which keeps it: {reason}; "
        f"leave it out or put {_short(before)} back, or start a new run in another folder"
    )


def _short(value: Any) -> str:
    return f"{value!r:.60}" if isinstance(value, (str, list)) else str(value)


def _with(config: Settled, values: dict[str, Any]) -> RunConfig:
    """``config`` with other values for some keys; no longer settled, as some may be open."""
    sections = {f.name: getattr(config, f.name) for f in dataclasses.fields(RunConfig)}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections[section] = dataclasses.replace(sections[section], **{name: value}) if name else value
    return RunConfig(**sections)


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
    except (yaml.YAMLError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
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
    """The dataclass from plain values; nested dataclasses are told by their defaults, rows of lists by their key.

    What is not there has its default.
    """
    known = {f.name for f in dataclasses.fields(cls)}
    if not isinstance(values, dict) or not values.keys() <= known:
        odd = sorted(map(str, values.keys() - known)) if isinstance(values, dict) else [f"{values!r:.60}"]
        raise ValueError(f"there is no key {odd[0]}; there is {', '.join(sorted(known))}")
    built = {}
    for f in dataclasses.fields(cls):
        if f.name not in values:
            continue
        value = values[f.name]
        if f.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(f.default_factory):
            value = from_dict(f.default_factory, value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            row_of = Change if f.name == "history" else Source
            try:
                value = [row_of(**row) for row in value]
            except TypeError as error:
                raise ValueError(f"{f.name}: {str(error).split('__init__() ')[-1]}") from error
        built[f.name] = value
    return cls(**built)
